"""Decode over bf16 and f16 caches on Hopper: one warpgroup copies tiles of K and V, one or two others multiply.

    S[64,block] = Q[64,H] K^T;  P = 2^(scale S - top);  O[64,V] = O 2^(old top - top) + P V

The query rows of a group (heads of the group x tokens) are padded to the 64 rows of a warpgroup matmul: at bf16 that
costs 64 FLOP a byte read, well below what the tensor cores have to spare. More than 64 rows are several tiles of rows,
each with its own CTA beside the others, so that the second reading of K and V comes from L2.
Two multiplying warpgroups take turns at the tiles, each with sums of its own, so that the one's softmax runs beside the
other's products; values of 256 columns leave registers for one only.
P stays in registers; in the interpreter, which has no register operands, it goes through shared memory.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.contract import KV, NEGATIVE, Partial, Problem, combine, key_positions
from pallas_kernels.gpu import _api, aot, schedule
from pallas_kernels.shapes import LOG2E, Blocks, blocks, heads_of, round_up, row_positions, rows_of, stats_of

ROWS = 64  # of a warpgroup matmul
LENGTH, FIRST, COUNT, START = range(4)  # columns of rows[B,4] int32
ROW_TILES = 8  # each reads K and V again
BEYOND = 2**30  # later than any position
BARRIER_BYTES = 1024  # and what the compiler aligns
INTERPRETED_WORKERS = 3
DIMS = (64, 128, 256)


def supports(p: Problem) -> str | None:
    """None if `run` serves `p`, else why not."""
    if p.view:
        return "V is a view of K of widths other than 576 and 512; hold V apart"
    if p.key_dim not in DIMS or p.value_dim not in DIMS:
        return f"head dims are {p.key_dim} and {p.value_dim}; they must be 64, 128 or 256"
    return shared_limits(p)


def shared_limits(p: Problem) -> str | None:
    """What this kernel and the latent one have in common."""
    if p.k_dtype not in ("bfloat16", "float16") or p.v_dtype != p.k_dtype or p.dtype != p.k_dtype:
        return (f"q, K and V are {p.dtype}, {p.k_dtype} and {p.v_dtype}; the tensor cores take one of bfloat16 and "
                "float16 for all (float32 would be rounded to ten bits)")
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
    """Sizes of one launch: keys a tile, tiles in flight (a multiple of `turns`: the warpgroups that multiply), buffers
    for q, tiles of query rows and rows of each that are written, workers (see schedule.py). `interpreted`: P passes
    through shared memory."""

    p: Problem
    block: int
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


def plan_of(p: Problem, kv: KV, interpreted: bool) -> Plan:
    """As many tiles in flight as the shared memory of one CTA holds besides q and the staged output, at most eight."""
    block, turns = ROWS, 1 if p.value_dim > 128 else 2
    q_buffers = 1 if max(p.key_dim, p.value_dim) > 128 else 2
    fixed = ROWS * (2 * q_buffers * p.key_dim + 4 * turns * p.value_dim) + BARRIER_BYTES
    stages = (aot.SHARED_BLOCK - fixed) // (2 * block * (p.key_dim + p.value_dim))
    stages = max(2, min(8, stages) // 2 * 2)
    tiles = -(-p.rows // ROWS)
    workers = INTERPRETED_WORKERS if interpreted else max(1, aot.CORES // tiles)
    if p.options.splits:
        workers = p.batch * p.groups * p.options.splits
    sinks = -(-min(p.options.sinks, p.slots) // block) if p.options.window and not p.ring else 0
    rows = ROWS if tiles > 1 else round_up(p.rows, 8)
    return Plan(p, block, turns, stages, q_buffers, tiles, rows, workers, sinks, kv.ring_sinks, interpreted)


def scratch(plan: Plan) -> dict[str, Any]:
    """Shared memory and barriers of one CTA."""
    p, n, q = plan.p, plan.stages, plan.q_buffers
    held = dict(
        q_smem=_api.tiled((q, ROWS, p.key_dim), p.k_dtype), k_smem=_api.tiled((n, plan.block, p.key_dim), p.k_dtype),
        v_smem=_api.tiled((n, plan.block, p.value_dim), p.k_dtype),
        o_smem=_api.tiled((plan.turns, ROWS, p.value_dim), jnp.float32),
    )
    if plan.interpreted:
        held["p_smem"] = _api.tiled((plan.turns, ROWS, plan.block), p.k_dtype)
    for name, count, readers in (("q", q, plan.turns), ("k", n, 1), ("v", n, 1)):
        held[f"{name}_ready"] = plgpu.Barrier(num_barriers=count)
        held[f"{name}_free"] = plgpu.Barrier(num_arrivals=readers, num_barriers=count)
    return held


def body(plan: Plan, refs: dict[str, Any]) -> None:
    """One CTA of the grid (`worker`, `tile`); refs by name, those of `operands`, `run` and `scratch`."""
    thread = lax.axis_index("wg")
    pl.when(thread < plan.turns)(lambda: _multiply(plan, refs, thread))
    pl.when(thread == plan.turns)(lambda: _copy(plan, refs))


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
        refs["work"], lax.axis_index("worker"), i, lambda b: rows[b, COUNT], plan.p.groups)
    return Item(b, group, low, high, rows[b, LENGTH], rows[b, FIRST], rows[b, START])


def items_of(refs: dict[str, Any]):
    return refs["work"][lax.axis_index("worker"), schedule.ITEMS]


def block_of(plan: Plan, item: Item, step):
    """Block of keys that a step reads."""
    return Blocks(item.first, None, plan.block, plan.sink_blocks).index(step, item.first)


def rows_here():
    """This CTA's rows of queries."""
    return pl.ds(pl.multiple_of(lax.axis_index("tile") * ROWS, ROWS), ROWS)


# --- the warpgroup that copies ------------------------------------------------------------------------------------


def _copy(plan: Plan, refs: dict[str, Any]) -> None:
    p, n = plan.p, plan.stages

    def item(i, done):
        it, buffer = item_of(plan, refs, i), lax.rem(i, plan.q_buffers)
        pl.when(i >= plan.q_buffers)(lambda: plgpu.barrier_wait(refs["q_free"].at[buffer]))
        plgpu.copy_gmem_to_smem(
            refs["q"].at[it.b, it.group, rows_here()], refs["q_smem"].at[buffer], refs["q_ready"].at[buffer])
        k_head, v_head = lax.div(it.group, p.groups // p.k_heads), lax.div(it.group, p.groups // p.v_heads)

        def step(j, done):
            stage = lax.rem(done, n)
            row, tokens = place(plan, refs, it, j)
            for name, head in (("k", k_head), ("v", v_head)):
                free = refs[f"{name}_free"].at[stage]
                pl.when(done >= n)(lambda free=free: plgpu.barrier_wait(free))
                plgpu.copy_gmem_to_smem(
                    refs[name].at[row, head, tokens], refs[f"{name}_smem"].at[stage], refs[f"{name}_ready"].at[stage])
            return done + 1

        return lax.fori_loop(it.low, it.high, step, done)

    items = items_of(refs)
    done = lax.fori_loop(0, items, item, jnp.int32(0))
    for name, used, size in (("q", items, plan.q_buffers), ("k", done, n), ("v", done, n)):
        drain(refs[f"{name}_free"], used, size)


def place(plan: Plan, refs: dict[str, Any], item: Item, step):
    """(row of K and V, tokens in it) that a step reads: of the sequence, or of a page."""
    row, token = item.b, block_of(plan, item, step) * plan.block
    if plan.p.page:
        row, token = refs["table"][item.b, lax.div(token, plan.p.page)], lax.rem(token, plan.p.page)
    return row, pl.ds(pl.multiple_of(token, plan.block), plan.block)


def drain(free, used, size: int) -> None:
    """Waits for the last release of each of `size` buffers, `used` times filled in turn: barriers end as they began."""
    for buffer in range(size):
        pl.when(buffer < used)(lambda buffer=buffer: plgpu.barrier_wait(free.at[buffer]))


# --- the warpgroup that multiplies --------------------------------------------------------------------------------


def _multiply(plan: Plan, refs: dict[str, Any], turn) -> None:
    p, n, turns = plan.p, plan.stages, plan.turns
    worker, tile = lax.axis_index("worker"), lax.axis_index("tile")
    column = plgpu.Layout.WGMMA.reduce(1)

    def item(i, done):
        it, buffer = item_of(plan, refs, i), lax.rem(i, plan.q_buffers)
        at = plgpu.load(refs["positions"].at[it.b, rows_here()], layout=column, optimized=False)
        first = lax.rem(turn + turns - lax.rem(done, turns), turns)  # steps of all items are taken in turns
        plgpu.barrier_wait(refs["q_ready"].at[buffer])

        def step(j, carry):
            top, total, out = carry
            mine = first + j * turns
            stage = lax.rem(done + mine, n)
            keys = keys_of(plan, it, block_of(plan, it, it.low + mine))
            plgpu.barrier_wait(refs["k_ready"].at[stage])
            s = scores(plan, refs["q_smem"].at[buffer], refs["k_smem"].at[stage])
            plgpu.barrier_arrive(refs["k_free"].at[stage])
            s = jnp.where(mask(plan, it, keys, at), scaled(plan, s), -jnp.inf)
            top, total, shrink, weights = softmax(s, top, total)
            out = out * spread(shrink, out.shape)
            plgpu.barrier_wait(refs["v_ready"].at[stage])
            out = accumulate(plan, refs, turn, out, weights.astype(p.k_dtype), refs["v_smem"].at[stage])
            plgpu.barrier_arrive(refs["v_free"].at[stage])
            return top, total, out

        steps = lax.div(jnp.maximum(it.high - it.low - first, 0) + (turns - 1), turns)
        top, total, out = lax.fori_loop(0, steps, step, start(p.value_dim))
        plgpu.barrier_arrive(refs["q_free"].at[buffer])
        slot = refs["work"][worker, schedule.SLOT] + i
        refs["top"][turn, slot, tile] = top
        refs["total"][turn, slot, tile] = total
        staged = refs["o_smem"].at[turn]
        staged[...] = out
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staged.at[pl.ds(0, plan.out_rows)], refs["acc"].at[turn, slot, tile])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        return done + it.high - it.low

    lax.fori_loop(0, items_of(refs), item, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def start(value_dim: int):
    """(top, total, out) before the first key."""
    column = plgpu.Layout.WGMMA.reduce(1)
    top = plgpu.layout_cast(jnp.full((ROWS,), NEGATIVE, jnp.float32), column)
    total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), column)
    return top, total, plgpu.layout_cast(jnp.zeros((ROWS, value_dim), jnp.float32), plgpu.Layout.WGMMA)


def spread(x, shape):
    """x[rows] -> [rows,columns]."""
    return lax.broadcast_in_dim(x, shape, (0,))


def scores(plan: Plan, q, k):
    """S[64,block] float32 of q[64,H] and k[block,H] in shared memory."""

    def product(acc):
        plgpu.wgmma(acc, q, k.T)
        return acc[...]

    return pl.run_scoped(product, plgpu.ACC((ROWS, plan.block), jnp.float32))


def scaled(plan: Plan, s):
    """Scores in powers of two, soft-capped."""
    o = plan.p.options
    return jnp.tanh(s * (o.scale / o.soft_cap)) * (o.soft_cap * LOG2E) if o.soft_cap else s * (o.scale * LOG2E)


def keys_of(plan: Plan, item: Item, block):
    """Position of the key in each slot of `block`: the first slot's, or for a ring, whose slots hold any
    order, [block] int32 with BEYOND where there is no key. Taken before the scores, when registers are free."""
    begin = block * plan.block + item.start
    if not plan.p.ring:
        return begin
    slot = plgpu.broadcasted_iota(jnp.int32, (plan.block,), 0, layout=plgpu.Layout.WGMMA.reduce(0)) + begin
    key = key_positions(slot, item.length, plan.p.ring, plan.ring_sinks)
    return jnp.where(key < 0, BEYOND, key)


def mask(plan: Plan, item: Item, keys, at):
    """bool [64,block]: does the row at position at[64] see each key of `keys_of`?"""
    o, shape = plan.p.options, (ROWS, plan.block)
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


def operands(q: jax.Array, kv: KV, positions: jax.Array, plan: Plan) -> tuple[dict[str, jax.Array], jax.Array]:
    """What the kernel is given, by the names it uses, and the steps of each sequence [B]."""
    p = plan.p
    steps = blocks(kv, positions, p.options, plan.block)
    begin = jnp.int32(0) if kv.start is None else jnp.asarray(kv.start, jnp.int32)
    rows = jnp.stack([kv.length, steps.first, steps.count, jnp.broadcast_to(begin, kv.length.shape)], axis=1)
    if p.options.splits:
        work = schedule.split(steps.count, p.groups, p.options.splits)
    else:
        work = schedule.even(steps.count, p.groups, plan.workers)
    given = dict(work=work, rows=rows.astype(jnp.int32), positions=row_positions(positions, p, ROWS),
                 q=rows_of(q, p, ROWS), k=kv.k.values)
    if kv.v is not None:
        given["v"] = kv.v.values
    if p.page:
        given["table"] = kv.table
    return given, steps.count


def launch(plan: Plan, body, given: dict[str, jax.Array], scratch: dict[str, Any], threads: int, name: str, interpret):
    """(acc[turns,slots,tiles,R,V], top and total[turns,slots,tiles,64]) of body(plan, refs) over workers and tiles of
    rows, with `threads` warpgroups each."""
    names = (*given, "acc", "top", "total")
    lead = (plan.turns, plan.slots, plan.tiles)

    def kernel(*refs, **held):
        body(plan, {**dict(zip(names, refs, strict=True)), **held})

    return plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct((*lead, plan.out_rows, plan.p.value_dim), jnp.float32),
                  *[jax.ShapeDtypeStruct((*lead, ROWS), jnp.float32)] * 2],
        scratch_types=scratch, grid=(plan.workers, plan.tiles), grid_names=("worker", "tile"), num_threads=threads,
        thread_name="wg", kernel_name=name, compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=_api.interpreter(interpret),
    )(*given.values())


def joined(plan: Plan, acc: jax.Array, top: jax.Array, total: jax.Array, count: jax.Array) -> Partial:
    """The Partial of what `launch` returned."""
    p, b, j = plan.p, plan.p.batch, plan.p.groups
    top, total = top[..., : plan.out_rows], total[..., : plan.out_rows]
    acc, top, total = (x.reshape(plan.turns, plan.slots, -1, *x.shape[4:]) for x in (acc, top, total))
    if p.options.splits:
        shape = (plan.turns, b, j, p.options.splits)
        each = [jnp.moveaxis(x.reshape(*shape, *x.shape[2:]), 3, 1) for x in (acc, top, total)]
        each = [x.reshape(-1, *x.shape[2:]) for x in each]
    else:
        parts = schedule.merge(acc, top, total, count, j, plan.workers)
        each = [x.reshape(-1, b, j, *x.shape[2:]) for x in parts]
    return combine(heads_of(each[0], p), stats_of(each[1], p), stats_of(each[2], p))


def run(q: jax.Array, kv: KV, positions: jax.Array, p: Problem, interpret) -> Partial:
    """Partial of q[B,T,N,H] at positions[B,T] over `kv`; see contract.py for shapes."""
    plan = plan_of(p, kv, bool(interpret))
    given, count = operands(q, kv, positions, plan)
    return joined(plan, *launch(plan, body, given, scratch(plan), plan.turns + 1, "decode_dense", interpret), count)
