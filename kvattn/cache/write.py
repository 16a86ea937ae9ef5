"""Writes of new tokens into a cache, in place: one token a row without a scatter where that is faster.

All functions take `held` and `new`, name -> array, where `axes[name]` is the dim that counts slots (2, or 3 for leaves
along lanes) and dim 0 counts sequences, or pages. new[name] has T slots. slots[B,T]: where each token goes, beyond the
array = nowhere. rows[B,T]: index of dim 0 (its page), None = the sequence itself.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from pallas_kernels.tpu.tuning import LANES

ROW_WRITES = 8  # up to this batch one token is written row by row in place (on CPU); above, by one scatter

Arrays = dict[str, jax.Array]


def write(held: Arrays, new: Arrays, axes: dict[str, int], rows: jax.Array | None, slots: jax.Array) -> Arrays:
    """`held` with `new` at `slots`; in place under donation. slots[B,K,T] (and rows): heads have slots of their own."""
    if slots.ndim == 3:
        return _write_heads(axes, held, new, rows, slots)
    row_by_row, loop, scatter = (functools.partial(f, axes) for f in (_write_rows, _write_loop, _write_scatter))
    if slots.shape[1] > 1:
        return scatter(held, new, rows, slots)
    few = row_by_row if slots.shape[0] <= ROW_WRITES else scatter
    return jax.lax.platform_dependent(held, new, rows, slots, cpu=few, tpu=loop, default=scatter)


def _size(held: Arrays, axes: dict[str, int]) -> int:
    name = next(iter(held))
    return held[name].shape[axes[name]]


def _at(leaf: jax.Array, axis: int, row: Any, slot: Any) -> tuple[Any, ...]:
    return tuple(row if dim == 0 else slot if dim == axis else 0 for dim in range(leaf.ndim))


def _write_rows(axes: dict[str, int], held: Arrays, new: Arrays, rows: jax.Array | None, slots: jax.Array) -> Arrays:
    """One token per row: a dynamic-update-slice per row, skipped where there is nothing to write.

    The branch also keeps XLA:CPU from fusing the update into its readers, which for a batch of one writes it
    twice (once for the attention, once for the result) and copies the cache four times to do so.
    """
    size = _size(held, axes)
    for b in range(slots.shape[0]):

        def write(held, b=b):
            row = b if rows is None else rows[b, 0]
            return {
                n: jax.lax.dynamic_update_slice(leaf, new[n][b : b + 1], _at(leaf, axes[n], row, slots[b, 0]))
                for n, leaf in held.items()
            }

        held = jax.lax.cond(slots[b, 0] < size, write, lambda held: held, held)
    return held


def _write_loop(axes: dict[str, int], held: Arrays, new: Arrays, rows: jax.Array | None, slots: jax.Array) -> Arrays:
    """One token per row, by a read and a dynamic-update-slice of that token per row: a TPU does them in place in any
    layout, where a scatter wants the cache in a layout of its own and copies it there and back. Where tokens lie along
    lanes, the tile of 128 that holds the token is written: a column alone would turn an int8 or int4 cache round."""
    size = _size(held, axes)

    def write(b, held):
        out = {}
        for n, leaf in held.items():
            slot, axis = jnp.minimum(slots[b, 0], size - 1), axes[n]
            width = LANES if axis == leaf.ndim - 1 and size % LANES == 0 else 1  # whole tiles along lanes
            row = jax.lax.dynamic_slice_in_dim(new[n], b, 1, 0)
            at = _at(leaf, axis, b if rows is None else rows[b, 0], slot // width * width)
            old = jax.lax.dynamic_slice(leaf, at, (*row.shape[:axis], width, *row.shape[axis + 1 :]))
            here = jax.lax.broadcasted_iota(jnp.int32, old.shape, axis) == slot % width
            changed = jnp.where(here & (slots[b, 0] < size), row, old)
            changed = jax.lax.dynamic_update_slice(leaf, changed, at)
            out[n] = with_layout_constraint(changed, Layout(tuple(range(leaf.ndim))))
        return out

    if slots.shape[0] > ROW_WRITES:
        return jax.lax.fori_loop(0, slots.shape[0], write, held)
    for b in range(slots.shape[0]):
        held = write(b, held)
    return held


def _write_scatter(axes: dict[str, int], held: Arrays, new: Arrays, rows: jax.Array | None, slots: jax.Array) -> Arrays:
    """Any number of tokens; slots beyond the cache are dropped."""
    first = jnp.arange(slots.shape[0])[:, None] if rows is None else rows
    out = {}
    for n, leaf in held.items():
        if axes[n] == 2:
            out[n] = leaf.at[first, :, slots].set(new[n].swapaxes(1, 2), mode="drop")
        else:
            out[n] = leaf.at[first, :, :, slots].set(jnp.moveaxis(new[n], 3, 1), mode="drop")
    return out


def _write_heads(axes: dict[str, int], held: Arrays, new: Arrays, rows: jax.Array | None, slots: jax.Array) -> Arrays:
    """One scatter where every head has slots[B,K,T] of its own: into [B,K,S,...], or with rows[B,K,T] (pages of one
    head each) into pools [pages,1,P,...]."""
    batch, heads, _ = slots.shape
    b, k = jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, :, None]
    first, head = (b, k) if rows is None else (rows, jnp.zeros_like(rows))
    out = {}
    for n, leaf in held.items():
        values = jnp.moveaxis(new[n], axes[n], 2)  # [B,K,T,...]
        at = (first, head, slots) if axes[n] == 2 else (first, head, slice(None), slots)
        out[n] = leaf.at[at].set(values, mode="drop")
    return out
