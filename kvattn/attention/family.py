"""What an attention family provides. A family is a frozen dataclass (its config) and its functions in one file, and a
line in kvattn/attention/__init__.py; caches, masks, kernels, ledger and sharding know nothing else about it.

    Family          everything: parameters, leaves, entries, attention, counts
    Softmax         a family whose attention is one softmax over segments: it makes queries, an operand for each
                    segment, and the output

Calls of one layer, in order, in a pass of tokens x[B,T,D]:

    made = family.entries(params, cfg, layer, x, where, state)      an owner: what its tokens leave
    view, cache = segments.view(...)                                own tokens, a cache, or both
    out = family.attend(params, cfg, layer, x, where, view)         [B,T,D], its sum over the chips still open
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvattn.attention import dispatch, layouts
from kvattn.attention.operand import Operand, SoftmaxShape
from kvattn.attention.segments import Made, Segment, View, Where
from kvattn.cache.leaf import LeafSpec
from kvattn.cache.store import Cache
from kvattn.config import Attention, Layer, ModelConfig
from kvattn.masks import from_config
from kvattn.typed import shaped
from pallas_kernels import KV
from sharding import reshard


class Family(Attention):
    """Base of all families. `cfg` is the model, `layer` an index into it; fields of the family are its own."""

    # --- tables

    def check(self, cfg: ModelConfig, layer: Layer, where: str) -> None:
        """Raises UserError for an illegal field; `where` names the layer in messages."""

    def param_specs(self, cfg: ModelConfig, owner: bool) -> dict[str, Any]:
        """ParamSpecs of one layer; an owner also has what makes its leaves. {} = the block has no attention."""
        raise NotImplementedError

    def leaves(self, cfg: ModelConfig) -> dict[str, LeafSpec]:
        """What an owner leaves in a cache; {} = nothing."""
        raise NotImplementedError

    def cannot_read(self, cfg: ModelConfig, owner: Attention) -> str | None:
        """Why a layer of this family cannot read what a layer of `owner` left; None if it can."""
        same = type(owner) is type(self) and owner.leaves(cfg) == self.leaves(cfg)
        return None if same else "what the owner leaves is not what this layer reads; give both one family and one K, V"

    def rotary_dims(self) -> tuple[int, ...]:
        """Widths of the heads that rotate: `where` has a table for each, at the layer's rope."""
        return ()

    def softmax(self, cfg: ModelConfig) -> SoftmaxShape | None:
        """Sizes of the softmax over a pass's own tokens; None for a family without one."""
        return None

    def flops(self, cfg: ModelConfig, seen: float) -> float:
        """Matmul FLOPs of one token's attention that sees `seen` keys, projections left out."""
        shape = self.softmax(cfg)
        return 0.0 if shape is None else 2 * shape.heads * (shape.key_dim + shape.value_dim) * seen

    def describe(self) -> str:
        """Heads in a few characters, for ledgers."""
        return self.tag

    # --- a pass

    def entries(
        self, params: Any, cfg: ModelConfig, layer: int, x: jax.Array, where: Where, state: dict[str, jax.Array]
    ) -> Made:
        """What tokens x[B,T,D] leave: leaves per token [B,heads,T,dim], and the states after them, from `state` before
        them ([B, ...], zeros at the start). Positions -1 leave a state untouched."""
        raise NotImplementedError

    def entry_axes(self, cfg: ModelConfig) -> dict[str, tuple[str | None, ...]]:
        """Logical axes of the per-token arrays that `entries` returns."""
        axes = ("k_batch", "act_k_heads", "act_length", "act_head_dim")
        return {name: axes for name, leaf in self.leaves(cfg).items() if leaf.per == "token"}

    def attend(self, params: Any, cfg: ModelConfig, layer: int, x: jax.Array, where: Where, view: View) -> jax.Array:
        """x[B,T,D] -> [B,T,D], its sum over the chips that split the heads still open."""
        raise NotImplementedError

    def kernel_kv(self, cfg: ModelConfig, cache: Cache) -> KV | None:
        """The cache as a decode kernel reads it; None where keys or values must be made from what is stored."""
        return None


class Softmax(Family):
    """A family whose attention is one softmax over the segments of its view."""

    def queries(self, params: Any, cfg: ModelConfig, layer: int, x: jax.Array, where: Where) -> Any:
        """x[B,T,D] -> q[B,T,N,H], or a tree of such arrays where segments want different ones."""
        raise NotImplementedError

    def operand(self, params: Any, cfg: ModelConfig, layer: int, q: Any, segment: Segment) -> Operand:
        """The operand of one segment; `mask` and `own` are filled in by `attend`."""
        raise NotImplementedError

    def output(self, params: Any, cfg: ModelConfig, layer: int, context: jax.Array, view: View) -> jax.Array:
        """Attention result [B,T,N,V] -> [B,T,D], its sum over the chips that split N still open."""
        raise NotImplementedError

    @shaped
    def attend(
        self, params: Any, cfg: ModelConfig, layer: int, x: Float[Array, "B T D"], where: Where, view: View
    ) -> Float[Array, "B T D"]:
        """Queries, an operand a segment, one softmax over all of them, output; head groups one after the other."""
        tokens = where.own if view.own else where.cached
        q = self.queries(params, cfg, layer, x, where)
        q = jax.tree.map(lambda a: reshard(a, layouts.MADE, layouts.OWN if view.own else layouts.CACHED), q)
        context = []
        for part in view.parts:
            seen, mine = from_config(part.mask), part.queries(q)
            operands = [
                self.operand(params, cfg, layer, mine, segment)._replace(
                    mask=seen(tokens, segment.tokens), tokens=segment.tokens, own=segment.own
                )
                for segment in part.segments
            ]
            ordered = where.empty and part.mask.kind == "causal"
            context.append(dispatch.attention(cfg, part.mask, tokens, operands, ordered=ordered))
        joined = context[0] if len(context) == 1 else jnp.concatenate(context, axis=2)
        made = reshard(joined, layouts.OWN if view.own else layouts.CACHED_OUT, layouts.MADE)
        return self.output(params, cfg, layer, made, view)
