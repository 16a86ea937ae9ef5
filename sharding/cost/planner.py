"""The planner: which layout should a model have on these chips for this pass, and what will it cost?

    p = plan(workload_of, 48, chip="v4", chips=64, batch=64, context=2048, phase="decode", weights="int8")
    p.best.layout.name, p.best.mesh, p.best.seconds
    print(p.table())

`workload_of(n)` is the model with n query heads. Every layout is tried on every factorisation of the chips;
`sharding.cost.prediction` predicts each. None of the papers' rules (weight-stationary for few tokens, batch-sharded MQA
in decode) is written here: they come out of the model.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator

from sharding.cost import prediction
from sharding.cost.hardware import CHIPS, Chip
from sharding.cost.plan_report import Candidate, Plan, Request
from sharding.cost.prediction import LINKS, OVERLAPS, PHASES, Prediction
from sharding.cost.slices import default_mesh, factorisations
from sharding.cost.workload import KV_TYPES, WEIGHT_BYTES, Workload
from sharding.layout import torus_layouts
from sharding.layout.rules import ShardingError
from sharding.layout.torus_layouts import Layout

A_HAIR = 0.05  # a difference in time that the model cannot tell: it knows no latencies


# --- candidates ----------------------------------------------------------------------------------------


def all_layouts() -> tuple[Layout, ...]:
    """Every FFN layout with every KV placement: heads over none, z, yz or xyz, each other axis of batch, context or a
    replica."""
    out = []
    for ffn, heads in itertools.product(torus_layouts.FFN_LAYOUTS, range(len(torus_layouts.AXES) + 1)):
        taken = torus_layouts.ORDER[:heads]
        free = [a for a in torus_layouts.AXES if a not in taken]
        for use in itertools.product(("batch", "seq", ""), repeat=len(free)):
            batch = tuple(a for a, u in zip(free, use, strict=True) if u == "batch")
            seq = tuple(a for a, u in zip(free, use, strict=True) if u == "seq")
            out.append(Layout(ffn, taken, batch, seq))
    return tuple(out)


def plan(
    workload_of: Callable[[int], Workload],
    n_heads: int,
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

    `workload_of(n)`: the model with n query heads; `n_heads`: how many it has of its own. `weights`: a key of
    WEIGHT_BYTES; `kv`: a key of KV_TYPES, the workload's own when empty.
    `tokens` of each sequence in the pass: 0 = `context` in prefill, 1 in decode. `latency`: seconds the pass may
    take. `overlap` of the sorting: OVERLAPS. With `pad_heads`, query heads that a layout does not divide are
    padded with zero heads, which leaves the logits as they are; the candidate says to how many, and pays for them.

    Raises ShardingError: unknown chip, phase, type or overlap, sizes below 1, meshes that are not the chips.
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
            raise ShardingError(
                f"mesh is {'x'.join(map(str, shape))} = {math.prod(shape)} chips, but chips is {chips}; "
                "make them equal."
            )
    model = _Model(workload_of, n_heads)
    found = tuple(_candidates(model, ask, tried, shapes, unique=meshes is None))
    order = sorted(
        (_mesh_of(group, chips) for group in _by_layout(found)),
        key=lambda c: (float(f"{c.seconds:.5e}"), c.prediction.memory_bytes, c.prediction.interconnect_seconds),
    )
    return Plan(ask, n_heads, tuple(order), found, () if order else _changes(model, ask, tried))


class _Model:
    """The model by its number of query heads, in the types that a request asks for; each is made once."""

    def __init__(self, workload_of: Callable[[int], Workload], n_heads: int):
        self.workload_of, self.n_heads = workload_of, n_heads
        self.own = workload_of(n_heads)
        self.made = {n_heads: self.own}

    def padded(self, layout: Layout, shape: tuple[int, int, int]) -> int:
        """Query heads that a layout divides, a multiple of the K and V heads."""
        shards = prediction.head_shards(layout, shape)
        unit = math.lcm(shards, self.own.k_heads or 1, self.own.v_heads or 1)
        return self.n_heads if self.n_heads % shards == 0 else -(-self.n_heads // unit) * unit

    def typed(self, n_heads: int, ask: "Request") -> Workload:
        """The model with `n_heads`, whose padding counts in its cost and not in MFU."""
        if n_heads not in self.made:
            self.made[n_heads] = self.workload_of(n_heads)
        work = self.made[n_heads]
        bits, scale = KV_TYPES[ask.kv] if ask.kv else (work.kv_bits, work.kv_scale_bytes)
        return dataclasses.replace(
            work,
            weight_bytes=WEIGHT_BYTES[ask.weights],
            kv_bits=bits,
            kv_scale_bytes=scale,
            counted_params=self.own.n_params,
        )


def _by_layout(found: Iterable[Candidate]) -> list[list[Candidate]]:
    groups: dict[Layout, list[Candidate]] = {}
    for c in found:
        if not c.reason:
            groups.setdefault(c.layout, []).append(c)
    return list(groups.values())


def _mesh_of(group: list[Candidate], chips: int) -> Candidate:
    """Picks one layout's mesh: among the meshes within A_HAIR of the fastest the default one, else the mesh with the
    least time on the links."""
    limit = min(c.seconds for c in group) * (1 + A_HAIR)
    best = default_mesh(chips)
    close = (c for c in group if c.seconds <= limit)
    return min(close, key=lambda c: (c.mesh != best, c.prediction.interconnect_seconds, c.seconds))


def _chip(chip: str | Chip) -> Chip:
    if isinstance(chip, str) and chip not in CHIPS:
        raise ShardingError(f"chip is {chip!r}; choose one of {', '.join(CHIPS)}, or pass a Chip.")
    return CHIPS[chip] if isinstance(chip, str) else chip


def _check(ask: Request) -> None:
    for name, valid in (("phase", PHASES), ("overlap", OVERLAPS), ("links", LINKS)):
        if getattr(ask, name) not in valid:
            raise ShardingError(f"{name} is {getattr(ask, name)!r}; choose one of {', '.join(valid)}.")
    for name, types in (("weights", WEIGHT_BYTES), ("kv", KV_TYPES)):
        if getattr(ask, name) not in types and (name, ask.kv) != ("kv", ""):
            raise ShardingError(f"{name} is {getattr(ask, name)!r}; choose one of {', '.join(types)}.")
    for name in ("chips", "batch", "context", "tokens"):
        if getattr(ask, name) < 1:
            raise ShardingError(f"{name} is {getattr(ask, name)}; it must be at least 1.")
    if ask.tokens > ask.context:
        raise ShardingError(
            f"tokens is {ask.tokens}, more than the context of {ask.context} they end at; raise context."
        )
    if ask.latency < 0:
        raise ShardingError(f"latency is {ask.latency}; it is a time in seconds, or 0 for any.")
    if ask.chips > ask.chip.max_chips:
        raise ShardingError(
            f"chips is {ask.chips}, but the links of {ask.chip.name} join {ask.chip.max_chips}; take no more."
        )


def _candidates(model: _Model, ask: Request, tried, shapes, *, unique: bool) -> Iterator[Candidate]:
    for shape in shapes:
        mesh = dict(zip(torus_layouts.AXES, shape, strict=True))
        for layout in tried:
            if not unique or _is_canonical(layout, mesh):
                yield _candidate(model, ask, layout, shape)


def _is_canonical(layout: Layout, mesh: dict[str, int]) -> bool:
    """Whether a layout bears the only name of its program that is tried. Axes of one chip go with the batch if
    anything does, else with the context; 2D without x is 1D; of two layouts that gather the same, the longer name is
    tried."""
    x, y, z = (mesh[a] > 1 for a in torus_layouts.AXES)
    own = {"ws_1d": True, "ws_2d": x, "wg_x": x and y, "wg_xy": (x or y) and z, "wg_xyz": x or y or z}
    if not own[layout.ffn]:
        return False
    kinds = (layout.kv_batch, layout.kv_seq)
    home = next((axes for axes in kinds if any(mesh[a] > 1 for a in axes)), ())
    for axis in (a for a in torus_layouts.AXES if mesh[a] == 1):
        later = torus_layouts.ORDER[torus_layouts.ORDER.index(axis) + 1 :]
        heads = any(mesh[a] > 1 for a in later if a in layout.kv_heads)
        where = layout.kv_heads if heads else home
        named = axis in layout.kv_heads + layout.kv_batch + layout.kv_seq
        if (axis in where) != bool(where) or (named and axis not in where):
            return False
    return True


def _candidate(model: _Model, ask: Request, layout: Layout, shape: tuple[int, int, int]) -> Candidate:
    heads = model.padded(layout, shape) if ask.pad_heads else model.n_heads
    work = model.typed(heads, ask)
    try:
        p = prediction.predict(
            work,
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


def _too_much(p: Prediction, ask: Request) -> str:
    try:
        prediction.check_memory(p)
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


def _changes(model: _Model, ask: Request, tried) -> tuple[str, ...]:
    """One sentence for each kind of change of which some size fits, tried on the default meshes."""
    bits = model.typed(model.n_heads, ask).kv_bits
    doubled = [ask.chips << i for i in range(1, 8) if ask.chips << i <= ask.chip.max_chips]
    ways = [
        ("chips", doubled, "{} chips instead of " + str(ask.chips)),
        ("batch", _halves(ask.batch), "batch {} instead of " + str(ask.batch)),
        ("weights", [w for w in ("int8",) if ask.weights != w], "{} weights"),
        ("kv", [t for t in ("bfloat16", "int8", "int4") if KV_TYPES[t][0] < bits], "{} cache"),
        ("context", _halves(ask.context), "context {} instead of " + str(ask.context)),
    ]
    out = []
    for field, values, text in ways:
        for value in values:
            changed = dataclasses.replace(ask, **{field: value})
            if field == "context":
                changed = dataclasses.replace(changed, tokens=value if ask.tokens == ask.context else ask.tokens)
            if changed.tokens <= changed.context and _fits(model, changed, tried):
                out.append(text.format(value))
                break
    return tuple(out)


def _halves(value: int) -> list[int]:
    return [value >> i for i in range(1, value.bit_length())]


def _fits(model: _Model, ask: Request, tried) -> bool:
    found = _candidates(model, ask, tried, (default_mesh(ask.chips),), unique=False)
    return any(not c.reason for c in found)
