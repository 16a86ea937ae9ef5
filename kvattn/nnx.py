"""The door for Flax users: any variant as an `flax.nnx.Module`.

    decoder = Decoder(cfg, rngs=nnx.Rngs(0))                 # or Decoder.from_params(cfg, loaded.params)
    loss, grads = nnx.value_and_grad(lambda m: loss_of(m(tokens)))(decoder)
    caches = decoder.init_cache(batch, capacity)
    logits, caches = decoder.prefill(tokens, positions, caches)
    logits, caches = decoder.decode_step(token, position, caches)

    class Block(nnx.Module):                                 # one layer inside a model of your own
        def __init__(self, cfg, rngs):
            self.norm, self.attention = nnx.RMSNorm(cfg.d_model, rngs=rngs), Attention(cfg, rngs=rngs)
        def __call__(self, x):
            return x + self.attention(self.norm(x))

The state tree mirrors the parameter tree of kvattn.model (dicts become nnx.Dict, the tuple of layers
nnx.List, arrays nnx.Param), and the math is the same functions on that tree: module == function.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kvattn import cache as caching
from kvattn import model, spec
from kvattn.attention.segments import View
from kvattn.config import CacheConfig, ModelConfig, validate
from kvattn.decode import generation as decode
from kvattn.errors import UserError


def to_nnx(tree: Any) -> Any:
    """dict -> nnx.Dict, tuple -> nnx.List, array -> nnx.Param."""
    if isinstance(tree, dict):
        return nnx.Dict({name: to_nnx(value) for name, value in tree.items()})
    if isinstance(tree, tuple):
        return nnx.List([to_nnx(value) for value in tree])
    return nnx.Param(tree)


def from_nnx(node: Any) -> Any:
    """The inverse of `to_nnx`; arrays are not copied."""
    if isinstance(node, nnx.Variable):
        return node.get_value()
    if isinstance(node, nnx.List):
        return tuple(from_nnx(value) for value in node)
    return {name: from_nnx(value) for name, value in node.items()}


class _Tree(nnx.Module):
    """A module whose attributes are the entries of one parameter dict."""

    def _adopt(self, specs: Any, params: Any) -> None:
        _check_shapes(specs, params)
        self.names = tuple(params)
        for name, value in params.items():
            setattr(self, name, to_nnx(value))

    def to_params(self) -> dict[str, Any]:
        """The parameters as the plain tree that every function of kvattn takes."""
        return {name: from_nnx(getattr(self, name)) for name in self.names}


class Attention(_Tree):
    """Attention of layer `layer` of `cfg`, projections included, norms and residual not.

    Parameters are those of kvattn.attention's variant: q, o and, in an owner layer, k and v. A layer that
    reads another's K and V (`cfg.kv_source`) has none and needs that owner's `kv`.
    Raises UserError: an illegal config, a layer outside 0..L-1, params that do not fit the config.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        layer: int = 0,
        *,
        rngs: nnx.Rngs | None = None,
        params: Any = None,
        dtype: Any = jnp.float32,
    ):
        validate(cfg)
        if not 0 <= layer < cfg.n_layers:
            raise UserError(f"layer is {layer}; the config has layers 0..{cfg.n_layers - 1}.")
        specs = model.layer_specs(cfg, layer).get("attn", {})
        self.cfg, self.layer = cfg, layer
        self._adopt(specs, _params(specs, rngs, params, dtype))

    @classmethod
    def from_params(cls, cfg: ModelConfig, layer: int, params: Any) -> "Attention":
        """The module around existing parameters, `tree["layers"][layer]["attn"]`."""
        return cls(cfg, layer, params=params)

    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        kv: View | None = None,
    ) -> jax.Array:
        """x[B,T,D] (normalised by the caller) -> [B,T,D]. positions[B,T] int32, -1 = padding (None = 0..T-1);
        segment_ids[B,T] int32 of packed rows; `kv`: what `attend` of the owner layer returned."""
        return self.attend(x, positions=positions, segment_ids=segment_ids, kv=kv)[0]

    def attend(
        self,
        x: jax.Array,
        *,
        x_kv: jax.Array | None = None,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        kv: View | None = None,
        cache: caching.Cache | None = None,
        empty: bool = False,
    ) -> tuple[jax.Array, View, caching.Cache | None]:
        """(output [B,T,D], kv, cache). `kv` is for the layers that read this one; with a `cache` the tokens
        are appended to it and it is attended to. `x_kv` feeds K and V where they have a norm of their own
        (None = x); `empty`: the cache holds nothing yet.

        Raises UserError: a reader without `kv`, an owner with one, a reader with a cache, segments with a
        cache.
        """
        owner = self.cfg.sources[self.layer] == self.layer
        if owner and kv is not None:
            raise UserError(f"layer {self.layer} owns its K and V and was given kv; leave kv at None.")
        if not owner and kv is None:
            raise UserError(f"layer {self.layer} reads layer {self.cfg.sources[self.layer]}; pass that layer's kv.")
        if not owner and cache is not None:
            raise UserError(f"layer {self.layer} owns no K and V but was given a cache; give it to its owner.")
        if cache is not None and segment_ids is not None:
            raise UserError("segment_ids were given together with a cache; packed rows have none, pass one of them.")
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None, :], x.shape[:2])
        this = model.Pass(model.where_of(self.cfg, positions, segment_ids, empty))
        x_kv = x if x_kv is None else x_kv
        out, view, cache, _ = model.attend_layer(self.to_params(), self.cfg, self.layer, x, x_kv, this, cache, kv)
        return out, view, cache

    def init_cache(self, batch: int, capacity: int, cache: CacheConfig | None = None) -> caching.Cache:
        """An empty cache for this layer. Raises UserError for a layer that owns none."""
        empty = model.create_caches(self.cfg, cache or CacheConfig(), batch, capacity)[self.layer]
        if empty is None:
            raise UserError(f"layer {self.layer} reads layer {self.cfg.sources[self.layer]}'s cache; make that one.")
        return empty


class Decoder(_Tree):
    """The whole decoder. Attributes: embed, layers, final_norm and, untied, unembed.

    Raises UserError: an illegal config, params that do not fit it, neither or both of rngs and params.
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs | None = None, params: Any = None, dtype: Any = jnp.float32):
        validate(cfg)
        self.cfg = cfg
        if params is None and rngs is not None:
            params = model.init(rngs.params(), cfg, dtype)
            rngs = None
        self._adopt(model.param_specs(cfg), _params(None, rngs, params, dtype))

    @classmethod
    def from_params(cls, cfg: ModelConfig, params: Any) -> "Decoder":
        """The module around existing parameters, for example `formats.load(path).params`."""
        return cls(cfg, params=params)

    def __call__(
        self, tokens: jax.Array, *, positions: jax.Array | None = None, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        """tokens[B,T] int32 -> logits[B,T,W] float32, each position seeing what the layers' masks allow."""
        inputs = model.Inputs(tokens, positions, segment_ids)
        return model.forward(self.to_params(), self.cfg, inputs)[0].logits

    def init_cache(self, batch: int, capacity: int, cache: CacheConfig | None = None) -> tuple[Any, ...]:
        """Empty caches, one entry per layer (None for readers), for `capacity` tokens per row."""
        return model.create_caches(self.cfg, cache or CacheConfig(), batch, capacity)

    def prefill(self, tokens: jax.Array, positions: jax.Array, caches: Any, *, chunk: int = 0) -> tuple[jax.Array, Any]:
        """Fills empty caches with a prompt; see kvattn.decode.generation.prefill. Returns logits[B,W] of each row's
        last token, and the caches."""
        return decode.prefill(self.to_params(), self.cfg, tokens, positions, caches, chunk)

    def decode_step(self, token: jax.Array, positions: jax.Array, caches: Any) -> tuple[jax.Array, Any]:
        """token[B] int32 at positions[B] int32 (-1 = the row is done) -> logits[B,W] float32 and the caches.
        Under nnx.jit with donate_argnames="caches" the caches are updated in place."""
        return decode.decode_step(self.to_params(), self.cfg, token, positions, caches)


def _params(specs: Any, rngs: nnx.Rngs | None, params: Any, dtype: Any) -> Any:
    if (rngs is None) == (params is None):
        given = "neither" if rngs is None else "both"
        raise UserError(f"{given} of rngs and params were given; pass rngs to draw weights or params to adopt them.")
    return spec.init(rngs.params(), specs, dtype) if params is None else params


def _check_shapes(specs: Any, params: Any) -> None:
    want = {jax.tree_util.keystr(path): leaf.shape for path, leaf in _leaves(specs, spec.is_spec)}
    have = {jax.tree_util.keystr(path): leaf.shape for path, leaf in _leaves(params, None)}
    for path in sorted(want.keys() | have.keys()):
        if want.get(path) != have.get(path):
            raise UserError(
                f"params{path} has shape {have.get(path, 'missing')} where the config says "
                f"{want.get(path, 'no such parameter')}; pass the config these parameters were made with."
            )


def _leaves(tree: Any, is_leaf: Any) -> list[Any]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
