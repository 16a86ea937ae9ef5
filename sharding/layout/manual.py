"""Collectives written out: how an array inside `jax.shard_map` goes from one layout to another.

A local array does not know how it is split, so every function here is told: a layout is, per dim, the tuple of
mesh axes that split it, major first. `reshard` moves between two layouts, `reduce` ends a partial sum in one (the
"partialsum-x" of Pope et al., arXiv 2211.05102, table of section 3):

    BLE_x @ E_x F_yz = BLF_yz (partialsum-x) --reduce-scatter(x)--> BLF_xyz
"""

import math
from collections.abc import Mapping

import jax
from jax import lax

from sharding.layout.rules import ShardingError

Axes = tuple[str, ...]
Split = tuple[Axes, ...]  # per dim, the mesh axes that split it
_IN_BLOCKS: Mapping[int, Axes] = {}  # no dim's entries in an order of their own


# --- views: a dim as [sizes of the axes it is not split over ..., what is left] ----------------------------


def _full(have: Axes, want: Axes) -> Axes:
    """The order in which a dim would be split by all axes of both; one must contain the other."""
    long, short = (want, have) if set(have) <= set(want) else (have, want)
    if [a for a in long if a in short] != list(short):
        raise ShardingError(
            f"a dim split over {'+'.join(have) or 'nothing'} cannot become {'+'.join(want) or 'whole'} "
            "without moving rows between the blocks; take another layout."
        )
    return long


def _open(x: jax.Array, dim: int, full: Axes, have: Axes, mesh: Mapping[str, int]) -> jax.Array:
    """Splits `dim` into one dim for each axis of `full` that is not in `have`, and the rest."""
    sizes = [mesh[a] for a in full if a not in have]
    return x.reshape(*x.shape[:dim], *sizes, x.shape[dim] // math.prod(sizes), *x.shape[dim + 1 :])


def _close(x: jax.Array, dim: int, opened: int) -> jax.Array:
    """Joins `opened` dims and the rest after them into one again."""
    size = math.prod(x.shape[dim : dim + opened + 1])
    return x.reshape(*x.shape[:dim], size, *x.shape[dim + opened + 1 :])


# --- one dim, one kind of change ---------------------------------------------------------------------------


def gather(
    x: jax.Array, dim: int, have: Axes, want: Axes, mesh: Mapping[str, int], full: Axes | None = None
) -> jax.Array:
    """All-gather: `dim`, split over `have`, becomes split over `want`, a part of `have`. `full`: the order in which
    the dim is split by all axes of a longer move."""
    gone = tuple(a for a in have if a not in want)
    if not gone:
        return x
    full = full or _full(have, want)
    if full[: len(have)] == have and have[: len(want)] == want:
        return _lean(lambda y, at: lax.all_gather(y, gone, axis=at, tiled=True), x, dim)
    y = lax.all_gather(x, gone, axis=dim, tiled=False)
    return _place(y, dim, gone, full, have, mesh)


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


def slice_(
    x: jax.Array, dim: int, have: Axes, axis: str, want: Axes, mesh: Mapping[str, int], full: Axes | None = None
) -> jax.Array:
    """Keeps this chip's part of `dim` along `axis`: no communication."""
    full = full or _full(have, want)
    y = _open(x, dim, full, have, mesh)
    at = dim + [a for a in full if a not in have].index(axis)
    y = lax.dynamic_index_in_dim(y, lax.axis_index(axis), at, keepdims=False)
    return _close(y, dim, len(full) - len(have) - 1)


def scatter(x: jax.Array, dim: int, have: Axes, axes: Axes, want: Axes, mesh: Mapping[str, int]) -> jax.Array:
    """Reduce-scatter: a partial sum over `axes` is summed, and `dim` split over them."""
    full = _full(have, want)
    y = _open(x, dim, full, have, mesh)
    missing = [a for a in full if a not in have]
    at = dim + missing.index(axes[0])
    if tuple(missing[at - dim : at - dim + len(axes)]) != axes:
        for one in axes:
            x = scatter(x, dim, have, (one,), want, mesh)
            have = tuple(a for a in full if a in (*have, one))
        return x
    y = y.reshape(*y.shape[:at], -1, *y.shape[at + len(axes) :])
    y = _lean(lambda y, at: lax.psum_scatter(y, axes, scatter_dimension=at, tiled=True), y, at)
    return _close(y.reshape(*y.shape[:at], *y.shape[at + 1 :]), dim, len(missing) - len(axes))


def exchange(
    x: jax.Array, source: int, target: int, axes: Axes, have: Split, full: Split, mesh: Mapping[str, int]
) -> jax.Array:
    """All-to-all: `axes` stop splitting dim `source` and split dim `target` instead. `full`: per dim, the order in
    which it is split by all axes of the move."""
    missing = [a for a in full[target] if a not in have[target]]
    moved = tuple(a for a in missing if a in axes)
    at = target + missing.index(moved[0])
    if tuple(missing[at - target : at - target + len(moved)]) != moved:
        raise ShardingError(f"axes {'+'.join(axes)} are not neighbours in the order of the dim they move to.")
    y = _open(x, target, full[target], have[target], mesh)
    y = y.reshape(*y.shape[:at], -1, *y.shape[at + len(moved) :])
    opened = len(missing) - len(moved)  # dims of `target` still open after the exchange
    place = source if source < target else source + opened
    y = lax.all_to_all(y, moved, split_axis=at, concat_axis=place, tiled=False)
    y = _close(y, target + (1 if source < target else 0), opened)
    return _place(y, source, moved, full[source], have[source], mesh)


# --- layouts -----------------------------------------------------------------------------------------------


def reshard(
    x: jax.Array, have: Split, want: Split, mesh: Mapping[str, int], orders: Mapping[int, Axes] = _IN_BLOCKS
) -> jax.Array:
    """x, split as `have`, becomes split as `want`: slices first, then all-to-alls, then all-gathers.

    A dim of which neither layout continues the other (x, then y+z) is gathered up to the axes they share before it is
    split again, so that every chip ends with one block. `orders`: dims whose entries may be held in any order as long
    as it is undone on the way back, with all axes that may split them; they are not.
    """
    have, leaving = list(have), {}
    for dim in range(x.ndim):
        shared = _shared(have[dim], want[dim])
        if dim not in orders and shared not in (have[dim], want[dim]):
            x, have[dim] = gather(x, dim, have[dim], shared, mesh), shared
    full = tuple(orders.get(d) or max(have[d], want[d], key=len) for d in range(x.ndim))
    for dim, axes in enumerate(have):
        for axis in axes:
            if axis not in want[dim]:
                leaving[axis] = dim
    for dim in range(x.ndim):
        added = [a for a in want[dim] if a not in have[dim]]
        if added:
            x, have[dim] = _forget(x, dim, have[dim], want, mesh, full)
        while added:
            source = leaving.get(added[0])
            run = [added.pop(0)]
            if source is None:
                x = slice_(x, dim, have[dim], run[0], want[dim], mesh, full[dim])
            else:
                while added and leaving.get(added[0]) == source:
                    run.append(added.pop(0))
                x, have[source] = _forget(x, source, have[source], want, mesh, full)
                x = exchange(x, source, dim, tuple(run), tuple(have), full, mesh)
                have[source] = tuple(a for a in have[source] if a not in run)
                for axis in run:
                    del leaving[axis]
            have[dim] = tuple(a for a in full[dim] if a in have[dim] or a in run)
    for dim in range(x.ndim):
        x = gather(x, dim, have[dim], want[dim], mesh, full[dim])
    return x


def _shared(one: Axes, other: Axes) -> Axes:
    """The leading axes that both split a dim over."""
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return one[:count]


def _forget(
    x: jax.Array, dim: int, have: Axes, want: Split, mesh: Mapping[str, int], full: Split
) -> tuple[jax.Array, Axes]:
    """Gathers `dim` over the axes that no dim will be split over, before others join or leave it."""
    kept = tuple(a for a in have if any(a in axes for axes in want))
    return gather(x, dim, have, kept, mesh, full[dim]), kept


def _toward(have: Axes, want: Axes) -> Axes:
    """The order of splits while going from `have` to `want`, axes that leave later kept."""
    return want if set(have) <= set(want) else tuple(have) + tuple(a for a in want if a not in have)


def reduce(
    x: jax.Array,
    partial: Axes,
    have: Split,
    want: Split,
    mesh: Mapping[str, int],
    orders: Mapping[int, Axes] = _IN_BLOCKS,
) -> jax.Array:
    """Ends a partial sum over `partial`: reduce-scatter into the dims that `want` splits over those axes,
    all-reduce over the rest; then `reshard`, whose `orders` these are."""
    leaving = [a for dim, axes in enumerate(have) for a in axes if a not in want[dim]]
    if leaving:  # what moves to another dim does so first: the sum can wait
        first = tuple(tuple(a for a in w if a in h or a in leaving) for h, w in zip(have, want, strict=True))
        if any(w[: len(f)] != f for f, w in zip(first, want, strict=True)):
            raise ShardingError(f"a sum over {'+'.join(partial)} cannot end in {want} from {have}.")
        x, have = reshard(x, have, first, mesh, orders), first
    have = list(have)
    scattered: set[str] = set()
    for dim in range(x.ndim):
        goal = orders.get(dim) or _toward(have[dim], want[dim])
        for axis in [a for a in want[dim] if a not in partial and all(a not in h for h in have)]:
            x = slice_(x, dim, have[dim], axis, goal, mesh)
            have[dim] = tuple(a for a in goal if a in have[dim] or a == axis)
        here = tuple(a for a in want[dim] if a in partial and a not in have[dim])
        if here:
            x = scatter(x, dim, have[dim], here, goal, mesh)
            have[dim] = tuple(a for a in goal if a in have[dim] or a in here)
            scattered |= set(here)
    rest = tuple(a for a in partial if a not in scattered)
    if rest:
        x = lax.psum(x, rest)
    return reshard(x, tuple(have), want, mesh, orders)
