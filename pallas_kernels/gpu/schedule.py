"""Which CTA reads which blocks of keys, and how their partial results are joined.

A row here is one sequence and one group of heads: row b J + j of B J, of count[b] steps (blocks of keys). Workers are
CTAs; each walks `items` consecutive rows and takes of them a range of steps:

    even    a fixed number of workers that share all steps of the batch out evenly, however uneven the lengths are: a
            long sequence is cut where the shares end, short ones are read several by one worker, and copies into
            shared memory run ahead from one row to the next
    split   `splits` workers a row, each with one share of it; a worker has one item

Both are lists made by XLA from the lengths, so that nothing depends on lengths at compile time. Partial results go to
slots: item i of worker w has slot first_slot[w] + i.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.contract import NEGATIVE
from pallas_kernels.shapes import split_range

ROW, ITEMS, LOW, HIGH, SLOT = range(5)  # columns of work[workers,5] int32


def even(count: jax.Array, groups: int, workers: int) -> jax.Array:
    """work[workers,5]: worker w takes steps [w total // workers, (w + 1) total // workers) of all rows in order, from
    step LOW of row ROW on, whole rows in between, to step HIGH (exclusive) of the last; slots: ROW + w."""
    total = groups * count.sum()
    worker = jnp.arange(workers, dtype=jnp.int32)
    begin, end = worker * total // workers, (worker + 1) * total // workers
    row, low = _find(begin, count, groups)
    last, high = _find(end - 1, count, groups)
    items = jnp.where(end > begin, last - row + 1, 0)
    return jnp.stack([row, items, low, high + 1, row + worker], axis=1)


def _find(step: jax.Array, count: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
    """Row that holds global step `step`, and the step within it."""
    ends = jnp.cumsum(count) * groups
    b = jnp.minimum((ends[None, :] <= step[:, None]).sum(1, dtype=jnp.int32), count.shape[0] - 1)
    within, each = step - (ends - count * groups)[b], jnp.maximum(count[b], 1)
    return b * groups + within // each, within % each


def split(count: jax.Array, groups: int, splits: int) -> jax.Array:
    """work[B J splits,5]: worker r splits + s takes share s of row r."""
    worker = jnp.arange(count.shape[0] * groups * splits, dtype=jnp.int32)
    row = worker // splits
    low, high = split_range(count[row // groups], splits, worker % splits)
    return jnp.stack([row, jnp.ones_like(row), low, high, worker], axis=1)


def item(work: Any, worker: Any, i: Any, count: Any, groups: int) -> tuple[Any, Any, Any, Any]:
    """(sequence, group, low, high) of item i of a worker; `work` and `count(b)` are read inside a kernel."""
    row = work[worker, ROW] + i
    b = jax.lax.div(row, jnp.int32(groups))
    low = jnp.where(i == 0, work[worker, LOW], 0)
    high = jnp.where(i == work[worker, ITEMS] - 1, work[worker, HIGH], count(b))
    return b, jax.lax.rem(row, jnp.int32(groups)), low, high


def slots(rows: int, workers: int) -> int:
    """Slots that `even` needs for B J = `rows`."""
    return rows + workers


def merge(acc: jax.Array, top: jax.Array, total: jax.Array, count: jax.Array, groups: int, workers: int):
    """Joins the slots of `even`: acc[turns,slots,R,V], top and total[turns,slots,R] (see `contract.combine`; slots of
    no row hold anything) -> the same with [turns,B J,...]."""
    slot = jnp.arange(acc.shape[1], dtype=jnp.int32)
    rows = count.shape[0] * groups
    row, used = rows_of_slots(slot, count, groups, workers)

    def one(acc, top, total):
        total = jnp.where(used[:, None], total, 0.0)
        top = jnp.where(total > 0, top, NEGATIVE)
        best = jax.ops.segment_max(top, row, rows, indices_are_sorted=True)
        best = jnp.maximum(best, NEGATIVE)  # -inf where a row has no slot
        weight = jnp.where(total > 0, jnp.exp2(top - best[row]), 0.0)
        held = jnp.where(used[:, None, None], acc, 0.0) * weight[..., None]
        return tuple(jax.ops.segment_sum(x, row, rows, indices_are_sorted=True) for x in (held, weight * total)), best

    (out, joined), best = jax.vmap(one)(acc, top, total)
    return out, best, joined


def rows_of_slots(slot: jax.Array, count: jax.Array, groups: int, workers: int) -> tuple[jax.Array, jax.Array]:
    """(row, used) of each slot: worker w wrote slot row + w if it took steps of that row; those that did are from the
    one with the row's first step to the one with its last, less workers without any step (few steps, many workers)."""
    each = jnp.repeat(count, groups)
    whole, ends = jnp.maximum(groups * count.sum(), 1), jnp.cumsum(each)
    index = jnp.arange(each.shape[0], dtype=jnp.int32)

    def worker_of(step):
        return ((step + 1) * workers - 1) // whole

    first = index + worker_of(jnp.minimum(ends - each, whole - 1))
    last = jnp.where(each > 0, index + worker_of(ends - 1), -1)
    row = jnp.maximum((first[None, :] <= slot[:, None]).sum(1, dtype=jnp.int32) - 1, 0)
    worker = slot - row
    busy = (worker + 1) * whole // workers > worker * whole // workers
    return row, busy & (slot >= first[row]) & (slot <= last[row])
