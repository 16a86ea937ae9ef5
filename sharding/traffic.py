"""The collectives of a pass, layout by layout: what each chip gathers, scatters and exchanges, in elements.

They follow from the rule table of `sharding.layouts` by one rule: an axis that a dim loses is an all-gather, one that a
partial sum gains a reduce-scatter, one that goes from one dim to another an all-to-all, one that a whole dim gains is
free. For the MLP this gives the closed forms of Pope et al., arXiv 2211.05102, sections 3.1 to 3.3:

    >>> volume_elements("ws_2d", 1, 16384, 65536, (4, 4, 4)).total      # 2 (E/X + F/(YZ)) per token
    16384.0

Not modelled: the few bytes per token of a norm's mean over a split width, and the fixed latency of a collective.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping

from sharding import layouts
from sharding.layouts import AXES, Layout, parts
from sharding.rules import Rules, ShardingError
from sharding.workload import Layer, Workload

PURPOSES = ("ffn", "weights", "attention", "resharding", "kv", "merge", "logits")


@dataclasses.dataclass(frozen=True)
class Collective:
    """`count` collectives that are alike, as one chip sees them.

    purpose   one of PURPOSES
    kind      all_gather | reduce_scatter | all_reduce | all_to_all
    axes      mesh axes, those of one chip left out; `chips` is their product K
    elements  of one of them: gathered output, unreduced input, or the shard that an all-to-all moves
    dtype     act | weight | float32
    edge      whether it moves the residual stream into or out of a block (one of the E/yz pairs)
    """

    purpose: str
    kind: str
    axes: tuple[str, ...]
    chips: int
    elements: float
    dtype: str = "act"
    edge: bool = False
    count: int = 1

    @property
    def wire(self) -> float:
        """Elements that cross the links of one chip, all counted: D (K-1)/K, twice for an all-reduce."""
        return self.count * self.elements * (self.chips - 1) / self.chips * (2 if self.kind == "all_reduce" else 1)


def sizes(mesh_shape: Mapping[str, int] | Iterable[int]) -> dict[str, int]:
    """{x: X, y: Y, z: Z} of a mapping or of (X, Y, Z). Raises ShardingError for anything else."""
    if not isinstance(mesh_shape, Mapping):
        shape = tuple(mesh_shape)
        if len(shape) != len(AXES):
            raise ShardingError(f"mesh shape is {shape}; it takes three sizes, X, Y and Z, 1 for an unused axis.")
        mesh_shape = dict(zip(AXES, shape, strict=True))
    given = dict(mesh_shape)
    if set(given) != set(AXES) or any(size < 1 for size in given.values()):
        raise ShardingError(f"mesh shape is {given}; it takes the axes x, y and z with sizes of at least 1.")
    return given


# --- the mlp alone: closed forms -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Volume:
    """Elements per chip and layer: of activations and of gathered weights."""

    activations: float
    weights: float

    @property
    def total(self) -> float:
        return self.activations + self.weights


def volume_elements(
    ffn: str, tokens: float, d_model: int, d_ff: int, mesh_shape, *, gated: bool = False, ring: bool = False
) -> Volume:
    """What the MLP of one layer moves for `tokens` = B x T tokens, by section 3 of the paper.

    `gated` has two mlp-in matrices instead of the paper's one. `ring` counts what crosses the links, (K-1)/K of
    every buffer, where the closed forms take the whole buffer. Raises ShardingError: unknown layout, a width
    that the mesh does not divide.
    """
    mesh = sizes(mesh_shape)
    n = math.prod(mesh.values())
    dims = {"embed": d_model, "mlp": d_ff, "q_heads": n, "k_heads": 1, "v_heads": 1, "vocab": n, "batch": n}
    table = layouts.rules(Layout(ffn), mesh, dims)
    gates = 2 if gated else 1
    found = [*residual_pair("ffn", table, mesh, tokens * d_model), *mlp(table, mesh, tokens, d_ff, gates)]
    gathered = [*gather_weights(table, mesh, "mlp", (gates + 1) * d_model * d_ff)]
    count = (lambda c: c.wire) if ring else (lambda c: c.count * c.elements)
    return Volume(sum(map(count, found)), sum(map(count, gathered)))


def crossovers(
    d_model: int, d_ff: int, mesh_shape, *, gated: bool = False, weight_bytes: float = 2, act_bytes: float = 2
) -> dict[tuple[str, str], float]:
    """Tokens from which the second layout of a pair moves fewer bytes than the first, for ws_2d -> wg_x -> wg_xy ->
    wg_xyz. Infinite where it never does. (K-1)/K is taken as 1, as in the paper."""
    order = ("ws_2d", "wg_x", "wg_xy", "wg_xyz")
    lines = {}
    for ffn in order:
        one = volume_elements(ffn, 1, d_model, d_ff, mesh_shape, gated=gated)
        lines[ffn] = (one.weights * weight_bytes, one.activations * act_bytes)
    out = {}
    for a, b in zip(order, order[1:], strict=False):
        rise, saving = lines[b][0] - lines[a][0], lines[a][1] - lines[b][1]
        out[a, b] = rise / saving if saving > 0 else math.inf
    return out


def optimal_x(chips: int, d_model: int, d_ff: int, *, gated: bool = False) -> float:
    """X at which ws_2d moves least: sqrt(n E / F), and sqrt(2 n E / 3 F) gated (section 3.2)."""
    return math.sqrt(chips * d_model / d_ff * (2 / 3 if gated else 1))


# --- the parts of a layer ------------------------------------------------------------------------------


def _one(purpose: str, kind: str, axes, mesh: Mapping[str, int], elements: float, **fields) -> list[Collective]:
    axes = tuple(a for a in axes if mesh[a] > 1)
    return [Collective(purpose, kind, axes, parts(axes, mesh), elements, **fields)] if axes else []


def residual_pair(purpose: str, table: Rules, mesh: Mapping[str, int], elements: float) -> list[Collective]:
    """The residual stream gathered in front of the input matmuls and scattered behind the output matmuls:
    `elements` = B T D in all."""
    axes = _without(table["res_embed"], table["act_embed"])
    here = elements / parts(table["res_batch"] + table["act_embed"], mesh)
    return [
        *_one(purpose, "all_gather", axes, mesh, here, edge=True),
        *_one(purpose, "reduce_scatter", axes, mesh, here, edge=True),
    ]


def mlp(table: Rules, mesh: Mapping[str, int], tokens: float, d_ff: int, gates: int) -> list[Collective]:
    """The hidden width: partial sums scattered after the input matmuls, gathered in front of the output one."""
    here = tokens * d_ff / parts(table["act_batch"] + _without(table["act_mlp"], table["act_embed"]), mesh)
    return [
        *_one("ffn", "reduce_scatter", table["act_embed"], mesh, gates * here),
        *_one("ffn", "all_gather", table["act_embed"], mesh, here),
    ]


def gather_weights(table: Rules, mesh: Mapping[str, int], dim: str, elements: float) -> list[Collective]:
    """A weight [D, `dim`] of `elements`, gathered over the axes that the batch is split over."""
    stored, gone = table["embed"] + table[dim], table["res_batch"]
    left = elements / parts(_without(stored, gone), mesh)
    axes = [a for a in AXES if a in gone and a in stored]
    return _one("weights", "all_gather", axes, mesh, left, dtype="weight")


def attention(work: Workload, layout: Layout, table: Rules, mesh, tokens: int, fresh: bool) -> list[Collective]:
    """Queries and outputs of `tokens` = B x T tokens: partial sums, the way to the cache's layout and back, and the
    merge of partial softmaxes over kv_seq. `fresh`: attention inside the pass's own tokens, where queries stay."""
    rows, reduced = tokens * work.n_heads, table["act_embed"]
    native = _place(table, batch="act_batch", heads="act_q_heads")
    here = rows / parts(table["act_batch"] + _without(table["act_q_heads"], reduced), mesh)
    out = [
        *_one("attention", "reduce_scatter", reduced, mesh, here * work.q_dim),
        *_one("attention", "all_gather", reduced, mesh, here * work.o_dim),
    ]
    if fresh:
        there = _place(table, batch="fresh_batch", heads="fresh_heads")
        return out + reshard("resharding", rows * _score(work), native, there, mesh)
    there = _place(table, batch="attn_batch", heads="attn_heads")
    purpose = "merge" if layout.kv_seq else "resharding"
    out += reshard("resharding", rows * _score(work), native, there, mesh, gather=purpose)
    partial = rows / parts(tuple(there), mesh)
    out += _one("merge", "reduce_scatter", layout.kv_seq, mesh, partial * _value(work), dtype="float32")
    out += _one("merge", "all_reduce", layout.kv_seq, mesh, partial, dtype="float32", count=2)  # maxima and sums
    scattered = there | {a: native[a] for a in layout.kv_seq if a in native}
    return out + reshard("resharding", rows * _value(work), scattered, native, mesh)


def kv(layer: Layer, table: Rules, mesh, tokens: int, fresh: bool) -> list[Collective]:
    """New entries of an owner, from the projection to the cache: B x T tokens, `fresh` ones also to every query."""
    out, reduced = [], table["act_embed"]
    for name, heads, dim in layer.leaves:
        one, elements = ("v" if name == "v" else "k"), tokens * heads * dim
        source = _place(table, batch=f"{one}_batch", heads=f"act_{one}_heads")
        before = parts(_without(tuple(source), reduced), mesh)
        out += _one("kv", "reduce_scatter", [a for a in reduced if a in source], mesh, elements / before)
        out += _one("kv", "all_reduce", [a for a in reduced if a not in source], mesh, elements / before)
        target = _place(table, batch="cache_batch", heads="cache_heads", **({"slots": "cache_length"} if fresh else {}))
        store = reshard("kv", elements, source, target, mesh)
        if fresh:
            whole = _place(table, batch="fresh_batch", heads=f"fresh_{one}_heads")
            out += reshard("kv", elements, source, whole, mesh)
            store = min(store, reshard("kv", elements, whole, target, mesh), key=lambda way: sum(c.wire for c in way))
        out += store
    return out


def ends(work: Workload, table: Rules, mesh, batch: int, tokens: int) -> list[Collective]:
    """Embedding rows summed over the vocabulary's axes and brought to the residual's layout; the last tokens'
    residual gathered over all but the embedding's D axes, and their logits' partial sums scattered."""
    rows = {a: "embed" for a in table["embed"]} | {a: "embed" for a in table["vocab"]}
    residual = _place(table, batch="res_batch", embed="res_embed")
    last = {a: "embed" for a in table["embed"]}
    summed = tokens * work.d_model / parts(table["embed"], mesh)
    logits = batch * work.vocab / parts(table["vocab"], mesh)
    return [
        *_one("logits", "reduce_scatter", table["vocab"], mesh, summed),
        *reshard("logits", tokens * work.d_model, rows, residual, mesh),
        *reshard("logits", batch * work.d_model, residual, last, mesh),
        *_one("logits", "reduce_scatter", table["embed"], mesh, logits, dtype="float32"),
    ]


def reshard(purpose: str, elements: float, source: dict, target: dict, mesh, *, gather: str = "") -> list[Collective]:
    """From one placement {mesh axis: dim} of an array of `elements` to another: slices first (free), then what
    changes dims, then what is gathered (named `gather` if given)."""
    moved = tuple(a for a in AXES if a in source and a in target and source[a] != target[a])
    lost = tuple(a for a in AXES if a in source and a not in target)
    return [
        *_one(purpose, "all_to_all", moved, mesh, elements / parts(tuple(source | target), mesh)),
        *_one(gather or purpose, "all_gather", lost, mesh, elements / parts(tuple(target), mesh)),
    ]


def _place(table: Rules, **names: str) -> dict[str, str]:
    return {axis: dim for dim, name in names.items() for axis in table[name]}


def _without(axes, gone) -> tuple[str, ...]:
    return tuple(a for a in axes if a not in gone)


def _score(work: Workload) -> int:
    return work.score_dim or work.q_dim


def _value(work: Workload) -> int:
    return work.value_dim or work.o_dim


def of_pass(work: Workload, layout: Layout, table: Rules, mesh, *, batch: int, tokens: int, context: int) -> tuple:
    """Every collective of one pass of `batch` sequences x `tokens` tokens that end at `context`, alike ones merged."""
    rows, fresh = batch * tokens, tokens > 1 and tokens == context
    found: list[Collective] = ends(work, table, mesh, batch, rows)
    for layer in work.layers:
        one = [
            *residual_pair("ffn", table, mesh, rows * work.d_model),
            *mlp(table, mesh, rows, work.d_ff, work.gates),
            *attention(work, layout, table, mesh, rows, fresh),
        ]
        if work.residual != "parallel":
            one += residual_pair("attention", table, mesh, rows * work.d_model)
        if layer.owner:
            one += kv(layer, table, mesh, rows, fresh)
        for dim, elements in (("mlp", layer.mlp_in), ("mlp", layer.mlp_out), ("q_heads", layer.q),
                              ("q_heads", layer.o), ("k_heads", layer.k), ("v_heads", layer.v)):  # fmt: skip
            one += gather_weights(table, mesh, dim, elements) if elements else []
        found += [dataclasses.replace(c, count=c.count * layer.count) for c in one]
    merged: dict[Collective, int] = {}
    for c in found:
        key = dataclasses.replace(c, count=1)
        merged[key] = merged.get(key, 0) + c.count
    return tuple(dataclasses.replace(c, count=count) for c, count in merged.items())
