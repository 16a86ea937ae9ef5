"""Which CTA reads which blocks of keys, and how their partial results are joined.

A row here is one sequence and one group of heads: row b J + j of B J, of count[b] steps (blocks of keys). Workers are
CTAs; each walks consecutive rows (its items) and takes of them a range of steps:

    even    a fixed number of workers that share all steps of the batch out evenly, however uneven the lengths are: a
            long sequence is cut where the shares end, short ones are read several by one worker, and copies into
            shared memory run ahead from one row to the next
    split   `splits` workers a row, each with one share of it; a worker has one item

Both are tables that XLA makes from the lengths, so that nothing depends on lengths at compile time. Partial results go
to slots, those of one row to consecutive ones: worker w of `even` writes slot row + w, of `split` slot w.

Every kernel that XLA starts costs about two microseconds, beside some hundred for reading a whole cache: the tables are
element-wise sums over the sequences written out one by one, which XLA fuses as it would no reduction or scan (more than
UNROLLED sequences, whose cache takes longer to read too, cost a few launches more), and one kernel, `merge`, joins the
slots, however many a row has.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.contract import NEGATIVE, Partial
from pallas_kernels.gpu import _api
from pallas_kernels.shapes import split_range

ROW, LAST, LOW, HIGH = range(4)  # columns of work[workers,4] int32
UNROLLED = 64  # sequences whose sums are written out one by one; of more that takes the compiler long
TEAMS = 4  # warpgroups that share the slots of a row of queries
AHEAD = 2  # slots each reads at a time


def even(count: jax.Array, groups: int, workers: int) -> jax.Array:
    """work[workers,4]: the first A = min(workers, total) workers take steps [w total // A, (w + 1) total // A) of all
    rows in order, from step LOW of row ROW on, whole rows in between, to step HIGH (exclusive) of row LAST; the others
    have LAST < ROW. Each column is found from one step: the first two from the first, the others from the last."""
    whole = jnp.maximum(groups * count.sum(dtype=jnp.int32), 1)
    active = jnp.minimum(workers, whole)
    worker, column = (lax.broadcasted_iota(jnp.int32, (workers, 4), axis) for axis in range(2))
    of_end = (column == LAST) | (column == HIGH)
    step = jnp.where(of_end, (worker + 1) * whole // active - 1, worker * whole // active)
    b, first, steps = _find(step, count, groups)
    row, within = b * groups + (step - first) // steps, (step - first) % steps + of_end.astype(jnp.int32)
    found = jnp.where((column == ROW) | (column == LAST), row, within)
    return jnp.where((worker < active) & (count.sum(dtype=jnp.int32) > 0), found, jnp.where(column == LAST, -1, 0))


def _find(step: jax.Array, count: jax.Array, groups: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(sequence b that holds step `step` of all, its first step, count[b] or 1), each of step's shape (two axes)."""
    if count.shape[0] > UNROLLED:
        ends = groups * jnp.cumsum(count)
        b = jnp.minimum((ends[None, None] <= step[..., None]).sum(-1, dtype=jnp.int32), count.shape[0] - 1)
        return b, (ends - groups * count)[b], jnp.maximum(count[b], 1)
    b, first, steps = jnp.zeros_like(step), jnp.zeros_like(step), jnp.ones_like(step)
    begin = jnp.int32(0)  # of sequence i; scalars, which XLA adds up apart from the fusion: it compiles sooner
    for i in range(count.shape[0]):
        n = count[i]
        here = (step >= begin) & (n > 0)
        b, first, steps = jnp.where(here, i, b), jnp.where(here, begin, first), jnp.where(here, n, steps)
        begin = begin + groups * n
    return b, first, steps


def before(count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(steps of one group in the sequences before each [B], in all [B] alike)."""
    total = jnp.broadcast_to(count.sum(dtype=jnp.int32), count.shape)
    if count.shape[0] > UNROLLED:
        return jnp.cumsum(count) - count, total
    index, earlier = lax.iota(jnp.int32, count.shape[0]), jnp.zeros_like(count)
    for b in range(count.shape[0] - 1):
        earlier = earlier + jnp.where(index > b, count[b], 0)
    return earlier, total


def split(count: jax.Array, groups: int, splits: int) -> jax.Array:
    """work[B J splits,4]: worker r splits + s takes share s of row r."""
    shape = (count.shape[0], groups, splits, 4)
    b, j, s, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(4))
    low, high = split_range(jnp.broadcast_to(count[:, None, None, None], shape), splits, s)
    found = jnp.where(column == LOW, low, jnp.where(column == HIGH, high, b * groups + j))
    return found.reshape(-1, 4)


def items(work: Any, worker: Any) -> Any:
    """Items of a worker; `work` is read inside a kernel."""
    return jnp.maximum(work[worker, LAST] - work[worker, ROW] + 1, 0)


def item(work: Any, worker: Any, i: Any, count: Any, groups: int) -> tuple[Any, Any, Any, Any]:
    """(sequence, group, low, high) of item i of a worker; `work` and `count(b)` are read inside a kernel."""
    row = work[worker, ROW] + i
    b = lax.div(row, jnp.int32(groups))
    low = jnp.where(i == 0, work[worker, LOW], 0)
    high = jnp.where(row == work[worker, LAST], work[worker, HIGH], count(b))
    return b, lax.rem(row, jnp.int32(groups)), low, high


def slots(rows: int, workers: int) -> int:
    """Slots that `even` needs for B J = `rows`."""
    return rows + workers


def slots_of(b: Any, j: Any, count: Any, earlier: Any, total: Any, groups: int, workers: int) -> tuple[Any, Any]:
    """(first slot, how many) of row b J + j of `even`, where sequence b has `count` steps and `before` gives the
    others: worker w wrote slot row + w if it took steps of that row."""
    whole = jnp.maximum(total * groups, 1)
    active = jnp.minimum(workers, whole)

    def worker_of(step):
        return lax.div((step + 1) * active - 1, whole)

    begin = earlier * groups + j * count
    first = worker_of(begin)
    return b * groups + j + first, jnp.where(count > 0, worker_of(begin + count - 1) - first + 1, 0)


def merge(acc: jax.Array, top: jax.Array, total: jax.Array, table: jax.Array, where: Any, shape: Any, interpret: Any):
    """Joins slots: acc[turns,slots,tiles,R,V] float32, top and total[turns,slots,tiles,64] (as `contract.combine` has
    them; slots of no row may hold anything) -> Partial of `shape` (B, T, N, groups). where(table, b, j) -> (first slot,
    how many) of a row, read inside the kernel.

    One CTA has one row of queries. Its warpgroups share the slots out and read several at a time, those that are not
    there as the last with weight 0, and the first of them joins what they have.
    """
    turns, _, tiles, _, width = acc.shape
    teams = 2 if interpret else TEAMS
    batch, tokens, heads, groups = shape
    group, lanes = heads // groups, top.shape[-1]
    layout = plgpu.Layout.WGMMA.reduce(1)
    if width % 128 == 0:
        layout = plgpu.Layout.WG_STRIDED((width,), vec_size=math.gcd(4, width // 128))

    def full(value):
        return plgpu.layout_cast(jnp.full((width,), value, jnp.float32), layout)

    def join(carry, tops, totals, values):
        """Adds parts to (top, total, out), all [V]: the same top and total in every element."""
        old, held, out = carry
        best = old
        for x in tops:
            best = jnp.maximum(best, x)
        shrink = jnp.exp2(old - best)
        held, out = held * shrink, out * shrink
        for x, sums, value in zip(tops, totals, values, strict=True):
            weight = jnp.exp2(x - best)
            held, out = held + weight * sums, out + weight * value
        return best, held, out

    def kernel(acc, top, total, table, out, best, held, parts, done):
        n, t, b, team = (lax.axis_index(name) for name in ("head", "token", "batch", "team"))
        j, row = lax.div(n, jnp.int32(group)), lax.rem(n, jnp.int32(group)) * tokens + t
        tile, row = (lax.div(row, jnp.int32(lanes)), lax.rem(row, jnp.int32(lanes))) if tiles > 1 else (0, row)
        first, count = where(table, b, j)
        count = count * turns

        def step(i, carry):
            tops, totals, values = [], [], []
            for ahead in range(AHEAD):
                part = (i * AHEAD + ahead) * teams + team
                at = jnp.minimum(part, count - 1)
                at = lax.rem(at, jnp.int32(turns)), first + lax.div(at, jnp.int32(turns)), tile
                here = part < count
                tops.append(full(jnp.where(here, top[*at, row], 2 * NEGATIVE)))
                totals.append(full(jnp.where(here, total[*at, row], 0.0)))
                values.append(plgpu.load(acc.at[*at, row], layout=layout, optimized=False))
            return join(carry, tops, totals, values)

        each = teams * AHEAD
        mine = lax.fori_loop(
            0, lax.div(count + each - 1, jnp.int32(each)), step, (full(NEGATIVE), full(0.0), full(0.0))
        )
        for k, x in enumerate(mine):
            parts[k, team] = x
        plgpu.barrier_arrive(done)
        plgpu.barrier_wait(done)

        @pl.when(team == 0)
        def _():
            given = [
                [plgpu.load(parts.at[k, i], layout=layout, optimized=False) for i in range(1, teams)] for k in range(3)
            ]
            a, s, o = join(mine, *given)
            out[b, t, n] = o / jnp.where(s == 0.0, 1.0, s)
            best[b, t, n] = jnp.max(jnp.where(s == 0.0, NEGATIVE, a * math.log(2)))
            held[b, t, n] = jnp.max(s)

    stats = jax.ShapeDtypeStruct((batch, tokens, heads), jnp.float32)
    return Partial(
        *plgpu.kernel(
            kernel,
            out_type=[jax.ShapeDtypeStruct((batch, tokens, heads, width), jnp.float32), stats, stats],
            scratch_types=dict(
                parts=plgpu.SMEM((3, teams, width), jnp.float32), done=plgpu.Barrier(num_arrivals=teams)
            ),
            grid=(heads, tokens, batch),
            grid_names=("head", "token", "batch"),
            num_threads=teams,
            thread_name="team",
            kernel_name="decode_merge",
            interpret=_api.interpreter(interpret),
            compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=1024),
        )(acc, top, total, table)
    )
