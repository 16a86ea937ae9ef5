"""Collectives written out: how an array inside `jax.shard_map` goes from one layout to another.

A local array does not know how it is split, so every function here is told: a layout is, per dim, the tuple of mesh
axes that split it, major first. `sharding.layout.moves` lists the steps between two layouts; `reshard` and `reduce`
run them:

    BLE_x @ E_x F_yz = BLF_yz (partialsum-x) --reduce-scatter(x)--> BLF_xyz
"""

import math
from collections.abc import Mapping

import jax
from jax import lax

from sharding.layout.moves import Axes, Split, Step, full_order, moves

_IN_BLOCKS: Mapping[int, Axes] = {}


# --- layouts -----------------------------------------------------------------------------------------------


def reshard(
    x: jax.Array, have: Split, want: Split, mesh: Mapping[str, int], orders: Mapping[int, Axes] = _IN_BLOCKS
) -> jax.Array:
    """x, split as `have`, becomes split as `want`. `orders`: as in `moves`, which may refuse."""
    return run(x, moves(have, want, orders=orders), mesh)


def reduce(
    x: jax.Array,
    partial: Axes,
    have: Split,
    want: Split,
    mesh: Mapping[str, int],
    orders: Mapping[int, Axes] = _IN_BLOCKS,
) -> jax.Array:
    """Ends a partial sum over `partial` in the layout `want`. `orders`: as in `moves`, which may refuse."""
    return run(x, moves(have, want, partial, orders), mesh)


def run(x: jax.Array, steps: tuple[Step, ...], mesh: Mapping[str, int]) -> jax.Array:
    """x after `steps`, one after another."""
    for step in steps:
        x = _RUN[step.kind](x, step, mesh)
    return x


def _all_gather(x: jax.Array, step: Step, mesh: Mapping[str, int]) -> jax.Array:
    dim = step.dim
    return gather(x, dim, step.have[dim], step.then[dim], mesh, step.order[dim])


def _slice(x: jax.Array, step: Step, mesh: Mapping[str, int]) -> jax.Array:
    return slice_(x, step.dim, step.have[step.dim], step.axes[0], step.order[step.dim], mesh)


def _reduce_scatter(x: jax.Array, step: Step, mesh: Mapping[str, int]) -> jax.Array:
    return scatter(x, step.dim, step.have[step.dim], step.axes, step.order[step.dim], mesh)


def _all_reduce(x: jax.Array, step: Step, mesh: Mapping[str, int]) -> jax.Array:
    return lax.psum(x, step.axes)


def _all_to_all(x: jax.Array, step: Step, mesh: Mapping[str, int]) -> jax.Array:
    return exchange(x, step.source, step.dim, step.axes, step.have, step.order, mesh)


_RUN = {
    "slice": _slice,
    "all_to_all": _all_to_all,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_reduce": _all_reduce,
}


# --- one dim, one kind of change ---------------------------------------------------------------------------


def gather(
    x: jax.Array, dim: int, have: Axes, want: Axes, mesh: Mapping[str, int], full: Axes | None = None
) -> jax.Array:
    """All-gather: `dim`, split over `have`, becomes split over `want`, a part of `have`. `full`: the order in which
    the dim is split by all axes of a longer move."""
    gone = tuple(a for a in have if a not in want)
    if not gone:
        return x
    full = full or full_order(have, want)
    if full[: len(have)] == have and have[: len(want)] == want:
        return _lean(lambda y, at: lax.all_gather(y, gone, axis=at, tiled=True), x, dim)
    y = lax.all_gather(x, gone, axis=dim, tiled=False)
    return _place(y, dim, gone, full, have, mesh)


def slice_(x: jax.Array, dim: int, have: Axes, axis: str, full: Axes, mesh: Mapping[str, int]) -> jax.Array:
    """Keeps this chip's part of `dim` along `axis`: no communication. `full`: the order in which the dim is split by
    all axes of the move."""
    y = _open(x, dim, full, have, mesh)
    at = dim + [a for a in full if a not in have].index(axis)
    y = lax.dynamic_index_in_dim(y, lax.axis_index(axis), at, keepdims=False)
    return _close(y, dim, len(full) - len(have) - 1)


def scatter(x: jax.Array, dim: int, have: Axes, axes: Axes, full: Axes, mesh: Mapping[str, int]) -> jax.Array:
    """Reduce-scatter: a partial sum over `axes`, neighbours in `full`, is summed, and `dim` split over them."""
    y = _open(x, dim, full, have, mesh)
    missing = [a for a in full if a not in have]
    at = dim + missing.index(axes[0])
    y = y.reshape(*y.shape[:at], -1, *y.shape[at + len(axes) :])
    y = _lean(lambda y, at: lax.psum_scatter(y, axes, scatter_dimension=at, tiled=True), y, at)
    return _close(y.reshape(*y.shape[:at], *y.shape[at + 1 :]), dim, len(missing) - len(axes))


def exchange(
    x: jax.Array, source: int, target: int, axes: Axes, have: Split, full: Split, mesh: Mapping[str, int]
) -> jax.Array:
    """All-to-all: `axes`, neighbours in the target's order, stop splitting dim `source` and split dim `target`
    instead. `full`: per dim, the order in which it is split by all axes of the move."""
    missing = [a for a in full[target] if a not in have[target]]
    at = target + missing.index(axes[0])
    y = _open(x, target, full[target], have[target], mesh)
    y = y.reshape(*y.shape[:at], -1, *y.shape[at + len(axes) :])
    opened = len(missing) - len(axes)  # dims of `target` still open after the exchange
    place = source if source < target else source + opened
    y = lax.all_to_all(y, axes, split_axis=at, concat_axis=place, tiled=False)
    y = _close(y, target + (1 if source < target else 0), opened)
    return _place(y, source, axes, full[source], have[source], mesh)


# --- views: a dim as [sizes of the axes it is not split over ..., what is left] ----------------------------


def _open(x: jax.Array, dim: int, full: Axes, have: Axes, mesh: Mapping[str, int]) -> jax.Array:
    """Splits `dim` into one dim for each axis of `full` that is not in `have`, and the rest."""
    sizes = [mesh[a] for a in full if a not in have]
    return x.reshape(*x.shape[:dim], *sizes, x.shape[dim] // math.prod(sizes), *x.shape[dim + 1 :])


def _close(x: jax.Array, dim: int, opened: int) -> jax.Array:
    """Joins `opened` dims and the rest after them into one again."""
    size = math.prod(x.shape[dim : dim + opened + 1])
    return x.reshape(*x.shape[:dim], size, *x.shape[dim + opened + 1 :])


def _lean(collective, x: jax.Array, dim: int) -> jax.Array:
    """collective(x, dim) on x without its other dims of size 1, which a TPU would pad to a tile of 8."""
    kept = [d for d in range(x.ndim) if d == dim or x.shape[d] > 1]
    y = collective(x.reshape([x.shape[d] for d in kept]), kept.index(dim))
    sizes = iter(y.shape)
    return y.reshape([next(sizes) if d in kept else 1 for d in range(x.ndim)])


def _place(y: jax.Array, dim: int, axes: Axes, full: Axes, have: Axes, mesh: Mapping[str, int]) -> jax.Array:
    """y has a new dim at `dim` that counts over `axes`, and after it the dim that was split over `have`: joins the two,
    the new values where `full` wants them among those of the axes that the dim was whole over."""
    whole = [a for a in full if a not in have]
    y = y.reshape(*y.shape[:dim], *(mesh[a] for a in axes), *y.shape[dim + 1 :])
    y = _open(y, dim + len(axes), full, have, mesh)
    now = [*axes, *whole]
    order = [now.index(a) for a in full if a in now]
    y = y.transpose([*range(dim), *(dim + i for i in order), *range(dim + len(now), y.ndim)])
    return _close(y, dim, len(now))
