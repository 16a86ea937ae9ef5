"""The collectives of a pass, layout by layout: what each chip gathers, scatters and exchanges, in elements.

The rule table of `sharding.layout.torus_layouts` says how every array is split, and `sharding.layout.moves` which steps
lead from one split to another: the list that the written-out program runs is the list that is counted here (a test
compares the two, collective by collective). For the MLP this gives the closed forms of Pope et al., arXiv 2211.05102,
sections 3.1 to 3.3:

    >>> volume_elements("ws_2d", 1, 16384, 65536, (4, 4, 4)).total      # 2 (E/X + F/(YZ)) per token
    16384.0

Not modelled: the fixed latency of a collective, and q/k norms over all heads.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from sharding.cost.workload import Layer, Weight, Workload
from sharding.layout.moves import Axes, Names, Split, Step, any_order, moves
from sharding.layout.rules import Rules, ShardingError, mesh_axes
from sharding.layout.torus_layouts import AXES, Layout, parts, rules

PURPOSES = ("ffn", "weights", "attention", "resharding", "kv", "merge", "norm", "logits")


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
    table = rules(Layout(ffn), mesh, dims)
    gates = 2 if gated else 1
    wide = tokens * d_ff
    found = [*residual_pair("ffn", table, mesh, tokens * d_model), *mlp(table, mesh, gates * wide, wide)]
    gathered = gather_weight(Weight((d_model, (gates + 1) * d_ff), ("embed", "mlp")), table, mesh)
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
    inside = table["act_batch"] + table["act_embed"]
    axes = _without(table["res_batch"] + table["res_embed"], inside)
    here = elements / parts(inside, mesh)
    return [
        *_one(purpose, "all_gather", axes, mesh, here, edge=True),
        *_one(purpose, "reduce_scatter", axes, mesh, here, edge=True),
    ]


def mlp(table: Rules, mesh: Mapping[str, int], made: float, taken: float) -> list[Collective]:
    """The hidden width: partial sums of `made` elements scattered after the input matmuls, `taken` elements gathered in
    front of the output one."""
    split = parts(table["act_batch"] + _without(table["act_mlp"], table["act_embed"]), mesh)
    return [
        *_one("ffn", "reduce_scatter", table["act_embed"], mesh, made / split),
        *_one("ffn", "all_gather", table["act_embed"], mesh, taken / split),
    ]


def gather_weight(weight: Weight, table: Rules, mesh: Mapping[str, int]) -> list[Collective]:
    """A weight gathered over the axes that the batch is split over."""
    stored, gone = weight_split(weight, table), table["act_batch"]
    left = weight.size / parts(_without(stored, gone), mesh)
    axes = [a for a in AXES if a in gone and a in stored]
    return _one("weights", "all_gather", axes, mesh, left, dtype="weight")


def weight_split(weight: Weight, table: Rules) -> Axes:
    """The mesh axes that a weight is stored over."""
    return tuple(dict.fromkeys(a for axis in weight.axes for a in table[axis]))


def projections(layer: Layer, table: Rules, mesh, tokens: int) -> list[Collective]:
    """Queries and outputs of `tokens` = B x T tokens: partial sums over a split D scattered after the projections into
    heads and summed after those into an unsplit width (a latent), heads gathered in front of the output projection.
    Keys and values: `kv`."""
    reduced, rows = table["act_embed"], table["act_batch"]
    split = parts(rows + _without(table["act_q_heads"], reduced), mesh)
    out = [
        *_one("attention", "reduce_scatter", reduced, mesh, tokens * layer.read_into("q_heads") / split),
        *_one("attention", "all_gather", reduced, mesh, tokens * layer.written_from("q_heads") / split),
    ]
    for weight in layer.mixers:
        if weight.reads and not table[weight.heads] and weight.heads not in ("k_heads", "v_heads"):
            out += _one("attention", "all_reduce", reduced, mesh, tokens * weight.width / parts(rows, mesh))
    return out


def attention(layer: Layer, layout: Layout, table: Rules, mesh, tokens: int, fresh: bool) -> list[Collective]:
    """The way of queries to the cache's layout and of results back, and the merge of partial softmaxes over kv_seq.
    `fresh`: attention inside the pass's own tokens."""
    rows, made = tokens * layer.n_heads, ("act_batch", "act_q_heads")
    score, value = rows * layer.score_dim, rows * layer.value_dim
    moved, merged = _Mover("resharding", table, mesh), _Mover("merge", table, mesh)
    if fresh:
        there = ("fresh_batch", "fresh_heads")
        return moved.reshard(score, made, there) + moved.reshard(value, there, made)
    there, back = ("attn_batch", "attn_heads"), ("attn_batch", "attn_out_heads")
    out = moved.reshard(score, made, there, gathers="merge" if layout.kv_seq else "")
    if layout.kv_seq:
        partial = rows / parts(table["attn_batch"] + table["attn_heads"], mesh)
        out += _one("merge", "all_reduce", layout.kv_seq, mesh, partial, dtype="float32", count=2)  # maxima and sums
        orders = any_order(table, mesh, there, back)
        out += merged.reduce(value, layout.kv_seq, merged.split(there), back, dtype="float32", orders=orders)
    return out + moved.reshard(value, back, made)


def kv(layer: Layer, table: Rules, mesh, tokens: int, fresh: bool) -> list[Collective]:
    """New entries of an owner, from the projection to the cache: B x T tokens, `fresh` ones also to every query. A leaf
    that no projection of D leads to (a latent's) is whole on every chip; states stay where they are updated."""
    out, moved = [], _Mover("kv", table, mesh)
    for leaf in layer.stored("token"):
        one, elements = ("v" if leaf.role == "value" else "k"), tokens * leaf.size
        made = (f"{one}_batch", f"act_{one}_heads")
        if layer.read_into(f"{one}_heads"):
            projected = (table["act_batch"], _without(table[f"{one}_heads"], table["act_batch"]))
            out += moved.reduce(elements, table["act_embed"], projected, made)
        out += moved.reshard(elements, made, ("cache_batch", "cache_heads"))
        if fresh:
            out += moved.reshard(elements, made, ("fresh_batch", f"fresh_{one}_heads"))
    return out


def ends(work: Workload, table: Rules, mesh, batch: int, tokens: int) -> list[Collective]:
    """Embedding rows summed over the vocabulary's axes into the residual's layout; the last norm; the last tokens'
    residual gathered for the logits, whose partial sums are scattered in float32."""
    moved, residual, last = _Mover("logits", table, mesh), ("res_batch", "res_embed"), ("logit_batch", "logit_embed")
    logits = batch * work.vocab / parts(table["vocab"] + table["logit_batch"], mesh)
    return [
        *moved.reduce(tokens * work.d_model, table["vocab"], ((), table["embed"]), residual),
        *norms(1, work, table, mesh, tokens),
        *moved.reshard(batch * work.d_model, residual, last),
        *_one("logits", "reduce_scatter", table["logit_embed"], mesh, logits, dtype="float32"),
    ]


def norms(count: int, work: Workload, table: Rules, mesh, tokens: int) -> list[Collective]:
    """The means over a split D of `count` norms."""
    here = tokens / parts(table["res_batch"], mesh)
    means = count * work.norm_means
    return _one("norm", "all_reduce", table["res_embed"], mesh, here, dtype="float32", count=means) if means else []


# --- from one layout to another ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Mover:
    """Counts moves under one purpose, by one rule table on one mesh."""

    purpose: str
    table: Rules
    mesh: Mapping[str, int]

    def split(self, names: Names) -> Split:
        return tuple(mesh_axes(self.table, name) for name in names)

    def reshard(self, elements: float, have: Names, want: Names, *, gathers: str = "") -> list[Collective]:
        """An array of `elements` from one tuple of logical axes to another; gathers are counted under `gathers` if
        given."""
        steps = moves(self.split(have), self.split(want), (), any_order(self.table, self.mesh, have, want))
        return count(steps, elements, self.mesh, self.purpose, gathers=gathers)

    def reduce(
        self, elements: float, partial: Axes, have: Split, want: Names, *, dtype: str = "act", orders: Any = None
    ) -> list[Collective]:
        """A sum over `partial`, split as `have`, ended in the logical axes `want`."""
        steps = moves(have, self.split(want), partial, orders or {})
        return count(steps, elements, self.mesh, self.purpose, dtype=dtype)


def count(
    steps: Iterable[Step], elements: float, mesh: Mapping[str, int], purpose: str, *, gathers: str = "", dtype="act"
) -> list[Collective]:
    """The collectives among the steps of an array that has `elements` in all."""
    out = []
    for step in steps:
        if step.kind != "slice":
            split = step.then if step.kind == "all_gather" else step.have
            here = elements / parts(tuple(a for axes in split for a in axes), mesh)
            under = gathers if gathers and step.kind == "all_gather" else purpose
            out += _one(under, step.kind, step.axes, mesh, here, dtype=dtype)
    return out


def _without(axes, gone) -> Axes:
    return tuple(a for a in axes if a not in gone)


def of_pass(work: Workload, layout: Layout, table: Rules, mesh, *, batch: int, tokens: int, context: int) -> tuple:
    """Every collective of one pass of `batch` sequences x `tokens` tokens that end at `context`, alike ones merged."""
    rows, fresh = batch * tokens, tokens > 1 and tokens == context
    found: list[Collective] = ends(work, table, mesh, batch, rows)
    for layer in work.layers:
        one = of_layer(layer, work, layout, table, mesh, rows, fresh)
        found += [dataclasses.replace(c, count=c.count * layer.count) for c in one]
    merged: dict[Collective, int] = {}
    for c in found:
        key = dataclasses.replace(c, count=1)
        merged[key] = merged.get(key, 0) + c.count
    return tuple(dataclasses.replace(c, count=count) for c, count in merged.items())


def of_layer(
    layer: Layer, work: Workload, layout: Layout, table: Rules, mesh, rows: int, fresh: bool
) -> list[Collective]:
    """The collectives of one layer for `rows` = B x T tokens."""
    out = norms(layer.norms, work, table, mesh, rows)
    if layer.mlp:
        out += residual_pair("ffn", table, mesh, rows * work.d_model)
        out += mlp(table, mesh, rows * layer.read_into("mlp"), rows * layer.written_from("mlp"))
    pair = residual_pair("attention", table, mesh, rows * work.d_model) if layer.mixers else []
    out += [] if work.residual == "parallel" and layer.mlp else pair
    out += pair[:1] if layer.kv_norm else []  # the owner's K, V read the stream through a norm of their own
    out += projections(layer, table, mesh, rows)
    if layer.n_heads:
        out += attention(layer, layout, table, mesh, rows, fresh)
    if layer.owner:
        out += kv(layer, table, mesh, rows, fresh)
    for weight in layer.weights:
        out += gather_weight(weight, table, mesh)
    return out
