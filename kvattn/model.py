"""The decoder: parameter table, forward pass with and without caches, loop and scan over layers.

specs = param_specs(cfg)                      # one table: shapes, axes, initialisers
params = init(rng, cfg)
outputs, caches = forward(params, cfg, Inputs(tokens), caches=caches)
"""

import dataclasses
import math
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from kvattn import layers, masks, spec
from kvattn.attention import VARIANTS
from kvattn.attention.dispatch import Operand, attention
from kvattn.attention.view import View, make_view
from kvattn.config import ModelConfig
from kvattn.errors import UserError
from kvattn.spec import ParamSpec
from sharding import own_group, reduce, reshard, settle


@flax.struct.dataclass
class Inputs:
    """tokens[B,T] int32; positions[B,T] int32 absolute, -1 = padding (None = 0..T-1); segment_ids[B,T] int32 of
    packed batches, without caches only. `fresh`: the caches are empty (first prefill chunk), so attention stays
    inside the chunk. `last_only`: logits of the last query position only, [B,1,W]."""

    tokens: jax.Array
    positions: jax.Array | None = None
    segment_ids: jax.Array | None = None
    fresh: bool = flax.struct.field(pytree_node=False, default=False)
    last_only: bool = flax.struct.field(pytree_node=False, default=False)


@flax.struct.dataclass
class Outputs:
    """logits[B,T,W] float32; collected: name -> tuple over layers of what `collect` asked for."""

    logits: jax.Array
    collected: dict[str, tuple[jax.Array, ...]]


# --- parameters ----------------------------------------------------------------------------------------


def layer_specs(cfg: ModelConfig, layer: int) -> dict[str, Any]:
    """ParamSpecs of one block."""
    out: dict[str, Any] = {"attn": VARIANTS[cfg.variant].param_specs(cfg, layer), "mlp": layers.mlp_specs(cfg)}
    if cfg.norm_placement in ("pre", "both"):
        out["attn_norm"] = layers.norm_specs(cfg)
        if cfg.residual != "parallel_palm":
            out["mlp_norm"] = layers.norm_specs(cfg)
    if cfg.norm_placement in ("post", "both"):
        out["attn_post_norm"] = layers.norm_specs(cfg)
        out["mlp_post_norm"] = layers.norm_specs(cfg)
    if cfg.kv_norm and cfg.sources[layer] == layer:
        out["kv_norm"] = layers.norm_specs(cfg)
    return out


def param_specs(cfg: ModelConfig) -> dict[str, Any]:
    """ParamSpecs of the whole model. With cfg.scan_layers, `layers` has one entry per position in the period,
    each stacked [L/period, ...] with leading axis `layers`."""
    w, d = cfg.vocab_size, cfg.d_model
    out: dict[str, Any] = {
        "embed": {"table": ParamSpec((w, d), ("vocab", "embed"), scale=0.02)},
        "final_norm": layers.norm_specs(cfg),
    }
    if not cfg.tied_embeddings:
        out["unembed"] = {"table": ParamSpec((d, w), ("embed", "vocab"), fan_in=d)}
    if not cfg.scan_layers:
        out["layers"] = tuple(layer_specs(cfg, layer) for layer in range(cfg.n_layers))
        return out
    period = scan_period(cfg)
    repeats = cfg.n_layers // period
    out["layers"] = tuple(
        spec.map_specs(
            lambda s: ParamSpec((repeats, *s.shape), ("layers", *s.axes), s.init, s.scale, s.fan_in),
            layer_specs(cfg, layer),
        )
        for layer in range(period)
    )
    return out


def init(rng: jax.Array, cfg: ModelConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Random parameters of the unscanned layout, stacked afterwards when cfg.scan_layers: loop and scan agree."""
    params = spec.init(rng, param_specs(unscanned(cfg)), dtype)
    return stack_layers(params, cfg) if cfg.scan_layers else params


def kv_specs(cfg: ModelConfig) -> tuple[dict[str, tuple[int, int]] | None, ...]:
    """Per layer {leaf: (heads, dim)} for owners, None for layers that read another's cache."""
    one = VARIANTS[cfg.variant].kv_spec(cfg)
    return tuple(one if owner == layer else None for layer, owner in enumerate(cfg.sources))


# --- forward -------------------------------------------------------------------------------------------


def forward(
    params: dict[str, Any], cfg: ModelConfig, inputs: Inputs, *, caches: Any = None, collect: tuple[str, ...] = ()
) -> tuple[Outputs, Any]:
    """Logits of every position (or the last), and the caches with the tokens appended (None without caches).

    `collect=("attention",)` also returns each layer's attention output [B,T,D] before the residual add.
    Raises UserError for segment ids together with caches.
    """
    x, caches, collected = hidden(params, cfg, inputs, caches=caches, collect=collect)
    if inputs.last_only:
        x = x[:, -1:]
    return Outputs(unembed(params, cfg, x), collected), caches


def hidden(
    params: dict[str, Any], cfg: ModelConfig, inputs: Inputs, *, caches: Any = None, collect: tuple[str, ...] = ()
) -> tuple[jax.Array, Any, dict[str, tuple[jax.Array, ...]]]:
    """Final hidden states [B,T,D] after the last norm, the caches, and what was collected."""
    if caches is not None and inputs.segment_ids is not None:
        raise UserError("segment_ids were given together with caches; packed batches have no cache, pass one of them.")
    for name in collect:
        if name != "attention":
            raise UserError(f"collect has {name!r}; only 'attention' can be collected.")
    x = layers.embed(params, cfg, inputs.tokens)
    positions = inputs.positions
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(inputs.tokens.shape[1], dtype=jnp.int32)[None, :], inputs.tokens.shape)
    where = where_of(cfg, positions, inputs.segment_ids, inputs.fresh)
    if cfg.scan_layers:
        if collect or (caches is not None and not inputs.fresh):
            raise UserError(
                "model.scan_layers is True with filled caches or collect; use model.unstack_layers and "
                "scan_layers False."
            )
        x, caches = _scan_layers(params["layers"], cfg, x, where, caches)
        collected: dict[str, tuple[jax.Array, ...]] = {}
    else:
        x, caches, collected = _loop_layers(params["layers"], cfg, x, where, caches, collect)
    return layers.norm(params["final_norm"], cfg, x), caches, collected


def unembed(params: dict[str, Any], cfg: ModelConfig, x: jax.Array) -> jax.Array:
    """Hidden states [B,T,D] -> logits [B,T,W] float32."""
    return layers.unembed(params, cfg, x)


class Where(NamedTuple):
    """Positions of a pass, in each layout that needs them: rope -> table where queries and where keys are made; the
    tokens where they attend to a cache and to each other. `fresh`: the caches are empty."""

    q_tables: dict[Any, Any]
    k_tables: dict[Any, Any]
    cached: masks.Tokens
    together: masks.Tokens
    fresh: bool


def where_of(cfg: ModelConfig, positions: jax.Array, segment_ids: jax.Array | None, fresh: bool) -> Where:
    """What the layers need to know of positions[B,T] (-1 = padding)."""

    def place(x, batch):
        return None if x is None else reshard(x, (None, None), (batch, None))

    def tables(here):
        return {rope: layers.rope_table(rope, cfg.head_dim, jnp.maximum(here, 0)) for rope in set(cfg.ropes)}

    def tokens(batch):
        return masks.Tokens(place(positions, batch), place(segment_ids, batch))

    q_here, k_here = place(positions, "act_batch"), place(positions, "k_batch")
    q_tables = tables(q_here)
    k_tables = q_tables if k_here is q_here else tables(k_here)
    return Where(q_tables, k_tables, tokens("attn_batch"), tokens("fresh_batch"), fresh)


def _loop_layers(blocks, cfg, x, where, caches, collect):
    views: dict[int, View] = {}
    new_caches = list(caches) if caches is not None else None
    gathered: list[jax.Array] = []

    def block(params, x, cache, view, layer):
        return _block(params, cfg, layer, x, where, cache, view)

    block = _rematerialised(block, cfg.remat)
    x = _open_residual(cfg, x)
    for layer, params in enumerate(blocks):
        owner = cfg.sources[layer]
        cache = caches[owner] if caches is not None and owner == layer else None
        x, attended, view, cache = block(params, x, cache, views.get(owner), layer)
        views[owner] = view
        if new_caches is not None and owner == layer:
            new_caches[layer] = cache
        if collect:
            gathered.append(attended)
    collected = {"attention": tuple(gathered)} if collect else {}
    return _close_residual(cfg, x), tuple(new_caches) if new_caches is not None else None, collected


def _rematerialised(block, remat: str):
    if remat == "none":
        return block
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    return jax.checkpoint(block, policy=policy, static_argnums=(4,))


def _open_residual(cfg: ModelConfig, x: jax.Array):
    """What travels between blocks: x, and in a ladder also the last output that is not added to it yet."""
    return (x, jnp.zeros_like(x)) if cfg.residual == "ladder" else x


def _close_residual(cfg: ModelConfig, x) -> jax.Array:
    return x[0] + x[1] if cfg.residual == "ladder" else x


def _block(params, cfg, layer, x, where, cache, view):
    """One block: returns (x, attention output [B,T,D], the view its readers share, the owner's new cache).

    A ladder (arXiv 2501.06589) adds every output one sub-module late: x_i = x_0 + sum of y_j, j <= i - 2, so that the
    sum of y_{i-1} over the chips runs beside sub-module i.
    """
    x, late = x if cfg.residual == "ladder" else (x, None)
    h = _enter(params, "attn_norm", cfg, x)
    h_kv = _enter(params, "kv_norm", cfg, x) if "kv_norm" in params else h
    attended, view, cache = attend_layer(params["attn"], cfg, layer, h, h_kv, where, cache, view)
    if cfg.residual == "parallel_palm":  # one sum over the chips for both outputs
        out = _leave(layers.mlp(params["mlp"], cfg, h) + attended)
        return x + out, attended, view, cache
    attended = _leave(attended, params, "attn_post_norm", cfg)
    if cfg.residual == "serial":
        x = x + attended
    elif cfg.residual == "ladder":
        x = x + late
    out = layers.mlp(params["mlp"], cfg, _enter(params, "mlp_norm", cfg, x))
    out = _leave(out, params, "mlp_post_norm", cfg)
    if cfg.residual == "ladder":
        return (x + attended, out), attended, view, cache
    x = x + out if cfg.residual == "serial" else x + attended + out
    return x, attended, view, cache


def _enter(params, norm: str, cfg: ModelConfig, x: jax.Array) -> jax.Array:
    """x[B,T,D] of the residual stream -> what a sub-module reads, normed where the block has that norm."""
    x = layers.norm(params[norm], cfg, x) if norm in params else x
    return settle(reshard(x, layers.RESIDUAL, layers.BLOCK))


def _leave(out: jax.Array, params: Any = (), norm: str = "", cfg: ModelConfig | None = None) -> jax.Array:
    """Ends the open sum of a sub-module's output [B,T,D]; normed where the block has that norm."""
    out = reduce(out, "mlp", layers.BLOCK, layers.RESIDUAL)
    return layers.norm(params[norm], cfg, out) if norm in params else out


def attend_layer(params, cfg, layer, h, h_kv, where, cache, view):
    """Attention of one layer: h[B,T,D] (h_kv for K and V) -> ([B,T,D], view, cache).

    An owner produces entries and makes the view; a reader is given its owner's. The result is summed over the
    chips that split the heads by `sharding.reduce`.
    """
    variant, rope = VARIANTS[cfg.variant], cfg.rope(layer)
    q = variant.queries(params, cfg, h, where.q_tables[rope])
    if cfg.sources[layer] == layer:
        entries = variant.entries(params, cfg, h_kv, where.k_tables[rope])
        view, cache = make_view(entries, variant.kv_axes(cfg), where, cache)
    together = not any(segment.split for segment in view)
    tokens = where.together if together else where.cached
    q = reshard(q, _MADE, _TOGETHER if together else _CACHED)
    mask = masks.from_config(cfg.mask(layer))
    operands = []
    for segment in view:
        k, v = variant.expand(cfg, layer, segment.entries, segment.tokens.positions, q.dtype)
        if together:
            k, v = (own_group(a, q.shape[2], "fresh_heads") for a in (k, v))
        own = together and where.fresh
        kv = None if segment.cache is None else variant.kernel_kv(cfg, segment.cache)
        operands.append(Operand(k, v, mask(tokens, segment.tokens), segment.tokens, segment.split, own, kv))
    context = attention(cfg, layer, q, tokens, operands)
    return variant.output(params, cfg, reshard(context, _TOGETHER if together else _CACHED_OUT, _MADE)), view, cache


# Axes of q and of the attention result [B,T,N,H]: as projected, over the tokens of the pass, over a cache.
_MADE = ("act_batch", "act_length", "act_q_heads", "act_head_dim")
_TOGETHER = ("fresh_batch", "act_length", "fresh_heads", "act_head_dim")
_CACHED = ("attn_batch", "act_length", "attn_heads", "act_head_dim")
_CACHED_OUT = ("attn_batch", "act_length", "attn_out_heads", "act_head_dim")


# --- scan over layers ----------------------------------------------------------------------------------


def unscanned(cfg: ModelConfig) -> ModelConfig:
    """cfg with its layers in a loop."""
    return dataclasses.replace(cfg, scan_layers=False)


def scan_period(cfg: ModelConfig) -> int:
    """Layers per scan step: masks, ropes and sharing groups must repeat with it, at least twice.

    Raises UserError when no period works (for example sharing across the whole depth).
    """
    base = math.lcm(len(cfg.masks), len(cfg.ropes))
    for period in range(base, cfg.n_layers // 2 + 1, base):
        sources = cfg.sources
        repeats = all(sources[i] - (i - i % period) == sources[i % period] for i in range(cfg.n_layers))
        if cfg.n_layers % period == 0 and repeats:
            return period
    raise UserError(
        f"model.scan_layers is True but masks, ropes and kv_source have no common period that repeats "
        f"over n_layers = {cfg.n_layers}; set scan_layers to False."
    )


def stack_layers(params: dict[str, Any], cfg: ModelConfig) -> dict[str, Any]:
    """Loop layout -> scan layout: layers[i] holds layers i, i+period, ... stacked."""
    period = scan_period(cfg)
    stacked = tuple(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["layers"][i::period]) for i in range(period)
    )
    return {**params, "layers": stacked}


def unstack_layers(params: dict[str, Any], cfg: ModelConfig) -> dict[str, Any]:
    """Scan layout -> loop layout; the inverse of `stack_layers`."""
    period = scan_period(cfg)
    return {
        **params,
        "layers": tuple(
            jax.tree.map(lambda leaf, n=layer // period: leaf[n], params["layers"][layer % period])
            for layer in range(cfg.n_layers)
        ),
    }


def stack_caches(caches: Any, cfg: ModelConfig) -> Any:
    """Caches by layer -> as a scan takes them: one entry per position in the period, leaves [L/period, ...]."""
    period = scan_period(cfg)
    return tuple(jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches[i::period]) for i in range(period))


def unstack_caches(caches: Any, cfg: ModelConfig) -> Any:
    """The inverse of `stack_caches`."""
    period = scan_period(cfg)
    return tuple(
        jax.tree.map(lambda leaf, n=layer // period: leaf[n], caches[layer % period]) for layer in range(cfg.n_layers)
    )


def _scan_layers(stacked, cfg, x, where, caches):
    """The blocks as a scan over periods. Caches (`stack_caches`) are filled, not read: a first prefill."""
    period = scan_period(cfg)
    empty = caches if caches is not None else (None,) * period

    def body(x, inputs):
        views: dict[int, View] = {}
        filled = []
        for layer, (params, cache) in enumerate(zip(*inputs, strict=True)):
            owner = cfg.sources[layer]
            x, _, views[owner], cache = _block(params, cfg, layer, x, where, cache, views.get(owner))
            filled.append(cache)
        return x, tuple(filled)

    assert len(stacked) == period
    if cfg.remat != "none":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if cfg.remat == "dots" else None
        body = jax.checkpoint(body, policy=policy)
    x, filled = jax.lax.scan(body, _open_residual(cfg, x), (stacked, empty))
    return _close_residual(cfg, x), filled if caches is not None else None
