"""The analytical cost of one pass of a decoder over a torus of chips: seconds, bytes and memory, before any compiler.

The model of Pope et al., arXiv 2211.05102, section 2, per chip:

    compute       FLOPs / peak                                       (2 per weight and token, plus attention)
    memory        (weights + K, V read and written) / HBM bandwidth
    interconnect  sum over collectives of D (K-1)/K / link bandwidth

A pass takes at least the largest of the three, when all of it overlaps (the paper's looped collectives), and at most
their sum. Cost is chip-seconds per token. What crosses the links is derived in `sharding.cost.traffic`, from the same
rule table that the program is built from; what is in a model, in `sharding.cost.workload`.

    work = kvattn.plan.workload(size("palm-540b", n_heads=64), cache, weights="int8")
    p = predict(work, parse("ws_2d/by_batch:xyz"), (4, 4, 4), "v4", phase="decode", batch=64, tokens=1, context=2048)
    p.step_seconds("full"), p.interconnect_bytes["ffn"], p.memory_bytes

Conventions: attention is charged for every key in view, the square in prefill, as `kvattn.account.flops`; K and V are
read once per pass and reader layer (a reader of a shared cache reads it again: sharing saves capacity, not traffic,
arXiv 2405.12981); gathered weights are written to and read back from HBM; activations are not charged to HBM time.
"""

import dataclasses
import math
from collections.abc import Mapping

from sharding.cost import traffic
from sharding.cost.hardware import CHIPS, Chip
from sharding.cost.traffic import PURPOSES, Collective, sizes
from sharding.cost.workload import Layer, Leaf, Weight, Workload
from sharding.layout.rules import Rules, ShardingError
from sharding.layout.torus_layouts import Layout, parts, rules

PHASES = ("prefill", "decode")
OVERLAPS = ("full", "memory", "none")
LINKS = ("all", "axes")


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One pass, per chip. Bytes and seconds; `tokens` = B x T of the whole pass.

    flops               matmul and attention FLOPs
    hbm_bytes           weights | gathered | kv_read | kv_written -> bytes
    collectives         every collective, D in elements; `interconnect_bytes` sums what crosses the links
    weight_memory, cache_memory, activation_memory   bytes held; the last an estimate of the peak, with attention and
                        collective matmuls in tiles and one gathered weight shard in flight
    """

    layout: Layout
    mesh: Mapping[str, int]
    chip: Chip
    tokens: int
    counted_params: int
    residual: str
    flops: float
    hbm_bytes: Mapping[str, float]
    collectives: tuple[Collective, ...]
    element_bytes: Mapping[str, float]
    interconnect_seconds: float
    edge_seconds: float
    weight_memory: float
    cache_memory: float
    activation_memory: float

    @property
    def chips(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def compute_seconds(self) -> float:
        return self.flops / self.chip.peak_flops

    @property
    def hbm_seconds(self) -> float:
        return sum(self.hbm_bytes.values()) / self.chip.hbm_bandwidth

    @property
    def interconnect_bytes(self) -> dict[str, float]:
        """Bytes that cross the links of one chip, by purpose."""
        out = dict.fromkeys(PURPOSES, 0.0)
        for c in self.collectives:
            out[c.purpose] += c.wire * self.element_bytes[c.dtype]
        return out

    @property
    def memory_bytes(self) -> float:
        """Weights, cache and activations held by one chip."""
        return self.weight_memory + self.cache_memory + self.activation_memory

    def step_seconds(self, overlap: str = "full") -> float:
        """Seconds of the pass. `full`: the largest of compute, HBM and interconnect; `memory`: HBM behind compute,
        collectives blocking; `none`: their sum. A ladder block hides the residual stream's collectives behind the
        next module whatever the overlap (arXiv 2501.06589). Raises ShardingError for another name."""
        _choice(overlap, OVERLAPS, "overlap")
        compute, hbm, links = self.compute_seconds, self.hbm_seconds, self.interconnect_seconds
        if overlap == "full":
            return max(compute, hbm, links)
        work = compute + hbm if overlap == "none" else max(compute, hbm)
        if self.residual == "ladder":
            return max(work, self.edge_seconds) + links - self.edge_seconds
        return work + links

    def mfu(self, overlap: str = "full") -> float:
        """2 N tokens / (seconds x chips x peak)."""
        return mfu(self.counted_params, self.tokens, self.step_seconds(overlap), self.chips, self.chip.peak_flops)

    def chip_seconds_per_token(self, overlap: str = "full") -> float:
        """The cost: chips x seconds / tokens."""
        return self.chips * self.step_seconds(overlap) / self.tokens


def mfu(params: float, tokens: float, seconds: float, chips: int, peak_flops: float) -> float:
    """Model FLOPs utilisation, section 2: 2 N tokens / (seconds x chips x peak)."""
    return 2 * params * tokens / (seconds * chips * peak_flops)


def predict(
    work: Workload,
    layout: Layout,
    mesh_shape,
    chip: str | Chip,
    *,
    phase: str,
    batch: int,
    tokens: int,
    context: int,
    links: str = "all",
) -> Prediction:
    """One pass of `batch` sequences x `tokens` tokens each (decode: 1) that end at `context` tokens.

    `mesh_shape` is (X, Y, Z) or {x, y, z}. A pass of more than one token that starts a sequence (tokens = context)
    attends inside itself, queries in the layout the projections leave them in; any other attends over the cache in
    the cache's layout. `links`: `all` gives a collective the whole chip's bandwidth, as the paper; `axes` only that
    of as many torus axes as the collective has mesh axes.

    Raises ShardingError: unknown chip, phase or links; sizes below 1; more chips than the links join; a dim, head
    count, batch or cache that the layout cannot divide. Memory is reported, not checked (`check_memory`).
    """
    row, mesh = _chip(chip), sizes(mesh_shape)
    n = math.prod(mesh.values())
    _check(row, n, phase=phase, batch=batch, tokens=tokens, context=context, links=links)
    table = _table(work, layout, mesh, batch, context)
    own = tokens > 1 and tokens == context
    found = traffic.of_pass(work, layout, table, mesh, batch=batch, tokens=tokens, context=context)
    sized = {"act": work.act_bytes, "weight": work.weight_bytes, "float32": 4}
    seconds = [(c, c.wire * sized[c.dtype] / _bandwidth(row, c, links)) for c in found]
    rows = batch * tokens
    return Prediction(
        layout=layout,
        mesh=mesh,
        chip=row,
        tokens=rows,
        counted_params=work.counted_params or work.n_params,
        residual=work.residual,
        flops=_flops(work, layout, table, mesh, rows, batch, context, own),
        hbm_bytes=_hbm(work, layout, table, mesh, batch, tokens, context, own),
        collectives=found,
        element_bytes=sized,
        interconnect_seconds=sum(s for _, s in seconds),
        edge_seconds=sum(s for c, s in seconds if c.edge),
        weight_memory=_weight_memory(work, table, mesh),
        cache_memory=_cache_memory(work, table, mesh, batch, context),
        activation_memory=_activation_memory(work, table, mesh, rows, batch),
    )


def check_memory(p: Prediction) -> None:
    """Raises ShardingError where the pass does not fit the chip's memory."""
    if p.memory_bytes > p.chip.hbm_bytes:
        held = (p.memory_bytes, p.weight_memory, p.cache_memory, p.activation_memory, p.chip.hbm_bytes)
        need, weights, cache, acts, have = (f"{b / 2**30:.1f}" for b in held)
        raise ShardingError(
            f"{p.layout.name} needs {need} GiB a chip (weights {weights}, cache {cache}, activations {acts}) of "
            f"{p.chip.name}'s {have}; take more chips, a smaller batch or context, or fewer bits."
        )


def cache_bytes(work: Workload, layout: Layout, mesh_shape, batch: int, context: int) -> float:
    """Bytes of K and V that one chip holds for `batch` sequences of `context` tokens. Raises ShardingError."""
    mesh = sizes(mesh_shape)
    return _cache_memory(work, _table(work, layout, mesh, batch, context), mesh, batch, context)


def max_context(
    work: Workload, layout: Layout, mesh_shape, chip: str | Chip, *, batch: int, share: float
) -> int | None:
    """Tokens per sequence whose K and V fit in `share` of every chip's memory (section 4); None when no length is too
    long (every owner a ring that fits). With kv_seq, a multiple of the chips it is split over.

    Raises ShardingError: a share outside (0, 1], a layout that does not fit.
    """
    if not 0 < share <= 1:
        raise ShardingError(f"share is {share}; it is the fraction of memory for K and V, above 0 and at most 1.")
    mesh, budget = sizes(mesh_shape), share * _chip(chip).hbm_bytes
    table = _table(work, dataclasses.replace(layout, kv_seq=()), mesh, batch, 1)
    table = {**table, "cache_length": layout.kv_seq}
    step = parts(layout.kv_seq, mesh)
    low, high = 0, (1 << 40) // step
    if _cache_memory(work, table, mesh, batch, high * step) <= budget:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        fits = _cache_memory(work, table, mesh, batch, middle * step) <= budget
        low, high = (middle, high) if fits else (low, middle)
    return low * step


def head_shards(layout: Layout, mesh_shape) -> int:
    """What the number of query heads must be divisible by: all chips, or Y Z where weights are gathered."""
    mesh = sizes(mesh_shape)
    return parts(("y", "z"), mesh) if layout.gathered else parts(("x", "y", "z"), mesh)


# --- checks --------------------------------------------------------------------------------------------


def _chip(chip: str | Chip) -> Chip:
    if isinstance(chip, str) and chip not in CHIPS:
        raise ShardingError(f"chip is {chip!r}; choose one of {', '.join(CHIPS)}, or pass a Chip.")
    return CHIPS[chip] if isinstance(chip, str) else chip


def _choice(value: str, valid: tuple[str, ...], name: str) -> None:
    if value not in valid:
        raise ShardingError(f"{name} is {value!r}; choose one of {', '.join(valid)}.")


def _check(chip: Chip, n: int, *, phase: str, batch: int, tokens: int, context: int, links: str) -> None:
    _choice(phase, PHASES, "phase")
    _choice(links, LINKS, "links")
    for name, value in (("batch", batch), ("tokens", tokens), ("context", context)):
        if value < 1:
            raise ShardingError(f"{name} is {value}; it must be at least 1.")
    if tokens > context:
        raise ShardingError(f"tokens is {tokens}, more than the context of {context} they end at; raise context.")
    if n > chip.max_chips:
        raise ShardingError(f"chips is {n}, but the links of {chip.name} join {chip.max_chips}; take no more.")


def _table(work: Workload, layout: Layout, mesh: Mapping[str, int], batch: int, context: int) -> Rules:
    dims = {**work.dims(), "batch": batch}
    held = {one.held(context) for one in work.layers if one.owner and one.stored("token")} if layout.kv_seq else set()
    tables = [rules(layout, mesh, {**dims, "slots": slots}) for slots in sorted(held or {0})]
    return tables[0]


def _bandwidth(chip: Chip, c: Collective, links: str) -> float:
    if not chip.interconnect_bandwidth:
        raise ShardingError(f"chip {chip.name} has no interconnect; take one chip, or give it interconnect_bandwidth.")
    if links == "all" or not chip.torus_axes:
        return chip.interconnect_bandwidth
    return chip.interconnect_bandwidth * min(len(c.axes), chip.torus_axes) / chip.torus_axes


# --- compute and HBM -----------------------------------------------------------------------------------


def _flops(work: Workload, layout: Layout, table: Rules, mesh, rows: int, batch: int, context: int, own: bool):
    n = math.prod(mesh.values())
    names = ("own_batch", "own_heads") if own else ("attn_batch", "attn_heads")
    split = parts(table[names[0]] + table[names[1]], mesh)
    total = 2 * batch * work.d_model * work.vocab / n
    for one in work.layers:
        dense = sum(2 * rows * w.size / parts(_computed(table, w), mesh) for w in one.weights)
        keys = one.seen(context) if own else _keys(one, one.seen(context), layout, mesh, context)
        per_token = 2 * one.n_heads * (one.score_dim + one.value_dim) * keys + one.token_flops
        total += one.count * (dense + rows * per_token / split)
    return total


def _computed(table: Rules, weight: Weight) -> tuple[str, ...]:
    """Axes that a projection is split over: its batch (K's and V's own), its heads, and D where that is partial."""
    gone, own = table["act_batch"], weight.reads and weight.heads in ("k_heads", "v_heads")
    batch = table[weight.heads.replace("heads", "batch")] if own else gone
    partial = table["act_embed"] if weight.reads or weight.writes else ()
    heads = (a for axis in weight.axes if axis != "embed" for a in table[axis] if a not in gone)
    return tuple({*batch, *heads, *partial})


def _keys(layer: Layer, seen: int, layout: Layout, mesh, context: int) -> int:
    """Of `seen` keys, those of the fullest chip: a window lies in few of the slots' blocks, a full view in all."""
    return min(seen, math.ceil(layer.held(context) / parts(layout.kv_seq, mesh)))


def _hbm(work: Workload, layout: Layout, table: Rules, mesh, batch: int, tokens: int, context: int, own: bool):
    unused = 0 if work.tied else (work.vocab - min(batch * tokens, work.vocab)) * work.d_model
    tables = parts(table["vocab"] + table["embed"], mesh)
    out = {
        "weights": _weight_memory(work, table, mesh) - unused * work.weight_bytes / tables,
        "gathered": 0.0,
        "kv_read": 0.0,
        "kv_written": 0.0,
    }
    for one in work.layers:
        gathered = sum(c.count * c.elements for w in one.weights for c in traffic.gather_weight(w, table, mesh))
        out["gathered"] += one.count * 2 * work.weight_bytes * gathered
        if own:
            width = sum(leaf.size for leaf in one.stored("token"))
            whole = parts(table["own_batch"] + table["own_k_heads"], mesh)
            out["kv_read"] += one.count * batch * tokens * width * work.act_bytes / whole
        else:
            reached = min(one.visible + tokens - 1 if one.visible else context, context)
            keys = _keys(one, reached, layout, mesh, context)
            out["kv_read"] += one.count * batch * keys * _leaves_bytes(work, one, "token", table, mesh)
        states = one.count * batch * _leaves_bytes(work, one, "sequence", table, mesh)
        out["kv_read"] += states
        if one.owner:
            kept = min(tokens, one.held(context))
            written = _keys(one, kept, layout, mesh, context)
            out["kv_written"] += one.count * batch * written * _leaves_bytes(work, one, "token", table, mesh) + states
    return out


def _leaves_bytes(work: Workload, one: Layer, per: str, table: Rules, mesh) -> float:
    """Bytes that a token (or a sequence) has on one chip in the cache that a layer reads."""
    return sum(work.leaf_bytes(leaf) / parts(_stored(table, leaf), mesh) for leaf in one.stored(per))


def _stored(table: Rules, leaf: Leaf) -> tuple[str, ...]:
    """Axes that one token's (or one sequence's) leaf, and the batch, are split over in the cache."""
    return table["cache_batch"] + tuple(a for axis in leaf.axes if axis for a in table[axis])


# --- memory --------------------------------------------------------------------------------------------


def _weight_memory(work: Workload, table: Rules, mesh) -> float:
    tables = work.vocab * work.d_model * (1 if work.tied else 2)
    total = tables * work.weight_bytes / parts(table["vocab"] + table["embed"], mesh) + work.extra * work.act_bytes
    for one in work.layers:
        held = sum(w.size * work.weight_bytes / parts(traffic.weight_split(w, table), mesh) for w in one.weights)
        total += one.count * (held + one.extra * work.act_bytes)
    return total


def _cache_memory(work: Workload, table: Rules, mesh, batch: int, context: int) -> float:
    blocks, total = parts(table["cache_length"], mesh), 0.0
    for one in (layer for layer in work.layers if layer.owner):
        tokens = math.ceil(one.held(context) / blocks) * _leaves_bytes(work, one, "token", table, mesh)
        total += one.count * batch * (tokens + _leaves_bytes(work, one, "sequence", table, mesh))
    return total


def _activation_memory(work: Workload, table: Rules, mesh, rows: int, batch: int) -> float:
    """Peak bytes of one layer's tensors: the residual and its gathered copy, with the widest of what is in between."""
    n = math.prod(mesh.values())
    reduced = table["act_embed"]
    cols = parts(table["act_batch"] + tuple(a for a in table["act_mlp"] if a not in reduced), mesh)
    gathered = rows * work.d_model / parts(table["act_batch"] + reduced, mesh)
    inner = 0.0
    for one in work.layers:
        hidden = rows * one.read_into("mlp") / cols
        queries = rows * (one.read_into("q_heads") + one.written_from("q_heads")) / cols
        inner = max(inner, hidden + queries if work.residual == "parallel" else max(hidden, queries))
    read = (w.size for one in work.layers for w in one.weights if w.reads)
    shard = max(read, default=0) / n if table["act_batch"] else 0
    logits = batch * work.vocab * 4 / parts(table["vocab"], mesh)
    layer = work.act_bytes * (2 * rows * work.d_model / n + gathered + inner) + 2 * shard * work.weight_bytes
    return max(layer, logits)
