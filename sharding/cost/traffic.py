"""The collectives of a pass, layout by layout: what each chip gathers, scatters and exchanges, in elements.

They follow from the rule table of `sharding.layout.layouts` by one rule: an axis that a dim loses is an all-gather,
one that a partial sum gains a reduce-scatter, one that goes from one dim to another an all-to-all, one that a whole
dim gains is free; in the order of `sharding.layout.manual`, so that a pass moves here what the written-out program
moves (a test compares the two, collective by collective). For the MLP this gives the closed forms of Pope et al.,
arXiv 2211.05102, sections 3.1 to 3.3:

    >>> volume_elements("ws_2d", 1, 16384, 65536, (4, 4, 4)).total      # 2 (E/X + F/(YZ)) per token
    16384.0

Not modelled: the fixed latency of a collective, and q/k norms over all heads.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping

from sharding.cost.workload import Layer, Workload
from sharding.layout import layouts
from sharding.layout.layouts import AXES, Layout, parts
from sharding.layout.rules import Rules, ShardingError

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
    inside = table["act_batch"] + table["act_embed"]
    axes = _without(table["res_batch"] + table["res_embed"], inside)
    here = elements / parts(inside, mesh)
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
    stored, gone = table["embed"] + table[dim], table["act_batch"]
    left = elements / parts(_without(stored, gone), mesh)
    axes = [a for a in AXES if a in gone and a in stored]
    return _one("weights", "all_gather", axes, mesh, left, dtype="weight")


def attention(work: Workload, layout: Layout, table: Rules, mesh, tokens: int, fresh: bool) -> list[Collective]:
    """Queries and outputs of `tokens` = B x T tokens: partial sums, the way to the cache's layout and back, and the
    merge of partial softmaxes over kv_seq. `fresh`: attention inside the pass's own tokens."""
    rows, reduced = tokens * work.n_heads, table["act_embed"]
    made = _place(table, batch="act_batch", heads="act_q_heads")
    here = rows / parts(table["act_batch"] + _without(table["act_q_heads"], reduced), mesh)
    out = [
        *_one("attention", "reduce_scatter", reduced, mesh, here * work.q_dim),
        *_one("attention", "all_gather", reduced, mesh, here * work.o_dim),
    ]
    score, value = rows * (work.score_dim or work.q_dim), rows * (work.value_dim or work.o_dim)
    if fresh:
        there = _place(table, batch="fresh_batch", heads="fresh_heads")
        return out + reshard("resharding", score, made, there, mesh) + reshard("resharding", value, there, made, mesh)
    there, back = (_place(table, batch="attn_batch", heads=name) for name in ("attn_heads", "attn_out_heads"))
    out += reshard("resharding", score, made, there, mesh, gather="merge" if layout.kv_seq else "")
    if layout.kv_seq:
        partial = rows / parts(table["attn_batch"] + table["attn_heads"], mesh)
        out += _one("merge", "all_reduce", layout.kv_seq, mesh, partial, dtype="float32", count=2)  # maxima and sums
        out += reduce("merge", value, layout.kv_seq, there, back, mesh, dtype="float32")
    return out + reshard("resharding", value, back, made, mesh)


def kv(layer: Layer, table: Rules, mesh, tokens: int, fresh: bool) -> list[Collective]:
    """New entries of an owner, from the projection to the cache: B x T tokens, `fresh` ones also to every query."""
    out, reduced, gone = [], table["act_embed"], table["act_batch"]
    for name, heads, dim in layer.leaves:
        one, elements = ("v" if name == "v" else "k"), tokens * heads * dim
        projected = {"batch": gone, "heads": _without(table[f"{one}_heads"], gone)}
        made = _place(table, batch=f"{one}_batch", heads=f"act_{one}_heads")
        out += reduce("kv", elements, reduced, projected, made, mesh)
        out += reshard("kv", elements, made, _place(table, batch="cache_batch", heads="cache_heads"), mesh)
        if fresh:
            out += reshard("kv", elements, made, _place(table, batch="fresh_batch", heads=f"fresh_{one}_heads"), mesh)
    return out


def ends(work: Workload, table: Rules, mesh, batch: int, tokens: int) -> list[Collective]:
    """Embedding rows summed over the vocabulary's axes into the residual's layout; the last norm; the last tokens'
    residual gathered for the logits, whose partial sums are scattered in float32."""
    rows = {"batch": (), "embed": table["embed"]}
    residual = _place(table, batch="res_batch", embed="res_embed")
    last = _place(table, batch="logit_batch", embed="logit_embed")
    logits = batch * work.vocab / parts(table["vocab"] + table["logit_batch"], mesh)
    return [
        *reduce("logits", tokens * work.d_model, table["vocab"], rows, residual, mesh),
        *norms(1, work, table, mesh, tokens),
        *reshard("logits", batch * work.d_model, residual, last, mesh),
        *_one("logits", "reduce_scatter", table["logit_embed"], mesh, logits, dtype="float32"),
    ]


def norms(count: int, work: Workload, table: Rules, mesh, tokens: int) -> list[Collective]:
    """The means over a split D of `count` norms."""
    here = tokens / parts(table["res_batch"], mesh)
    means = count * work.norm_means
    return _one("norm", "all_reduce", table["res_embed"], mesh, here, dtype="float32", count=means) if means else []


# --- from one placement to another ---------------------------------------------------------------------

Placement = dict[str, tuple[str, ...]]  # dim -> mesh axes that split it; both sides of a move name the same dims


def reshard(
    purpose: str, elements: float, have: Placement, want: Placement, mesh, *, gather: str = "", dtype: str = "act"
) -> list[Collective]:
    """An array of `elements` from one placement to another, step for step as `manual.reshard`; gathers are counted
    under `gather` if given."""
    now, out = dict(have), []
    wanted = {a for axes in want.values() for a in axes}
    leaving = {a: dim for dim, axes in have.items() for a in axes if a not in want[dim]}

    def here() -> float:
        return elements / parts(tuple(a for axes in now.values() for a in axes), mesh)

    def gathered(dim: str, kept) -> None:
        gone, now[dim] = _without(now[dim], kept), tuple(a for a in now[dim] if a in kept)
        out.extend(_one(gather or purpose, "all_gather", gone, mesh, here(), dtype=dtype))

    for dim in have:  # rows stay in blocks: what neither layout continues is gathered first
        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(have[dim], want[dim], strict=False))
        shared = tuple(a for a, _ in pairs)
        if dim != "heads" and shared not in (tuple(have[dim]), tuple(want[dim])):
            gathered(dim, shared)
            leaving = {a: d for a, d in leaving.items() if d != dim or a in shared}
    for dim in want:
        added = list(_without(want[dim], now[dim]))
        if added:
            gathered(dim, wanted)
        while added:
            source = leaving.get(added[0])
            run = [added.pop(0)]
            if source is not None:
                while added and leaving.get(added[0]) == source:
                    run.append(added.pop(0))
                gathered(source, wanted)
                out += _one(purpose, "all_to_all", run, mesh, here(), dtype=dtype)
                now[source] = _without(now[source], run)
                leaving = {a: d for a, d in leaving.items() if a not in run}
            now[dim] += tuple(run)
    for dim in want:
        gathered(dim, want[dim])
    return out


def reduce(
    purpose: str, elements: float, partial, have: Placement, want: Placement, mesh, *, dtype: str = "act"
) -> list[Collective]:
    """A sum over `partial` ended in another placement, step for step as `manual.reduce`."""
    out = []
    leaving = [a for dim, axes in have.items() for a in axes if a not in want[dim]]
    if leaving:
        first = {d: tuple(a for a in axes if a in have[d] or a in leaving) for d, axes in want.items()}
        out, have = reshard(purpose, elements, have, first, mesh, dtype=dtype), first
    now, scattered = dict(have), []
    for dim in want:
        held = [a for axes in now.values() for a in axes]
        now[dim] += tuple(a for a in want[dim] if a not in partial and a not in held)
        into = tuple(a for a in want[dim] if a in partial and a not in now[dim])
        here = elements / parts(tuple(a for axes in now.values() for a in axes), mesh)
        out += _one(purpose, "reduce_scatter", into, mesh, here, dtype=dtype)
        now[dim] = tuple(a for a in want[dim] if a in now[dim] + into) + _without(now[dim], want[dim])
        scattered += into
    here = elements / parts(tuple(a for axes in now.values() for a in axes), mesh)
    out += _one(purpose, "all_reduce", _without(partial, scattered), mesh, here, dtype=dtype)
    return out + reshard(purpose, elements, now, want, mesh, dtype=dtype)


def _place(table: Rules, **names: str) -> Placement:
    return {dim: tuple(table[name]) for dim, name in names.items()}


def _without(axes, gone) -> tuple[str, ...]:
    return tuple(a for a in axes if a not in gone)


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
        pair = residual_pair("attention", table, mesh, rows * work.d_model)
        one += norms(layer.norms, work, table, mesh, rows)
        one += [] if work.residual == "parallel" else pair
        one += pair[:1] if layer.kv_norm else []  # the owner's K, V read the stream through a norm of their own
        if layer.owner:
            one += kv(layer, table, mesh, rows, fresh)
        for dim, elements in (
            ("mlp", layer.mlp_in),
            ("mlp", layer.mlp_out),
            ("q_heads", layer.q),
            ("q_heads", layer.o),
            ("k_heads", layer.k),
            ("v_heads", layer.v),
        ):
            one += gather_weights(table, mesh, dim, elements) if elements else []
        found += [dataclasses.replace(c, count=c.count * layer.count) for c in one]
    merged: dict[Collective, int] = {}
    for c in found:
        key = dataclasses.replace(c, count=1)
        merged[key] = merged.get(key, 0) + c.count
    return tuple(dataclasses.replace(c, count=count) for c, count in merged.items())
