"""What the kernels over 16-bit caches share: the plan of a launch, the items a CTA walks, masks and the online softmax.

Everything here is per CTA: `refs` are the operands and scratch of the kernel by name, x[64] one value a row of queries
(`Layout.WGMMA` reduced over columns) and s[64,block] one a row and key of a tile.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.contract import KV, NEGATIVE, Problem, key_positions
from pallas_kernels.gpu import _api, aot, schedule
from pallas_kernels.shapes import LOG2E, Blocks, blocks, round_up, row_positions, rows_of

ROWS = 64  # of a warpgroup matmul
BLOCK = 64  # keys a tile
LENGTH, FIRST, COUNT, START, EARLIER, TOTAL, POSITIONS = range(7)  # columns of rows[B,6 + R] int32, R of the last
ROW_TILES = 8  # each reads K and V again
INTERPRETED_WORKERS = 3
BEYOND = 2**30  # later than any position
BARRIER_BYTES = 1024  # and what the compiler aligns


def limits(p: Problem) -> str | None:
    """What no kernel over 16-bit caches serves."""
    if p.k_dtype not in ("bfloat16", "float16") or p.v_dtype != p.k_dtype or p.dtype != p.k_dtype:
        return (
            f"q, K and V are {p.dtype}, {p.k_dtype} and {p.v_dtype}; the tensor cores take one of bfloat16 and "
            "float16 for all (float32 would be rounded to ten bits)"
        )
    if p.k_lanes or p.v_lanes:
        return "16-bit caches must hold tokens along rows (lanes=False)"
    if p.page and p.page % ROWS:
        return f"pages hold {p.page} tokens; they must hold a multiple of {ROWS}"
    if p.slots % ROWS:
        return f"{p.slots} slots are not a multiple of {ROWS}; allocate more"
    if p.rows > ROWS * ROW_TILES:
        return f"{p.rows} query rows share a K head; at most {ROWS * ROW_TILES} do (heads of a group x tokens)"
    return None


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of one launch: warpgroups that take `turns` at the tiles, each with sums of its own; tiles in flight (a
    multiple of those), buffers for q, tiles of query rows and rows of each that are written, workers (see schedule.py).
    `interpreted`: P passes through shared memory."""

    p: Problem
    turns: int
    stages: int
    q_buffers: int
    tiles: int
    out_rows: int
    workers: int
    sink_blocks: int
    ring_sinks: int
    interpreted: bool

    @property
    def slots(self) -> int:
        if self.p.options.splits:
            return self.workers
        return schedule.slots(self.p.batch * self.p.groups, self.workers)


def plan(p: Problem, kv: KV, turns: int, stages: int, q_buffers: int, interpreted: bool) -> Plan:
    """The rest of a plan."""
    row_tiles = -(-p.rows // ROWS)
    workers = INTERPRETED_WORKERS if interpreted else max(1, aot.CORES // row_tiles)
    if p.options.splits:
        workers = p.batch * p.groups * p.options.splits
    sinks = -(-min(p.options.sinks, p.slots) // BLOCK) if p.options.window and not p.ring else 0
    rows = ROWS if row_tiles > 1 else round_up(p.rows, 8)
    return Plan(p, turns, stages, q_buffers, row_tiles, rows, workers, sinks, kv.ring_sinks, interpreted)


class Item(NamedTuple):
    """What a CTA does at a time: steps [low, high) of the keys of one sequence b and group, scalars read once."""

    b: Any
    group: Any
    low: Any
    high: Any
    length: Any
    first: Any
    start: Any


def item_of(plan: Plan, refs: dict[str, Any], i) -> Item:
    """Item i of this CTA."""
    rows = refs["rows"]
    b, group, low, high = schedule.item(
        refs["work"], lax.axis_index("worker"), i, lambda b: rows[b, COUNT], plan.p.groups
    )
    return Item(b, group, low, high, rows[b, LENGTH], rows[b, FIRST], rows[b, START])


def items_of(refs: dict[str, Any]):
    return schedule.items(refs["work"], lax.axis_index("worker"))


def positions_of(refs: dict[str, Any], item: Item):
    """Position of each of this CTA's rows of queries, int32 [64]."""
    here = refs["rows"].at[item.b, pl.ds(POSITIONS + lax.axis_index("tile") * ROWS, ROWS)]
    return plgpu.load(here, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def slot_of(plan: Plan, refs: dict[str, Any], i):
    """Slot of item i of this CTA."""
    worker = lax.axis_index("worker")
    return worker if plan.p.options.splits else refs["work"][worker, schedule.ROW] + i + worker


def block_of(plan: Plan, item: Item, step):
    """Block of keys that a step reads."""
    return Blocks(item.first, None, BLOCK, plan.sink_blocks).index(step, item.first)


def rows_here():
    """This CTA's rows of queries."""
    return pl.ds(pl.multiple_of(lax.axis_index("tile") * ROWS, ROWS), ROWS)


def place(plan: Plan, refs: dict[str, Any], item: Item, step):
    """(row of K and V, tokens in it) that a step reads: of the sequence, or of a page."""
    row, token = item.b, block_of(plan, item, step) * BLOCK
    if plan.p.page:
        row, token = refs["table"][item.b, lax.div(token, plan.p.page)], lax.rem(token, plan.p.page)
    return row, pl.ds(pl.multiple_of(token, BLOCK), BLOCK)


def drain(free, used, size: int) -> None:
    """Waits for the last release of each of `size` buffers, `used` times filled in turn: barriers end as they began."""
    for buffer in range(size):
        pl.when(buffer < used)(lambda buffer=buffer: plgpu.barrier_wait(free.at[buffer]))


# --- scores, masks, softmax ---------------------------------------------------------------------------------------


def start(value_dim: int):
    """(top, total, out) before the first key."""
    column = plgpu.Layout.WGMMA.reduce(1)
    top = plgpu.layout_cast(jnp.full((ROWS,), NEGATIVE, jnp.float32), column)
    total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), column)
    return top, total, plgpu.layout_cast(jnp.zeros((ROWS, value_dim), jnp.float32), plgpu.Layout.WGMMA)


def spread(x, shape):
    """x[rows] -> [rows,columns]."""
    return lax.broadcast_in_dim(x, shape, (0,))


def scaled(plan: Plan, s):
    """Scores in powers of two, soft-capped."""
    o = plan.p.options
    return jnp.tanh(s * (o.scale / o.soft_cap)) * (o.soft_cap * LOG2E) if o.soft_cap else s * (o.scale * LOG2E)


def keys_of(plan: Plan, item: Item, block):
    """Position of the key in each slot of `block`: the first slot's, or for a ring, whose slots hold any
    order, [block] int32 with BEYOND where there is no key. Taken before the scores, when registers are free."""
    begin = block * BLOCK + item.start
    if not plan.p.ring:
        return begin
    slot = plgpu.broadcasted_iota(jnp.int32, (BLOCK,), 0, layout=plgpu.Layout.WGMMA.reduce(0)) + begin
    key = key_positions(slot, item.length, plan.p.ring, plan.ring_sinks)
    return jnp.where(key < 0, BEYOND, key)


def mask(plan: Plan, item: Item, keys, at):
    """bool [64,block]: does the row at position at[64] see each key of `keys_of`?"""
    o, shape = plan.p.options, (ROWS, BLOCK)
    newest, oldest = at, at - o.window
    if plan.p.ring:
        key, sinks = lax.broadcast_in_dim(keys, shape, (1,)), o.sinks
    else:  # counted from the block's first slot: columns are constants
        key, sinks = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA), o.sinks - keys
        newest, oldest = jnp.minimum(at, item.length - 1) - keys, oldest - keys
    seen = key <= spread(newest, shape)
    if o.window:
        near = key > spread(oldest, shape)
        seen = seen & (near | (key < sinks) if o.sinks else near)
    return seen


def softmax(s, top, total):
    """(new top, new total, what the sums so far are to be multiplied by, weights) of scores s[64,block]."""
    new = jnp.maximum(top, jnp.max(s, axis=1))
    shrink = jnp.exp2(top - new)
    weights = jnp.exp2(s - spread(new, s.shape))
    return new, total * shrink + jnp.sum(weights, axis=1), shrink, weights


def scores(q, k):
    """S[64,block] float32 of q[64,H] and k[block,H] in shared memory."""

    def product(acc):
        plgpu.wgmma(acc, q, k.T)
        return acc[...]

    return pl.run_scoped(product, plgpu.ACC((ROWS, BLOCK), jnp.float32))


def accumulate(plan: Plan, refs: dict[str, Any], turn, out, weights, v):
    """out[64,V] + weights[64,block] v[block,V]."""
    if plan.interpreted:
        held = refs["p_smem"].at[turn]
        held[...] = weights
        plgpu.commit_smem()

        def product(acc):
            plgpu.wgmma(acc, held, v)
            return acc[...]

        return out + pl.run_scoped(product, plgpu.ACC(out.shape, jnp.float32))
    return pl.run_state(lambda acc: plgpu.wgmma(acc, weights, v))(plgpu.ACC.init(out))


# --- around the kernel --------------------------------------------------------------------------------------------


def operands(q: jax.Array, kv: KV, positions: jax.Array, plan: Plan) -> dict[str, jax.Array]:
    """What the kernel is given, by the names it uses."""
    p = plan.p
    steps = blocks(kv, positions, p.options, BLOCK)
    begin = jnp.int32(0) if kv.start is None else jnp.asarray(kv.start, jnp.int32)
    if p.options.splits:
        work = schedule.split(steps.count, p.groups, p.options.splits)
    else:
        work = schedule.even(steps.count, p.groups, plan.workers)
    columns = (
        kv.length,
        steps.first,
        steps.count,
        jnp.broadcast_to(begin, kv.length.shape),
        *schedule.before(steps.count),
    )
    rows = jnp.concatenate([jnp.stack(columns, axis=1).astype(jnp.int32), row_positions(positions, p, ROWS)], axis=1)
    given = dict(work=work, rows=rows, q=rows_of(q, p, ROWS), k=kv.k.values)
    if kv.v is not None:
        given["v"] = kv.v.values
    if p.page:
        given["table"] = kv.table
    return given


def launch(plan: Plan, body, given: dict[str, jax.Array], scratch: dict[str, Any], threads: int, name: str, interpret):
    """Partial of body(plan, refs) over workers and tiles of rows, with `threads` warpgroups each: the body writes
    acc[turns,slots,tiles,R,V], top and total[turns,slots,tiles,64], which are merged."""
    names = (*given, "acc", "top", "total")
    lead = (plan.turns, plan.slots, plan.tiles)

    def kernel(*refs, **held):
        body(plan, {**dict(zip(names, refs, strict=True)), **held})

    parts = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((*lead, plan.out_rows, plan.p.value_dim), jnp.float32),
            *[jax.ShapeDtypeStruct((*lead, ROWS), jnp.float32)] * 2,
        ],
        scratch_types=scratch,
        grid=(plan.workers, plan.tiles),
        grid_names=("worker", "tile"),
        num_threads=threads,
        thread_name="wg",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=_api.interpreter(interpret),
    )(*given.values())
    p = plan.p

    def where(rows, b, j):
        if p.options.splits:
            return (b * p.groups + j) * p.options.splits, jnp.int32(p.options.splits)
        return schedule.slots_of(b, j, rows[b, COUNT], rows[b, EARLIER], rows[b, TOTAL], p.groups, plan.workers)

    return schedule.merge(*parts, given["rows"], where, (p.batch, p.tokens, p.heads, p.groups), interpret)
