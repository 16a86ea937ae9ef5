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
from sharding.cost.traffic import PURPOSES, Collective, Volume, crossovers, optimal_x, sizes, volume_elements
from sharding.cost.workload import KV_TYPES, RESIDUALS, WEIGHT_BYTES, Layer, Workload
from sharding.layout import layouts
from sharding.layout.layouts import Layout, parts
from sharding.layout.rules import Rules, ShardingError

__all__ = [
    "KV_TYPES",
    "OVERLAPS",
    "PHASES",
    "PURPOSES",
    "RESIDUALS",
    "WEIGHT_BYTES",
    "Collective",
    "Layer",
    "Prediction",
    "Volume",
    "Workload",
    "cache_bytes",
    "check_memory",
    "crossovers",
    "head_shards",
    "max_context",
    "mfu",
    "optimal_x",
    "predict",
    "volume_elements",
]

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
    fresh = tokens > 1 and tokens == context
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
        flops=_flops(work, layout, table, mesh, rows, batch, context, fresh),
        hbm_bytes=_hbm(work, layout, table, mesh, batch, tokens, context, fresh),
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
    dims = {
        "embed": work.d_model,
        "mlp": work.d_ff,
        "vocab": work.vocab,
        "q_heads": work.n_heads,
        "k_heads": work.k_heads,
        "v_heads": work.v_heads,
        "batch": batch,
    }
    held = {layer.held(context) for layer in work.layers if layer.owner} if layout.kv_seq else {0}
    tables = [layouts.rules(layout, mesh, {**dims, "slots": slots}) for slots in sorted(held)]
    return tables[0]


def _bandwidth(chip: Chip, c: Collective, links: str) -> float:
    if not chip.interconnect_bandwidth:
        raise ShardingError(f"chip {chip.name} has no interconnect; take one chip, or give it interconnect_bandwidth.")
    if links == "all" or not chip.torus_axes:
        return chip.interconnect_bandwidth
    return chip.interconnect_bandwidth * min(len(c.axes), chip.torus_axes) / chip.torus_axes


# --- compute and HBM -----------------------------------------------------------------------------------


def _flops(work: Workload, layout: Layout, table: Rules, mesh, rows: int, batch: int, context: int, fresh: bool):
    n = math.prod(mesh.values())
    names = ("fresh_batch", "fresh_heads") if fresh else ("attn_batch", "attn_heads")
    split = parts(table[names[0]] + table[names[1]], mesh)
    per_key = 2 * rows * work.n_heads * ((work.score_dim or work.q_dim) + (work.value_dim or work.o_dim)) / split
    total = 2 * batch * work.d_model * work.vocab / n
    for layer in work.layers:
        dense = 2 * rows * (layer.q + layer.o + layer.mlp_in + layer.mlp_out) / n
        kv = sum(
            2 * rows * elements / parts(_computed(table, one), mesh)
            for one, elements in (("k", layer.k), ("v", layer.v))
        )
        keys = layer.seen(context) if fresh else _keys(layer, layer.seen(context), layout, mesh, context)
        total += layer.count * (dense + kv + per_key * keys)
    return total


def _computed(table: Rules, one: str) -> tuple[str, ...]:
    """Axes that the K or V projection is split over: its own batch, its weight's heads, and D where partial."""
    heads = tuple(a for a in table[f"{one}_heads"] if a not in table["act_batch"])
    return tuple({*table[f"{one}_batch"], *heads, *table["act_embed"]})


def _keys(layer: Layer, seen: int, layout: Layout, mesh, context: int) -> int:
    """Of `seen` keys, those of the fullest chip: a window lies in few of the slots' blocks, a full view in all."""
    return min(seen, math.ceil(layer.held(context) / parts(layout.kv_seq, mesh)))


def _hbm(work: Workload, layout: Layout, table: Rules, mesh, batch: int, tokens: int, context: int, fresh: bool):
    unused = 0 if work.tied else (work.vocab - min(batch * tokens, work.vocab)) * work.d_model
    tables = parts(table["vocab"] + table["embed"], mesh)
    out = {
        "weights": _weight_memory(work, table, mesh) - unused * work.weight_bytes / tables,
        "gathered": 0.0,
        "kv_read": 0.0,
        "kv_written": 0.0,
    }
    gone = [c for layer in work.layers for c in _gathers(layer, table, mesh)]
    out["gathered"] = 2 * work.weight_bytes * sum(c.count * c.elements for c in gone)
    split = parts(table["cache_heads"] + table["cache_batch"], mesh)
    for layer in work.layers:
        if fresh:
            width = sum(heads * dim for _, heads, dim in layer.leaves)
            whole = parts(table["fresh_batch"] + table["fresh_k_heads"], mesh)
            out["kv_read"] += layer.count * batch * tokens * width * work.act_bytes / whole
        else:
            reached = min(layer.visible + tokens - 1 if layer.visible else context, context)
            keys = _keys(layer, reached, layout, mesh, context)
            out["kv_read"] += layer.count * batch * keys * work.token_bytes(layer) / split
        if layer.owner:
            kept = min(tokens, layer.held(context))
            written = _keys(layer, kept, layout, mesh, context)
            out["kv_written"] += layer.count * batch * written * work.token_bytes(layer) / split
    return out


def _gathers(layer: Layer, table: Rules, mesh) -> list[Collective]:
    dims = (
        ("mlp", layer.mlp_in),
        ("mlp", layer.mlp_out),
        ("q_heads", layer.q),
        ("q_heads", layer.o),
        ("k_heads", layer.k),
        ("v_heads", layer.v),
    )
    found = [c for dim, size in dims if size for c in traffic.gather_weights(table, mesh, dim, size)]
    return [dataclasses.replace(c, count=c.count * layer.count) for c in found]


# --- memory --------------------------------------------------------------------------------------------


def _weight_memory(work: Workload, table: Rules, mesh) -> float:
    def held(elements: int, dim: str) -> float:
        return elements * work.weight_bytes / parts(table["embed"] + table[dim], mesh)

    total = held(work.vocab * work.d_model * (1 if work.tied else 2), "vocab") + work.extra * work.act_bytes
    for layer in work.layers:
        one = held(layer.q + layer.o, "q_heads") + held(layer.mlp_in + layer.mlp_out, "mlp")
        one += held(layer.k, "k_heads") + held(layer.v, "v_heads") + layer.extra * work.act_bytes
        total += layer.count * one
    return total


def _cache_memory(work: Workload, table: Rules, mesh, batch: int, context: int) -> float:
    split = parts(table["cache_heads"] + table["cache_batch"], mesh)
    blocks = parts(table["cache_length"], mesh)
    return sum(
        layer.count * batch * math.ceil(layer.held(context) / blocks) * work.token_bytes(layer) / split
        for layer in work.layers
        if layer.owner
    )


def _activation_memory(work: Workload, table: Rules, mesh, rows: int, batch: int) -> float:
    """Peak bytes of one layer's tensors: the residual and its gathered copy, with the widest of what is in between."""
    n = math.prod(mesh.values())
    reduced = table["act_embed"]
    cols = parts(table["act_batch"] + tuple(a for a in table["act_mlp"] if a not in reduced), mesh)
    gathered = rows * work.d_model / parts(table["act_batch"] + reduced, mesh)
    hidden = rows * work.d_ff * work.gates / cols
    queries = rows * work.n_heads * max(work.q_dim + work.o_dim, 0) / cols
    inner = hidden + queries if work.residual == "parallel" else max(hidden, queries)
    shard = max(max(layer.mlp_in / work.gates, layer.q) for layer in work.layers) / n if table["act_batch"] else 0
    logits = batch * work.vocab * 4 / parts(table["vocab"], mesh)
    layer = work.act_bytes * (2 * rows * work.d_model / n + gathered + inner) + 2 * shard * work.weight_bytes
    return max(layer, logits)
