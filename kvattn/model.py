"""The decoder: parameter table, forward pass with and without caches, loop and scan over layers.

specs = param_specs(cfg)                      # one table: shapes, axes, initialisers
params = init(rng, cfg)
outputs, caches = forward(params, cfg, Inputs(tokens), caches=caches)
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from kvattn import cache as caches_lib
from kvattn import layers, masks, spec, stacking
from kvattn.attention import Softmax, gate, segments
from kvattn.attention.segments import Made, View, Where
from kvattn.config import CacheConfig, ModelConfig, period
from kvattn.errors import UserError
from kvattn.spec import ParamSpec
from kvattn.typed import shaped
from sharding import reduce, reshard, settle

COLLECTED = ("attention", "inputs", "kv_inputs", "queries")


@flax.struct.dataclass
class Inputs:
    """tokens[B,T] int32; positions[B,T] int32 absolute, -1 = padding (None = 0..T-1); segment_ids[B,T] int32 of
    packed batches, without caches only. `empty`: the caches are empty (first prefill chunk), so attention stays
    inside the chunk. `last_only`: logits of the last query position only, [B,1,W]. `commit` False: nothing is written
    to the caches; Outputs.pending says what would be. `memory`[B,S,D], with positions memory_positions[B,S] (None =
    0..S-1): an encoder's output, given to the first pass only where caches hold it afterwards."""

    tokens: jax.Array
    positions: jax.Array | None = None
    segment_ids: jax.Array | None = None
    empty: bool = flax.struct.field(pytree_node=False, default=False)
    last_only: bool = flax.struct.field(pytree_node=False, default=False)
    commit: bool = flax.struct.field(pytree_node=False, default=True)
    memory: jax.Array | None = None
    memory_positions: jax.Array | None = None


@flax.struct.dataclass
class Outputs:
    """logits[B,T,W] float32; collected: name -> tuple over layers of what `collect` asked for; pending: what a pass
    that committed nothing would have written, for `commit`."""

    logits: jax.Array
    collected: dict[str, tuple[Any, ...]]
    pending: Any = None


@flax.struct.dataclass
class Pending:
    """What one owner's tokens would leave: entries [B,heads,T,dim], x[B,T,D] that states are made from anew."""

    entries: dict[str, jax.Array]
    x: jax.Array | None


# --- parameters ----------------------------------------------------------------------------------------


def layer_specs(cfg: ModelConfig, layer: int) -> dict[str, Any]:
    """ParamSpecs of one block; one without attention has no norm in front of it."""
    owner = cfg.sources[layer] == layer
    attn = cfg.attention(layer).param_specs(cfg, owner)
    out: dict[str, Any] = {"mlp": layers.mlp_specs(cfg)} | ({"attn": attn} if attn else {})
    if cfg.norm_placement in ("pre", "both"):
        if attn or cfg.residual == "parallel_palm":
            out["attn_norm"] = layers.norm_specs(cfg)
        if cfg.residual != "parallel_palm":
            out["mlp_norm"] = layers.norm_specs(cfg)
    if cfg.norm_placement in ("post", "both"):
        if attn:
            out["attn_post_norm"] = layers.norm_specs(cfg)
        out["mlp_post_norm"] = layers.norm_specs(cfg)
    if cfg.kv_norm and owner and attn:
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
    size = period(cfg)
    repeats = cfg.n_layers // size
    out["layers"] = tuple(
        spec.map_specs(
            lambda s: ParamSpec((repeats, *s.shape), ("layers", *s.axes), s.init, s.scale, s.fan_in),
            layer_specs(cfg, layer),
        )
        for layer in range(size)
    )
    return out


def init(rng: jax.Array, cfg: ModelConfig, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Random parameters of the unscanned layout, stacked afterwards when cfg.scan_layers: loop and scan agree."""
    params = spec.init(rng, param_specs(unscanned(cfg)), dtype)
    return stacking.stack_layers(params, cfg) if cfg.scan_layers else params


def leaves(cfg: ModelConfig) -> tuple[dict[str, Any] | None, ...]:
    """Per layer {name: LeafSpec} of what an owner leaves in a cache, None for layers that own none."""
    return tuple(cfg.attention(layer).leaves(cfg) if layer in cfg.owners else None for layer in range(cfg.n_layers))


def create_caches(cfg: ModelConfig, store: CacheConfig, batch: int, capacity: int, tokens: Any = None) -> Any:
    """Empty caches (kvattn.cache.create) once the second gate has said that cfg's kernels can serve them. Raises as
    both."""
    gate(cfg, store, capacity)
    return caches_lib.create(cfg, store, batch, capacity, tokens)


# --- forward -------------------------------------------------------------------------------------------


def forward(
    params: dict[str, Any], cfg: ModelConfig, inputs: Inputs, *, caches: Any = None, collect: tuple[str, ...] = ()
) -> tuple[Outputs, Any]:
    """Logits of every position (or the last), and the caches with the tokens appended (None without caches).

    `collect` also returns, a tuple over layers each: `attention`, the output [B,T,D] before the residual add; `inputs`,
    what the attention reads [B,T,D]; `kv_inputs`, what K and V are made from (the same without kv_norm); `queries`,
    q[B,T,N,H] (None: no softmax). Raises UserError for segment ids or a memory where the model has no place for them.
    """
    x, caches, collected = hidden(params, cfg, inputs, caches=caches, collect=collect)
    if inputs.last_only:
        x = x[:, -1:]
    pending = collected.pop("pending", None)
    return Outputs(unembed(params, cfg, x), collected, pending), caches


def hidden(
    params: dict[str, Any], cfg: ModelConfig, inputs: Inputs, *, caches: Any = None, collect: tuple[str, ...] = ()
) -> tuple[jax.Array, Any, dict[str, tuple[Any, ...]]]:
    """Final hidden states [B,T,D] after the last norm, the caches, and what was collected."""
    _check(cfg, inputs, caches, collect)
    x = layers.embed(params, cfg, inputs.tokens)
    where = where_of(cfg, _positions(inputs.positions, inputs.tokens), inputs.segment_ids, inputs.empty, inputs.commit)
    this = Pass(where)
    if inputs.memory is not None:
        at = _positions(inputs.memory_positions, inputs.memory[:, :, 0])
        this = Pass(where, inputs.memory, where_of(cfg, at, None, True))
    if cfg.scan_layers:
        x, caches = _scan_layers(params["layers"], cfg, x, this, caches)
        collected: dict[str, tuple[Any, ...]] = {}
    else:
        x, caches, collected = _loop_layers(params["layers"], cfg, x, this, caches, collect)
    return layers.norm(params["final_norm"], cfg, x), caches, collected


def _positions(given: jax.Array | None, like: jax.Array) -> jax.Array:
    if given is not None:
        return given
    return jnp.broadcast_to(jnp.arange(like.shape[1], dtype=jnp.int32)[None, :], like.shape)


def _check(cfg: ModelConfig, inputs: Inputs, caches: Any, collect: tuple[str, ...]) -> None:
    if not cfg.layers:
        raise UserError("model.layers is (); name the layers, or a checkpoint that has them.")
    if caches is not None and inputs.segment_ids is not None:
        raise UserError("segment_ids were given together with caches; packed batches have no cache, pass one of them.")
    for name in collect:
        if name not in COLLECTED:
            raise UserError(f"collect has {name!r}; choose from {', '.join(COLLECTED)}.")
    reads = any(layer.reads == "memory" for layer in cfg.layers)
    if inputs.memory is not None and not reads:
        raise UserError("inputs have a memory and no layer of the model reads one; leave memory at None.")
    if reads and inputs.memory is None and (caches is None or inputs.empty):
        raise UserError("layers of the model read a memory and this pass has none to write; give inputs.memory.")
    if inputs.memory is not None and caches is not None and not (inputs.empty and inputs.commit):
        raise UserError(
            "inputs have a memory in a pass that is not the first, or commits nothing; a memory is written once, give "
            "it with empty and commit True."
        )
    if cfg.scan_layers and (collect or reads or not inputs.commit or (caches is not None and not inputs.empty)):
        raise UserError(
            "model.scan_layers is True with filled caches or collect; use stacking.unstack_layers and scan_layers "
            "False."
        )


@shaped
def unembed(params: dict[str, Any], cfg: ModelConfig, x: Float[Array, "B T D"]) -> Float32[Array, "B T W"]:
    """Hidden states [B,T,D] -> logits [B,T,W] float32."""
    return layers.unembed(params, cfg, x)


@dataclasses.dataclass(frozen=True)
class Pass:
    """What every layer is told: where the tokens are, and of a memory its values [B,S,D] and where those are."""

    where: Where
    memory: jax.Array | None = None
    memory_where: Where | None = None


@shaped
def where_of(
    cfg: ModelConfig,
    positions: Int32[Array, "B T"],
    segment_ids: Int32[Array, "B T"] | None,
    empty: bool,
    commit: bool = True,
) -> Where:
    """What the layers need to know of positions[B,T] (-1 = padding)."""

    def place(x, batch):
        return None if x is None else reshard(x, (None, None), (batch, None))

    wanted = {(layer.rope, dim): None for layer in cfg.layers for dim in layer.attention.rotary_dims()}

    def tables(here):
        return {(rope, dim): layers.rope_table(rope, dim, jnp.maximum(here, 0)) for rope, dim in wanted}

    def tokens(batch):
        return masks.Tokens(place(positions, batch), place(segment_ids, batch))

    q_here, made = place(positions, "act_batch"), tokens("k_batch")
    q_tables = tables(q_here)
    k_tables = q_tables if made.positions is q_here else tables(made.positions)
    return Where(q_tables, k_tables, made, tokens("own_batch"), tokens("attn_batch"), empty, commit)


def _loop_layers(blocks, cfg, x, this, caches, collect):
    views: dict[int, View] = {}
    new_caches = list(caches) if caches is not None else None
    gathered: dict[str, list[Any]] = {name: [] for name in collect}
    pending: list[Any] = [None] * cfg.n_layers
    asked = (*collect, *(() if this.where.commit else ("pending",)))

    def block(params, x, cache, view, layer):
        return _block(params, cfg, layer, x, this, cache, view, asked)

    block = _rematerialised(block, cfg.remat)
    x = _open_residual(cfg, x)
    for layer, params in enumerate(blocks):
        owner = cfg.sources[layer]
        cache = caches[owner] if caches is not None and owner == layer else None
        x, view, cache, seen = block(params, x, cache, views.get(owner), layer)
        views[owner] = view
        if new_caches is not None and owner == layer:
            new_caches[layer] = cache
        for name in collect:
            gathered[name].append(seen[name])
        pending[layer] = seen.get("pending")
    collected = {name: tuple(values) for name, values in gathered.items()}
    if not this.where.commit:
        collected["pending"] = tuple(pending)
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


def _block(params, cfg, layer, x, this, cache, view, asked=()):
    """One block: returns (x, the view its readers share, the owner's new cache, what was asked for by name).

    A ladder (arXiv 2501.06589) adds every output one sub-module late: x_i = x_0 + sum of y_j, j <= i - 2, so that the
    sum of y_{i-1} over the chips runs beside sub-module i.
    """
    x, late = x if cfg.residual == "ladder" else (x, None)
    h = _enter(params, "attn_norm", cfg, x)
    h_kv = _enter(params, "kv_norm", cfg, x) if "kv_norm" in params else h
    attended, view, cache, seen = attend_layer(params.get("attn", {}), cfg, layer, h, h_kv, this, cache, view, asked)
    if cfg.residual == "parallel_palm":  # one sum over the chips for both outputs
        out = _leave(layers.mlp(params["mlp"], cfg, h) + attended)
        return x + out, view, cache, _collected(seen, attended, asked)
    attended = _leave(attended, params, "attn_post_norm", cfg)
    seen = _collected(seen, attended, asked)
    if cfg.residual == "serial":
        x = x + attended
    elif cfg.residual == "ladder":
        x = x + late
    out = layers.mlp(params["mlp"], cfg, _enter(params, "mlp_norm", cfg, x))
    out = _leave(out, params, "mlp_post_norm", cfg)
    if cfg.residual == "ladder":
        return (x + attended, out), view, cache, seen
    x = x + out if cfg.residual == "serial" else x + attended + out
    return x, view, cache, seen


def _collected(seen: dict[str, Any], attended: jax.Array, asked: tuple[str, ...]) -> dict[str, Any]:
    return seen | {"attention": attended} if "attention" in asked else seen


def _enter(params, norm: str, cfg: ModelConfig, x: jax.Array) -> jax.Array:
    """x[B,T,D] of the residual stream -> what a sub-module reads, normed where the block has that norm."""
    x = layers.norm(params[norm], cfg, x) if norm in params else x
    return settle(reshard(x, layers.RESIDUAL, layers.BLOCK))


def _leave(out: jax.Array, params: Any = (), norm: str = "", cfg: ModelConfig | None = None) -> jax.Array:
    """Ends the open sum of a sub-module's output [B,T,D]; normed where the block has that norm."""
    out = reduce(out, "mlp", layers.BLOCK, layers.RESIDUAL)
    return layers.norm(params[norm], cfg, out) if norm in params else out


def attend_layer(params, cfg, layer, h, h_kv, this, cache, view, asked=()):
    """Attention of one layer: h[B,T,D] (h_kv for K and V) -> ([B,T,D], view, cache, what was asked for).

    An owner produces entries and makes the view; a reader is given its owner's. The result is summed over the
    chips that split the heads by `sharding.reduce`.
    """
    family, where, seen = cfg.attention(layer), this.where, {}
    if cfg.sources[layer] == layer:
        if cfg.layer(layer).reads == "memory":
            view, cache = _memory(params, cfg, layer, this, cache)
        else:
            state = _state_before(cfg, layer, h_kv, cache)
            made = family.entries(params, cfg, layer, h_kv, where, state)
            view, cache = segments.view(family, cfg, cfg.layer(layer), made, where, cache)
            if "pending" in asked:
                seen["pending"] = Pending(made.entries, h_kv if made.state else None)
    seen |= {name: x for name, x in (("inputs", h), ("kv_inputs", h_kv)) if name in asked}
    if "queries" in asked:
        seen["queries"] = family.queries(params, cfg, layer, h, where) if isinstance(family, Softmax) else None
    return family.attend(params, cfg, layer, h, where, view), view, cache, seen


def _state_before(cfg: ModelConfig, layer: int, x: jax.Array, cache: Any) -> dict[str, jax.Array]:
    """The states [B, ...] that tokens x[B,T,D] meet: the cache's, in the rows that entries are made in, or zeros."""
    declared = caches_lib.states(cfg.attention(layer).leaves(cfg))
    if cache is not None:
        held = {name: s for part, _ in caches_lib.parts(cache) for name, s in part.state.items()}
        return {
            n: reshard(s, ("cache_batch", *declared[n].axes), ("k_batch", *declared[n].axes)) for n, s in held.items()
        }
    return {name: jnp.zeros((x.shape[0], *leaf.shape), leaf.dtype or jnp.float32) for name, leaf in declared.items()}


def _memory(params, cfg, layer, this, cache):
    """(view, cache) of a layer that reads a memory: written where this pass has one, read only where it has not."""
    family, value = cfg.attention(layer), cfg.layer(layer)
    if this.memory is None:
        return segments.read_only(value, cache), cache
    made = family.entries(params, cfg, layer, this.memory, this.memory_where, {})
    return segments.view(family, cfg, value, made, this.memory_where, cache)


@shaped
def commit(
    params: Any,
    cfg: ModelConfig,
    caches: Any,
    pending: Any,
    positions: Int32[Array, "B T"],
    accepted: Int32[Array, " B"],
) -> tuple[Any, ...]:
    """Caches with the first accepted[B] of a pass's T tokens at positions[B,T] written: what a pass with commit False
    left in Outputs.pending. Rings and states, which cannot be truncated, go on from there too."""
    kept = jnp.arange(positions.shape[1], dtype=jnp.int32)[None, :] < accepted[:, None]
    at = jnp.where(kept, positions, -1)
    where = where_of(cfg, at, None, False)
    out = list(caches)
    for layer in cfg.owners:
        if pending[layer] is None:
            continue
        family, held = cfg.attention(layer), pending[layer]
        made = Made(held.entries)
        if held.x is not None:
            state = _state_before(cfg, layer, held.x, caches[layer])
            made = family.entries(params["layers"][layer]["attn"], cfg, layer, held.x, where, state)
        _, out[layer] = segments.view(family, cfg, cfg.layer(layer), made, where, caches[layer])
    return tuple(out)


# --- scan over layers ----------------------------------------------------------------------------------


def unscanned(cfg: ModelConfig) -> ModelConfig:
    """cfg with its layers in a loop."""
    return dataclasses.replace(cfg, scan_layers=False)


def _scan_layers(stacked, cfg, x, this, caches):
    """The blocks as a scan over periods. Caches (stacking.stack_caches) are filled, not read: a first prefill."""
    size = period(cfg)
    empty = caches if caches is not None else (None,) * size

    def body(x, inputs):
        views: dict[int, View] = {}
        filled = []
        for layer, (params, cache) in enumerate(zip(*inputs, strict=True)):
            owner = cfg.sources[layer]
            x, views[owner], cache, _ = _block(params, cfg, layer, x, this, cache, views.get(owner))
            filled.append(cache)
        return x, tuple(filled)

    assert len(stacked) == size
    if cfg.remat != "none":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if cfg.remat == "dots" else None
        body = jax.checkpoint(body, policy=policy)
    x, filled = jax.lax.scan(body, _open_residual(cfg, x), (stacked, empty))
    return _close_residual(cfg, x), filled if caches is not None else None
