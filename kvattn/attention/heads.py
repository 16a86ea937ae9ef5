"""Axis A, value `heads`: plain multi-head projections with free head counts.

MHA (N = K = M), GQA (K = M < N, arXiv 2305.13245), MQA (K = M = 1, arXiv 1911.02150), SQA (fewer query heads,
arXiv 2510.01817), different numbers and widths of K and V heads (DiffQKV, arXiv 2501.13629) and tied K = V are
values of one parametrisation: q[D,N,H] k[D,K,H] v[D,M,V] o[N,V,D].
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvattn.attention.family import Softmax
from kvattn.attention.operand import Operand, SoftmaxShape
from kvattn.attention.segments import Made, Segment, Where, own_heads
from kvattn.cache import LeafSpec
from kvattn.cache.encode import cast, decode
from kvattn.config import Layer, ModelConfig, RopeConfig, layer_pattern
from kvattn.config.check import at_least, choice, need
from kvattn.errors import UserError
from kvattn.layers import BLOCK, dense, rms_norm, rope_table, rotate
from kvattn.spec import ParamSpec
from kvattn.typed import shaped
from pallas_kernels import Leaf
from sharding import reshard

_Q = ("act_batch", "act_length", "act_q_heads", "act_head_dim")
_K = ("k_batch", "act_length", "act_k_heads", "act_head_dim")
_V = ("v_batch", "act_length", "act_v_heads", "act_head_dim")


@dataclasses.dataclass(frozen=True)
class Heads(Softmax, tag="heads"):
    """N query heads over K key heads of width H and M value heads of width V."""

    n_heads: int = 4  # N
    n_k_heads: int = 4  # K
    n_v_heads: int = 4  # M
    head_dim: int = 16  # H
    v_head_dim: int = 16  # V
    tied_kv: bool = False  # V is K before rotation: one cached leaf k[K,H]
    attn_scale: float = 0.0  # 0 = H ** -0.5
    attn_soft_cap: float = 0.0  # 0 = off; otherwise c * tanh(s / c) on scores
    qk_norm: str = "none"  # none | head (RMSNorm over H) | full (RMSNorm over all heads x H)
    qkv_bias: bool = False
    o_bias: bool = False

    # --- tables

    def check(self, cfg: ModelConfig, layer: Layer, where: str) -> None:
        """Raises UserError for the first illegal field, or a rotation wider than a head."""
        at_least(self, "model", n_heads=1, n_k_heads=1, n_v_heads=1, head_dim=1, v_head_dim=1)
        choice(self.qk_norm, ("none", "head", "full"), "model.qk_norm")
        for name in ("n_k_heads", "n_v_heads"):
            heads = getattr(self, name)
            need(self.n_heads % heads == 0, f"model.{name} is {heads}; it must divide model.n_heads = {self.n_heads}.")
        if self.tied_kv:
            same = (self.n_k_heads, self.head_dim) == (self.n_v_heads, self.v_head_dim)
            need(
                same,
                f"model.tied_kv shares K as V but K is {self.n_k_heads}x{self.head_dim} and V {self.n_v_heads}x"
                f"{self.v_head_dim}; make n_v_heads and v_head_dim equal to K's.",
            )
        for name in ("attn_scale", "attn_soft_cap"):
            need(getattr(self, name) >= 0, f"model.{name} is {getattr(self, name)}; it must not be negative.")
        if layer.rope is not None:
            dim = layer.rope.dim or self.head_dim
            need(
                dim % 2 == 0 and 0 < dim <= self.head_dim,
                f"{where}.rope.dim is {dim}; it must be even and at most head_dim = {self.head_dim}.",
            )
        if layer.groups:
            grouped = sum(group.heads for group in layer.groups)
            need(
                grouped == self.n_k_heads == self.n_v_heads,
                f"{where}.groups hold {grouped} heads, but the layer has {self.n_k_heads} key and "
                f"{self.n_v_heads} value heads; make the three equal.",
            )

    def param_specs(self, cfg: ModelConfig, owner: bool) -> dict[str, Any]:
        """Parameters of one layer; k, v and their norms and biases exist in owner layers only."""
        d, n, k, m, h, v = cfg.d_model, self.n_heads, self.n_k_heads, self.n_v_heads, self.head_dim, self.v_head_dim
        start = "zeros" if cfg.norm_offset else "ones"

        def norm(heads: int, axis: str) -> dict[str, ParamSpec]:
            if self.qk_norm == "head":
                return {"scale": ParamSpec((h,), ("head_dim",), start)}
            return {"scale": ParamSpec((heads, h), (axis, "head_dim"), start)}

        specs: dict[str, Any] = {
            "q": ParamSpec((d, n, h), ("embed", "q_heads", "head_dim"), fan_in=d),
            "o": ParamSpec((n, v, d), ("q_heads", "value_dim", "embed"), fan_in=n * v),
        }
        if self.qkv_bias:
            specs["q_bias"] = ParamSpec((n, h), ("q_heads", "head_dim"), "zeros")
        if self.o_bias:
            specs["o_bias"] = ParamSpec((d,), ("norm",), "zeros")
        if self.qk_norm != "none":
            specs["q_norm"] = norm(n, "q_heads")
        if owner:
            specs["k"] = ParamSpec((d, k, h), ("embed", "k_heads", "head_dim"), fan_in=d)
            if self.qkv_bias:
                specs["k_bias"] = ParamSpec((k, h), ("k_heads", "head_dim"), "zeros")
            if self.qk_norm != "none":
                specs["k_norm"] = norm(k, "k_heads")
        if owner and not self.tied_kv:
            specs["v"] = ParamSpec((d, m, v), ("embed", "v_heads", "value_dim"), fan_in=d)
            if self.qkv_bias:
                specs["v_bias"] = ParamSpec((m, v), ("v_heads", "value_dim"), "zeros")
        return specs

    def leaves(self, cfg: ModelConfig) -> dict[str, LeafSpec]:
        """k and v; tied, one leaf kept before rotation, which is also the value."""
        key = LeafSpec((self.n_k_heads, self.head_dim), role="both" if self.tied_kv else "key")
        if self.tied_kv:
            return {"k": key}
        return {"k": key, "v": LeafSpec((self.n_v_heads, self.v_head_dim), role="value")}

    def rotary_dims(self) -> tuple[int, ...]:
        return (self.head_dim,)

    @property
    def scale(self) -> float:
        """Of the scores: attn_scale, or H ** -0.5."""
        return self.attn_scale or self.head_dim**-0.5

    def softmax(self, cfg: ModelConfig) -> SoftmaxShape:
        return SoftmaxShape(
            self.n_heads, self.n_k_heads, self.n_v_heads, self.head_dim, self.v_head_dim, self.scale, self.attn_soft_cap
        )

    def describe(self) -> str:
        """N/K/M of widths H/V."""
        tied = " tied" if self.tied_kv else ""
        return f"{self.n_heads}/{self.n_k_heads}/{self.n_v_heads}{tied} x {self.head_dim}/{self.v_head_dim}"

    # --- a pass

    def entry_axes(self, cfg: ModelConfig) -> dict[str, tuple[str, ...]]:
        swap = {name: (axes[0], axes[2], axes[1], axes[3]) for name, axes in (("k", _K), ("v", _V))}
        return {name: swap[name] for name in self.leaves(cfg)}

    @shaped
    def queries(
        self, params: Any, cfg: ModelConfig, layer: int, x: Float[Array, "B T D"], where: Where
    ) -> Float[Array, "B T N H"]:
        """x[B,T,D] -> q[B,T,N,H], normalised and rotated."""
        q = dense(x, params["q"], params.get("q_bias"), ("embed", "q_heads", "head_dim"), BLOCK, _Q)
        q = self._norm(q, params.get("q_norm"), cfg, "q_heads", "act_q_heads")
        return rotate(q, where.q_tables[cfg.rope(layer), self.head_dim])

    def _norm(self, x: jax.Array, params: Any, cfg: ModelConfig, stored: str, name: str) -> jax.Array:
        """The q/k norm: over H of each head, or over all heads x H."""
        if params is None:
            return x
        if self.qk_norm == "head":
            return rms_norm(x, params["scale"], cfg.norm_eps, cfg.norm_offset)
        scale = reshard(params["scale"], (stored, "head_dim"), (name, "head_dim"))
        return rms_norm(x, scale, cfg.norm_eps, cfg.norm_offset, name)

    @shaped
    def entries(
        self, params: Any, cfg: ModelConfig, layer: int, x: Float[Array, "B T D"], where: Where, state: Any
    ) -> Made:
        """x[B,T,D] -> {k: [B,K,T,H] (rotated, unless tied), v: [B,M,T,V]}."""
        k = dense(x, params["k"], params.get("k_bias"), ("embed", "k_heads", "head_dim"), BLOCK, _K)
        k = self._norm(k, params.get("k_norm"), cfg, "k_heads", "act_k_heads")
        if self.tied_kv:
            return Made({"k": k.swapaxes(1, 2)})
        v = dense(x, params["v"], params.get("v_bias"), ("embed", "v_heads", "value_dim"), BLOCK, _V)
        k = rotate(k, where.k_tables[cfg.rope(layer), self.head_dim])
        return Made({"k": k.swapaxes(1, 2), "v": v.swapaxes(1, 2)})

    @shaped
    def operand(
        self, params: Any, cfg: ModelConfig, layer: int, q: Float[Array, "B T N H"], segment: Segment
    ) -> Operand:
        """K and V of a segment in q's dtype; codes stay codes. Tied keys are dequantised: they are rotated here."""
        if self.tied_kv:
            v = decode(segment.leaves["k"], q.dtype)
            table = rope_table(cfg.rope(layer), self.head_dim, jnp.maximum(segment.tokens.positions, 0))
            k, v = Leaf(rotate(v, table, None)), Leaf(v)
        else:
            k, v = cast(segment.leaves["k"], q.dtype), cast(segment.leaves["v"], q.dtype)
        k, v = (own_heads(leaf, q.shape[2], segment.own) for leaf in (k, v))
        kv = None if segment.own else self.kernel_kv(cfg, segment.cache)
        address = None if segment.own else segment.cache.address
        return Operand(q, k, v, self.scale, self.attn_soft_cap, kv=kv, address=address)

    def kernel_kv(self, cfg: ModelConfig, cache: Any) -> Any:
        """K and V as they are stored; None where they are tied (not yet rotated)."""
        return None if self.tied_kv else cache.address.kv(cache.leaves["k"], cache.leaves["v"], 0)

    @shaped
    def output(
        self, params: Any, cfg: ModelConfig, layer: int, context: Float[Array, "B T N V"], view: Any
    ) -> Float[Array, "B T D"]:
        return dense(context, params["o"], params.get("o_bias"), ("q_heads", "value_dim", "embed"), _Q, None)


def heads_model(*, masks: Any = (), ropes: Any = None, **fields: Any) -> ModelConfig:
    """A decoder of plain heads in all layers, from flat fields: those of Heads and of ModelConfig, and patterns of
    masks and rotations. Raises TypeError for an unknown field."""
    own = {f.name for f in dataclasses.fields(Heads)}
    heads = Heads(**{name: value for name, value in fields.items() if name in own})
    rest = {name: value for name, value in fields.items() if name not in own}
    ropes, n_layers = (RopeConfig(),) if ropes is None else ropes, rest.get("n_layers", ModelConfig.n_layers)
    return ModelConfig(layers=layer_pattern(heads, masks, ropes, n_layers=n_layers), **rest)


def plain_heads(cfg: ModelConfig, what: str) -> Heads:
    """The one Heads that all layers of `cfg` have. Raises UserError where they do not: `what` is written for it."""
    families = {layer.attention for layer in cfg.every}
    if len(families) == 1 and isinstance(heads := next(iter(families)), Heads):
        return heads
    names = ", ".join(sorted({family.tag for family in families}))
    raise UserError(f"{what} takes plain heads alike in all layers; this model has {len(families)} kinds ({names}).")
