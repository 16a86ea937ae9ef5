"""The planner: which layout should this model and cache have on these chips for this pass, and what will it cost?

    cfg, cache = size("palm-540b"), CacheConfig(dtype="bfloat16")
    p = plan(cfg, cache, chip="v4", chips=64, batch=64, context=2048, phase="decode", weights="int8")
    p.best.layout.name, p.best.mesh, p.best.seconds
    print(p.table())

Every layout is tried on every factorisation of the chips; `sharding.cost.prediction` predicts each. None of the
papers' rules (weight-stationary for few tokens, batch-sharded MQA in decode) is written here: they come out of the
model.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from rich.table import Table

from experiments.launching import command as launch
from kvattn import cache as caches
from kvattn import model, plan_report, spec
from kvattn.config import CacheConfig, ModelConfig
from kvattn.errors import UserError
from sharding import ShardingError, cost
from sharding.cost.hardware import CHIPS, Chip
from sharding.layout import layouts
from sharding.layout.layouts import Layout

# Pope et al., arXiv 2211.05102: mesh shapes by chip count in the authors' code.
DEFAULT_MESHES = {
    8: (2, 2, 2),
    16: (2, 4, 2),
    32: (4, 2, 4),
    64: (4, 4, 4),
    128: (8, 4, 4),
    256: (4, 8, 8),
    512: (8, 8, 8),
}
A_HAIR = 0.05  # a difference in time that the model cannot tell: it knows no latencies

# GPT-NeoX blocks are parallel in form but norm the stream twice, so it is gathered, and summed into, twice.
_RESIDUALS = {"serial": "serial", "parallel_palm": "parallel", "parallel_neox": "serial", "ladder": "ladder"}


# --- a config as a workload ----------------------------------------------------------------------------


def workload(cfg: ModelConfig, cache: CacheConfig, *, weights: str = "bfloat16", kv: str = "") -> cost.Workload:
    """The cost model's input, from the parameter table and the KV spec. `weights`: bfloat16 | int8; `kv`: a key of
    cost.KV_TYPES, the cache's dtype with its own scales when empty.

    Raises UserError: unknown type, a weight the cost model cannot place, a store that does not fit the model.
    """
    cfg = dataclasses.replace(cfg, scan_layers=False)
    stored, kv = not kv, kv or _kv_type(cache)
    for name, value, valid in (("weights", weights, cost.WEIGHT_BYTES), ("kv", kv, cost.KV_TYPES)):
        if value not in valid:
            raise UserError(f"{name} is {value!r}; choose one of {', '.join(valid)}.")
    caches.specs(cfg, cache, 1, 1)  # raises where the store does not fit the model
    count: dict[cost.Layer, int] = {}
    for layer in range(cfg.n_layers):
        one = _layer(cfg, cache, layer)
        count[one] = count.get(one, 0) + 1
    bits, scale = cost.KV_TYPES[kv]
    scale = 4 if stored and scale else scale  # codes as they are held here have float32 scales
    return cost.Workload(
        d_model=cfg.d_model,
        d_ff=cfg.d_ff,
        n_heads=cfg.n_heads,
        q_dim=cfg.head_dim,
        o_dim=cfg.v_head_dim,
        vocab=cfg.vocab_size,
        layers=tuple(dataclasses.replace(one, count=n) for one, n in count.items()),
        tied=cfg.tied_embeddings,
        gates=2 if "gate" in model.layer_specs(cfg, 0)["mlp"] else 1,
        residual=_RESIDUALS[cfg.residual],
        extra=spec.count(model.param_specs(cfg)["final_norm"]),
        weight_bytes=cost.WEIGHT_BYTES[weights],
        kv_bits=bits,
        kv_scale_bytes=scale,
        norm_means=1 if cfg.norm == "rmsnorm" else 2,
    )


def _kv_type(cache: CacheConfig) -> str:
    """The cache's dtype as the cost model names it."""
    return {"float8_e4m3fn": "fp8"}.get(cache.dtype, cache.dtype)


def _layer(cfg: ModelConfig, cache: CacheConfig, layer: int) -> cost.Layer:
    specs, owner, mask = model.layer_specs(cfg, layer), cfg.sources[layer], cfg.mask(layer)
    attn, mlp = specs["attn"], specs["mlp"]
    known = {"q", "k", "v", "o"}
    for name, leaf in attn.items():
        if spec.is_spec(leaf) and leaf.fan_in and name not in known:
            raise UserError(
                f"model.variant is {cfg.variant!r}, whose weight {name} the cost model cannot place; "
                "use a variant made of q, k, v and o."
            )
    size = {name: attn[name].size if name in attn else 0 for name in sorted(known)}
    placed = sum(size.values()) + sum(mlp[name].size for name in ("up", "gate", "down") if name in mlp)
    everything = sum(leaf.size for leaf in jax.tree.leaves(specs, is_leaf=spec.is_spec))
    ring = caches.layout(cfg, cache, owner, 1 << 40)
    return cost.Layer(
        count=1,
        owner=owner == layer,
        mlp_in=sum(mlp[name].size for name in ("up", "gate") if name in mlp),
        mlp_out=mlp["down"].size,
        leaves=tuple((name, heads, dim) for name, (heads, dim) in model.kv_specs(cfg)[owner].items()),
        visible=mask.window + mask.sinks,
        slots=ring[0] if ring[1] else 0,
        extra=everything - placed,
        norms=sum(name.endswith("_norm") for name in specs),
        kv_norm="kv_norm" in specs,
        **size,
    )


# --- what a command is given ---------------------------------------------------------------------------


def machine(slice_text: str, chip: str, chips: int) -> tuple[str, int]:
    """(chip, chips) of a slice such as v4:4x4x4, or as given where there is none. Raises UserError."""
    if not slice_text:
        return chip, chips
    where = launch.parse_slice(slice_text)
    return where.chip, where.chips


def parse_mesh(text: str) -> tuple[tuple[int, int, int], ...] | None:
    """`4x4x4` -> ((4, 4, 4),); None for an empty text. Raises UserError for anything else."""
    sides = text.split("x")
    if not text:
        return None
    if len(sides) != 3 or not all(side.isdecimal() and int(side) for side in sides):
        raise UserError(f"mesh is {text!r}; write it as XxYxZ, for example 4x4x4, with 1 for an unused axis.")
    x, y, z = map(int, sides)
    return ((x, y, z),)


def parse_layouts(texts: Iterable[str]) -> tuple[Layout, ...] | None:
    """Layouts by name; None for none. Raises ShardingError."""
    return tuple(layouts.parse(text) for text in texts) or None


# --- candidates ----------------------------------------------------------------------------------------


def factorisations(n: int) -> tuple[tuple[int, int, int], ...]:
    """Every (X, Y, Z) with X Y Z = n, in ascending order. Raises UserError for n below 1."""
    if n < 1:
        raise UserError(f"chips is {n}; it must be at least 1.")
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    return tuple((x, y, n // x // y) for x in divisors for y in divisors if n // x % y == 0)


def default_mesh(n: int) -> tuple[int, int, int]:
    """The paper's mesh for n chips, or for other n the factorisation nearest to a cube (large axes last)."""
    return DEFAULT_MESHES.get(n) or min(factorisations(n), key=lambda m: (max(m) / min(m), max(m), m))


def all_layouts() -> tuple[Layout, ...]:
    """Every FFN layout with every KV placement: heads over none, z, yz or xyz, each other axis of batch, context or a
    replica."""
    out = []
    for ffn, heads in itertools.product(layouts.FFN_LAYOUTS, range(len(layouts.AXES) + 1)):
        taken = layouts.ORDER[:heads]
        free = [a for a in layouts.AXES if a not in taken]
        for use in itertools.product(("batch", "seq", ""), repeat=len(free)):
            batch = tuple(a for a, u in zip(free, use, strict=True) if u == "batch")
            seq = tuple(a for a, u in zip(free, use, strict=True) if u == "seq")
            out.append(Layout(ffn, taken, batch, seq))
    return tuple(out)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One layout on one mesh (X, Y, Z). `prediction` is None, and `reason` says why, where the layout cannot be;
    a pass that is too large or too slow has both. `n_heads`: query heads, padded with zeros where need be."""

    layout: Layout
    mesh: tuple[int, int, int]
    n_heads: int
    prediction: cost.Prediction | None
    reason: str = ""
    overlap: str = "full"

    @property
    def seconds(self) -> float:
        """Predicted seconds of the pass under the plan's overlap."""
        return self.prediction.step_seconds(self.overlap) if self.prediction else math.inf


@dataclasses.dataclass(frozen=True)
class Request:
    """What a plan was asked for: one pass of `batch` sequences x `tokens` tokens ending at `context`, on `chips` of
    `chip`. `latency` in seconds, 0 = any."""

    chip: Chip
    chips: int
    batch: int
    context: int
    phase: str
    tokens: int
    weights: str = "bfloat16"
    kv: str = ""
    latency: float = 0.0
    overlap: str = "full"
    links: str = "all"
    pad_heads: bool = True


@dataclasses.dataclass(frozen=True)
class Plan:
    """`feasible`: each layout that fits, once, on its best mesh, in order of predicted time (equal to six digits: less
    memory, then less time on the links). `candidates`: every layout on every mesh. `changes`, when nothing is
    feasible: the smallest change of each kind that makes something fit."""

    request: Request
    n_heads: int
    feasible: tuple[Candidate, ...]
    candidates: tuple[Candidate, ...]
    changes: tuple[str, ...] = ()

    @property
    def infeasible(self) -> tuple[Candidate, ...]:
        """Those that cannot be, or are too large or too slow; each has a reason."""
        return tuple(c for c in self.candidates if c.reason)

    @property
    def best(self) -> Candidate:
        """The fastest. Raises UserError, with the nearest change, when nothing fits."""
        if not self.feasible:
            raise UserError(self.verdict().replace("No", "no", 1))
        return self.feasible[0]

    def table(self, rows: int = 12) -> Table:
        """The first `rows` feasible candidates."""
        return plan_report.table(self, rows)

    def refused(self, rows: int = 12) -> Table:
        """Layouts that are feasible on no mesh, with a reason each."""
        return plan_report.refused(self, rows)

    def verdict(self) -> str:
        """One sentence: the best candidate, or what would fit."""
        return plan_report.verdict(self)

    def as_dict(self, rows: int = 12) -> dict[str, Any]:
        """For JSON: the request, the first rows, the changes."""
        return plan_report.as_dict(self, rows)


def plan(
    cfg: ModelConfig,
    cache: CacheConfig,
    *,
    chip: str | Chip,
    chips: int,
    batch: int,
    context: int,
    phase: str,
    tokens: int = 0,
    weights: str = "bfloat16",
    kv: str = "",
    latency: float | None = None,
    overlap: str = "full",
    links: str = "all",
    pad_heads: bool = True,
    layouts: Iterable[Layout] | None = None,
    meshes: Iterable[tuple[int, int, int]] | None = None,
) -> Plan:
    """Every layout (default `all_layouts()`) on every mesh (default `factorisations(chips)`), predicted and sorted.

    `tokens` of each sequence in the pass: 0 = `context` in prefill, 1 in decode. `latency`: seconds the pass may
    take. `overlap` of the sorting: cost.OVERLAPS. With `pad_heads`, query heads that a layout does not divide are
    padded with zero heads, which leaves the logits as they are; the candidate says to how many, and pays for them.

    Raises UserError: unknown chip, phase, type or overlap, sizes below 1, meshes that are not the chips.
    """
    ask = Request(
        _chip(chip),
        chips,
        batch,
        context,
        phase,
        tokens or (1 if phase == "decode" else context),
        weights,
        kv,
        latency or 0.0,
        overlap,
        links,
        pad_heads,
    )
    _check(ask)
    tried = tuple(all_layouts() if layouts is None else layouts)
    shapes = tuple(factorisations(chips) if meshes is None else meshes)
    for shape in shapes:
        if math.prod(shape) != chips:
            raise UserError(
                f"mesh is {'x'.join(map(str, shape))} = {math.prod(shape)} chips, but chips is {chips}; "
                "make them equal."
            )
    found = tuple(_candidates(cfg, cache, ask, tried, shapes, {}, unique=meshes is None))
    order = sorted(
        (_mesh_of(group, chips) for group in _by_layout(found)),
        key=lambda c: (float(f"{c.seconds:.5e}"), c.prediction.memory_bytes, c.prediction.interconnect_seconds),
    )
    return Plan(ask, cfg.n_heads, tuple(order), found, () if order else _changes(cfg, cache, ask, tried))


def _by_layout(found: Iterable[Candidate]) -> list[list[Candidate]]:
    groups: dict[Layout, list[Candidate]] = {}
    for c in found:
        if not c.reason:
            groups.setdefault(c.layout, []).append(c)
    return list(groups.values())


def _mesh_of(group: list[Candidate], chips: int) -> Candidate:
    """Of one layout's meshes: those within A_HAIR of the fastest, and of them the default one, or the one with the
    least time on the links."""
    limit = min(c.seconds for c in group) * (1 + A_HAIR)
    best = default_mesh(chips)
    close = (c for c in group if c.seconds <= limit)
    return min(close, key=lambda c: (c.mesh != best, c.prediction.interconnect_seconds, c.seconds))


def _chip(chip: str | Chip) -> Chip:
    if isinstance(chip, str) and chip not in CHIPS:
        raise UserError(f"chip is {chip!r}; choose one of {', '.join(CHIPS)}, or pass a Chip.")
    return CHIPS[chip] if isinstance(chip, str) else chip


def _check(ask: Request) -> None:
    for name, valid in (("phase", cost.PHASES), ("overlap", cost.OVERLAPS), ("links", cost.LINKS)):
        if getattr(ask, name) not in valid:
            raise UserError(f"{name} is {getattr(ask, name)!r}; choose one of {', '.join(valid)}.")
    for name in ("chips", "batch", "context", "tokens"):
        if getattr(ask, name) < 1:
            raise UserError(f"{name} is {getattr(ask, name)}; it must be at least 1.")
    if ask.tokens > ask.context:
        raise UserError(f"tokens is {ask.tokens}, more than the context of {ask.context} they end at; raise context.")
    if ask.latency < 0:
        raise UserError(f"latency is {ask.latency}; it is a time in seconds, or 0 for any.")
    if ask.chips > ask.chip.max_chips:
        raise UserError(
            f"chips is {ask.chips}, but the links of {ask.chip.name} join {ask.chip.max_chips}; take no more."
        )


def _candidates(cfg, cache, ask: Request, tried, shapes, works: dict, *, unique: bool) -> Iterator[Candidate]:
    for shape in shapes:
        mesh = dict(zip(layouts.AXES, shape, strict=True))
        for layout in tried:
            if not unique or _is_canonical(layout, mesh):
                yield _candidate(cfg, cache, ask, layout, shape, works)


def _is_canonical(layout: Layout, mesh: dict[str, int]) -> bool:
    """Whether this is the one name of its program, given axes of one chip: they go with the batch if anything does,
    else with the context; 2D without x is 1D, and of two that gather the same the one named longer is meant."""
    x, y, z = (mesh[a] > 1 for a in layouts.AXES)
    own = {"ws_1d": True, "ws_2d": x, "wg_x": x and y, "wg_xy": (x or y) and z, "wg_xyz": x or y or z}
    if not own[layout.ffn]:
        return False
    kinds = (layout.kv_batch, layout.kv_seq)
    home = next((axes for axes in kinds if any(mesh[a] > 1 for a in axes)), ())
    for axis in (a for a in layouts.AXES if mesh[a] == 1):
        later = layouts.ORDER[layouts.ORDER.index(axis) + 1 :]
        heads = any(mesh[a] > 1 for a in later if a in layout.kv_heads)
        where = layout.kv_heads if heads else home
        named = axis in layout.kv_heads + layout.kv_batch + layout.kv_seq
        if (axis in where) != bool(where) or (named and axis not in where):
            return False
    return True


def _candidate(cfg, cache, ask: Request, layout: Layout, shape, works: dict) -> Candidate:
    heads = cfg.n_heads
    if ask.pad_heads:
        unit = math.lcm(cost.head_shards(layout, shape), cfg.n_k_heads, cfg.n_v_heads)
        heads = heads if heads % cost.head_shards(layout, shape) == 0 else -(-heads // unit) * unit
    if heads not in works:
        work = workload(dataclasses.replace(cfg, n_heads=heads), cache, weights=ask.weights, kv=ask.kv)
        works[heads] = dataclasses.replace(work, counted_params=spec.count(model.param_specs(cfg)))
    try:
        p = cost.predict(
            works[heads],
            layout,
            shape,
            ask.chip,
            phase=ask.phase,
            batch=ask.batch,
            tokens=ask.tokens,
            context=ask.context,
            links=ask.links,
        )
    except ShardingError as error:
        return Candidate(layout, shape, heads, None, str(error), ask.overlap)
    return Candidate(layout, shape, heads, p, _too_much(p, ask), ask.overlap)


def _too_much(p: cost.Prediction, ask: Request) -> str:
    try:
        cost.check_memory(p)
    except ShardingError as error:
        return str(error)
    seconds = p.step_seconds(ask.overlap)
    if ask.latency and seconds > ask.latency:
        return (
            f"{p.layout.name} takes {seconds * 1e3:.4g} ms, above the latency of {ask.latency * 1e3:.4g} ms; "
            "take more chips, fewer bits, a smaller batch or a shorter context."
        )
    return ""


# --- what would fit ------------------------------------------------------------------------------------


def _changes(cfg, cache, ask: Request, tried) -> tuple[str, ...]:
    """One sentence for each kind of change of which some size fits, tried on the default meshes."""
    kv = ask.kv or _kv_type(cache)
    doubled = [ask.chips << i for i in range(1, 8) if ask.chips << i <= ask.chip.max_chips]
    ways = [
        ("chips", doubled, "{} chips instead of " + str(ask.chips)),
        ("batch", _halves(ask.batch), "batch {} instead of " + str(ask.batch)),
        ("weights", [w for w in ("int8",) if ask.weights != w], "{} weights"),
        ("kv", [t for t in ("bfloat16", "int8", "int4") if cost.KV_TYPES[t] < cost.KV_TYPES[kv]], "{} cache"),
        ("context", _halves(ask.context), "context {} instead of " + str(ask.context)),
    ]
    out = []
    for field, values, text in ways:
        for value in values:
            changed = dataclasses.replace(ask, **{field: value})
            if field == "context":
                changed = dataclasses.replace(changed, tokens=value if ask.tokens == ask.context else ask.tokens)
            if changed.tokens <= changed.context and _fits(cfg, cache, changed, tried):
                out.append(text.format(value))
                break
    return tuple(out)


def _halves(value: int) -> list[int]:
    return [value >> i for i in range(1, value.bit_length())]


def _fits(cfg, cache, ask: Request, tried) -> bool:
    found = _candidates(cfg, cache, ask, tried, (default_mesh(ask.chips),), {}, unique=False)
    return any(not c.reason for c in found)
