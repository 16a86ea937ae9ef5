"""Prefill and decode over a torus of chips, in any layout of sharding/layout/torus_layouts.py.

    layout = torus_layouts.parse("ws_2d/by_batch:xyz")
    program = build(cfg, cache, layout, mesh, phase="decode", batch=64, context=2048, weights="int8")
    compiled = program.lower().compile()

The program is the model's own forward pass. With overlap "none", "one_way" or "two_way" it is the body of a
`jax.shard_map` whose collectives are written out (sharding/layout/manual.py, collective_matmul.py); with "compiler" the
same layout is given as constraints and the compiler inserts them. Prefill and decode may have different
layouts: weights of ws_2d and wg_* are stored alike, and prefill writes the cache in the layout that decode reads.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format
from jax.experimental.layout import Layout as Tiling
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvattn import cache as caches_lib
from kvattn import int8_weights as weights_lib
from kvattn import model, spec
from kvattn.attention import gate, target
from kvattn.attention.heads import plain_heads
from kvattn.config import CacheConfig, ModelConfig, period
from kvattn.errors import UserError
from sharding import reshard, use_manual, use_rules
from sharding.layout import torus_layouts
from sharding.layout.apply import multiply, partition_spec
from sharding.layout.rules import Rules
from sharding.layout.torus_layouts import Layout

PHASES = ("prefill", "decode")
OVERLAPS = ("none", "one_way", "two_way", "compiler")


@dataclasses.dataclass(frozen=True)
class Program:
    """fn(params, tokens, positions, caches) -> (logits[B,W] f32, caches), its abstract arguments with shardings, where
    the results live, and which arguments to donate (the caches)."""

    fn: Callable
    args: tuple[Any, ...]
    out_shardings: Any
    donate_argnums: tuple[int, ...]
    rules: Rules

    def lower(self, free_layouts: bool = False) -> Any:
        """`jax.jit(fn).lower(...)`, compiled to update the caches in place.

        Where results live is said, so that each cache is paired with its own result: left open, XLA pairs donated
        buffers with any result of their size, and copies. `free_layouts` lets the compiler choose how each matmul
        weight is tiled in memory (a checkpoint is loaded once, and decode would re-tile it in every step); not the
        embedding table, which is looked up and, tied, multiplied: the search takes longer than all the rest.
        """
        shardings = jax.tree.map(lambda a: a.sharding, self.args)
        args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), self.args)
        if free_layouts:
            free = {
                name: jax.tree.map(lambda s: Format(Tiling.AUTO, s), shardings[0][name])
                for name in ("layers", "unembed")
                if name in shardings[0]
            }
            shardings = ({**shardings[0], **free}, *shardings[1:])
        jitted = jax.jit(
            self.fn, in_shardings=shardings, out_shardings=self.out_shardings, donate_argnums=self.donate_argnums
        )
        return jitted.lower(*args)


def rules_for(cfg: ModelConfig, layout: Layout, mesh: Any, batch: int, slots: tuple[int, ...] = ()) -> Rules:
    """The rule table of `layout` for this model and batch. `slots`: slots of the caches, which by_seq splits.

    Raises ShardingError where the layout does not fit.
    """
    dims = dims_of(cfg, batch)
    table: Rules = {}
    for count in slots or (0,):
        table = torus_layouts.rules(layout, dict(mesh.shape), {**dims, "slots": count})
    return table


def dims_of(cfg: ModelConfig, batch: int) -> dict[str, int]:
    """Sizes of every dim that a rule table of torus_layouts splits, for a pass of `batch` sequences."""
    sizes = {"embed": cfg.d_model, "mlp": cfg.d_ff, "vocab": cfg.vocab_size, "batch": batch}
    return sizes | _heads(cfg)


def _heads(cfg: ModelConfig) -> dict[str, int]:
    """Heads that a layout may split, of all layers: query heads of the parameters, K and V heads of the leaves (V of a
    leaf that is both). Layers that differ give their greatest common divisor; 1 where no layer has any."""
    specs = jax.tree.leaves(model.param_specs(model.unscanned(cfg)), is_leaf=spec.is_spec)
    found = {
        "q_heads": [s.shape[s.axes.index("q_heads")] for s in specs if "q_heads" in s.axes],
        "k_heads": [],
        "v_heads": [],
    }
    for leaves in model.leaves(cfg):
        for leaf in caches_lib.token_leaves(leaves or {}).values():
            for name, roles in (("k_heads", ("key", "both")), ("v_heads", ("value", "both"))):
                found[name] += [leaf.shape[0]] if leaf.role in roles else []
    return {name: math.gcd(*sizes) or 1 for name, sizes in found.items()}


def param_axes(cfg: ModelConfig, kind: str) -> Any:
    """Logical axes of every parameter; kind: float32, bfloat16 or int8."""
    table = weights_lib.quantized_specs(cfg) if kind == "int8" else model.param_specs(model.unscanned(cfg))
    return spec.map_specs(lambda s: _Axes(s.axes), table)


class _Axes(tuple):
    """A leaf: the logical axes of one array."""


def build(
    cfg: ModelConfig,
    cache: CacheConfig,
    layout: Layout | str,
    mesh: Mesh,
    *,
    phase: str,
    batch: int,
    context: int,
    tokens: int = 0,
    weights: str = "bfloat16",
    overlap: str = "none",
    scan: bool = False,
) -> Program:
    """The program of one pass and its abstract arguments.

    decode   one token per sequence, caches of `context` slots
    prefill  `tokens` per sequence (0 = context) into empty caches of `context` slots

    `scan` (prefill only) makes the layers one loop over stacked weights and caches (stacking.stack_layers,
    stacking.stack_caches): a deep model then compiles in the time of one period.

    Raises UserError: unknown phase or overlap, tokens beyond the context; ShardingError: a layout that does not
    fit the model, the mesh or the batch.
    """
    if phase not in PHASES:
        raise UserError(f"phase is {phase!r}; choose one of {', '.join(PHASES)}.")
    if overlap not in OVERLAPS:
        raise UserError(f"overlap is {overlap!r}; choose one of {', '.join(OVERLAPS)}.")
    layout = torus_layouts.parse(layout) if isinstance(layout, str) else layout
    if scan and phase == "decode":
        raise UserError("scan is True for phase 'decode'; a scan over layers copies the cache, set it to False.")
    cfg = dataclasses.replace(cfg, scan_layers=False)
    length = 1 if phase == "decode" else tokens or context
    if length > context:
        raise UserError(f"tokens is {length} and context is {context}; the context must hold them.")
    held = _held(cfg, cache, batch, context)
    rules = rules_for(cfg, layout, mesh, batch, tuple(c.slots for c in held if c is not None))
    params, axes = weights_lib.abstract(cfg, weights), param_axes(cfg, weights)
    cache_axes = _cache_axes(cfg, held)
    if scan:
        cfg = dataclasses.replace(cfg, scan_layers=True)
        params, axes = {**params, "layers": _stacked(params["layers"], cfg)}, {**axes, "layers": _under(axes, cfg)}
        held, cache_axes = _stacked(held, cfg), _under({"layers": cache_axes}, cfg)
    everywhere = NamedSharding(mesh, PartitionSpec())
    places = (_places(params, axes, mesh, rules), everywhere, everywhere, _places(held, cache_axes, mesh, rules))
    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    step = functools.partial(_pass, cfg, phase == "prefill", mesh.devices.flat[0].platform)
    if overlap == "compiler":
        fn = _compiler(step, mesh, rules, places[3])
    else:
        fn = _manual(step, mesh, rules, overlap, places)
    args = tuple(
        jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), tree, place)
        for tree, place in zip((params, ids, ids, held), places, strict=True)
    )
    logits = NamedSharding(mesh, PartitionSpec(None, tuple(rules["act_vocab"]) or None))
    return Program(fn, args, (logits, places[3]), (3,), rules)


def _held(cfg: ModelConfig, cache: CacheConfig, batch: int, context: int) -> tuple[Any, ...]:
    """Abstract caches. Raises UserError for a store that has no sharded form."""
    if "paged" in cache.kinds:
        raise UserError(
            "cache.kinds has paged, which is not split over chips: a table does not say which chip "
            "holds a page; use full, ring or by_mask."
        )
    if cache.key_scale == "channel":
        raise UserError(
            "cache.key_scale is 'channel', which is not split over chips: all of a sequence's first tokens "
            "fix it; use token."
        )
    gate(cfg, cache, context)
    return caches_lib.specs(cfg, cache, batch, context)


def _cache_axes(cfg: ModelConfig, held: tuple[Any, ...]) -> tuple[Any, ...]:
    """The logical axes of every array of `held`, in its own form."""
    axes = tuple(None if c is None else caches_lib.axes(cfg, owner, c) for owner, c in enumerate(held))
    return jax.tree.map(_Axes, axes, is_leaf=lambda x: type(x) is tuple and all(isinstance(n, str | None) for n in x))


def _places(tree: Any, axes: Any, mesh: Mesh, rules: Rules) -> Any:
    """NamedShardings of ShapeDtypeStructs with the logical axes `axes`."""
    return jax.tree.map(lambda s, a: NamedSharding(mesh, partition_spec(a, rules, s.shape, mesh)), tree, axes)


def _stacked(layers: tuple[Any, ...], cfg: ModelConfig) -> tuple[Any, ...]:
    """Abstract leaves of a tuple over layers, as `stacking.stack_layers` stacks arrays."""
    size = period(cfg)
    count = cfg.n_layers // size
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct((count, *s.shape), s.dtype), tuple(layers[:size]))


def _under(axes: Any, cfg: ModelConfig) -> tuple[Any, ...]:
    """The axes of stacked layers."""
    return jax.tree.map(lambda a: _Axes(("layers", *a)), tuple(axes["layers"][: period(cfg)]))


def _pass(
    cfg: ModelConfig, empty: bool, platform: str, params: Any, tokens: jax.Array, positions: jax.Array, caches: Any
):
    """tokens, positions [B,T] (-1 = padding, on either side) -> (logits[B,W] at each row's last token, caches), for
    chips of `platform`."""
    inputs = model.Inputs(tokens, positions, empty=empty)
    with target.default(platform):
        x, caches, _ = model.hidden(params, cfg, inputs, caches=caches)
    if tokens.shape[1] > 1:
        last = reshard(jnp.argmax(positions, axis=1), (None,), ("res_batch",))
        x = jnp.take_along_axis(x, last[:, None, None], axis=1)
    return model.unembed(params, cfg, x)[:, 0], caches


def _manual(step: Callable, mesh: Mesh, rules: Rules, overlap: str, places: tuple[Any, ...]) -> Callable:
    specs = jax.tree.map(lambda place: place.spec, places)
    sizes = dict(mesh.shape)
    logits = PartitionSpec(None, tuple(rules["act_vocab"]) or None)

    def body(*args):
        with use_manual(sizes, rules, overlap):
            return step(*args)

    return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=(logits, specs[3]), check_vma=False)


def _compiler(step: Callable, mesh: Mesh, rules: Rules, caches_at: Any) -> Callable:
    def fn(*args):
        with use_rules(mesh, rules):
            logits, caches = step(*args)
        return logits, jax.lax.with_sharding_constraint(caches, caches_at)

    return fn


# --- what a decode step cannot do without ------------------------------------------------------------------


def build_floor(
    cfg: ModelConfig,
    cache: CacheConfig,
    layout: Layout | str,
    mesh: Mesh,
    *,
    batch: int,
    context: int,
    weights: str = "bfloat16",
) -> Program:
    """The weight matmuls and cache reads of a decode step alone, with the shapes one chip has in `layout`: no
    collectives, norms, rotation, softmax or cache writes. What the compiler estimates for it is the floor that
    `build(phase="decode")` is held against. fn(params, q, x, caches) -> a scalar.

    Raises as `build`; UserError for a variant that stores no plain k and v.
    """
    step = build(cfg, cache, layout, mesh, phase="decode", batch=batch, context=context, weights=weights)
    plain = plain_heads(cfg, "the floor of a decode step")
    if plain.tied_kv:
        raise UserError("model.tied_kv is True; the floor is written for plain k and v.")
    if any(leaf.lanes or leaf.scale is not None for leaf in step.args[3][0].leaves.values()):
        raise UserError(
            f"cache.dtype is {cache.dtype!r} and cache.layout {cache.layout!r}; the floor is written for "
            "rows of float32 or bfloat16."
        )
    sizes, rules = dict(mesh.shape), step.rules
    rows = batch // torus_layouts.parts(rules["act_batch"], sizes)
    width = cfg.d_model // torus_layouts.parts(rules["act_embed"], sizes)
    held = batch // torus_layouts.parts(rules["attn_batch"], sizes)
    heads = plain.n_heads // torus_layouts.parts(rules["attn_heads"], sizes)
    dtype = jax.tree.leaves(step.args[0]["final_norm"])[0].dtype
    everywhere = NamedSharding(mesh, PartitionSpec())
    inputs = [
        jax.ShapeDtypeStruct(s, dtype, sharding=everywhere)
        for s in ((held, 1, heads, plain.head_dim), (rows, 1, width))
    ]
    specs = jax.tree.map(lambda a: a.sharding.spec, step.args)
    body = functools.partial(_floor, cfg, plain.v_head_dim)
    fn = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(specs[0], PartitionSpec(), PartitionSpec(), specs[3]),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    return Program(fn, (step.args[0], *inputs, step.args[3]), everywhere, (), rules)


def _floor(cfg: ModelConfig, width: int, params: Any, q: jax.Array, x: jax.Array, caches: Any) -> jax.Array:
    """One chip: every matmul reads what an earlier one made, as in the model, so that none can be left out."""

    for layer, block in enumerate(params["layers"]):
        attn, owner = block["attn"], cfg.sources[layer]
        held = {name: leaf.values for name, leaf in caches[owner].leaves.items()}
        made = multiply(x, attn["q"])
        if owner == layer:
            made = made + jnp.max(multiply(x, attn["k"])) + jnp.max(multiply(x, attn["v"]))
        scores = jnp.einsum("btnh,bksh->btnks", q, held["k"].astype(q.dtype))
        seen = jnp.einsum("btnks,bksv->btnv", scores, held["v"].astype(q.dtype))
        made = made[..., :width] + jnp.max(seen)
        hidden = multiply(x, block["mlp"]["up"])
        if "gate" in block["mlp"]:
            hidden = hidden * multiply(x, block["mlp"]["gate"])
        x = multiply(hidden, block["mlp"]["down"]) + multiply(made, attn["o"], 2)
    table = params["embed"]["table"].T if cfg.tied_embeddings else params["unembed"]["table"]
    return jnp.max(multiply(x, table)).astype(jnp.float32)
