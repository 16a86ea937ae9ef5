"""Collective matmuls: a matmul and the collective before or after it, whole or as a ring.

The collective matmul of Wang et al. (ASPLOS 2023) and of section 3.5 of Pope et al., arXiv 2211.05102: with overlap
"none" the collective is one blocking operation. "one_way" turns an all-gather before a matmul, and a
reduce-scatter after it, into K steps of a matmul and a permute to the ring neighbour which do not depend on
each other and so run side by side; "two_way" sends halves round the ring in both directions. Weights that a
layout gathers (wg_*) are then never whole: their shards travel and each is multiplied as it passes.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sharding.layout import manual, torus_layouts
from sharding.layout.moves import Axes, Split, full_order

OVERLAPS = ("none", "one_way", "two_way")
UNROLLED = 16  # rings up to this many chips are written out; longer ones are a loop


def matmul(
    x: jax.Array,
    w: jax.Array,
    product,
    *,
    w_split: Split,
    have: Split,
    want: Split | None,
    mesh: Mapping[str, int],
    overlap: str,
) -> jax.Array:
    """x[B,T,*in] split as `have` times w[*in,*out] split as `w_split` -> [B,T,*out] split as `want`.

    Weights are gathered over the axes that split the batch of x, x over those that split its first in dim but not
    w's; what then still splits w's in dim is summed into `want` (or left open, `want=None`). `product(x, w)` is the
    local matmul over all in dims, which may convert w (int8 values travel as int8).
    """
    inner, gone = len(have) - 2, have[0]
    left = tuple(tuple(a for a in axes if a not in gone) for axes in w_split)
    summed, cols = left[0], left[inner]
    ahead = tuple(a for a in have[2] if a not in summed)
    if want is not None:  # rows that this chip will not keep are not multiplied
        for axis in [a for a in want[0] if a not in summed and all(a not in axes for axes in (*have, cols))]:
            x = manual.slice_(x, 0, have[0], axis, full_order(have[0], want[0]), mesh)
            have = (tuple(a for a in want[0] if a in have[0] or a == axis), *have[1:])
    job = _Job(product, inner, mesh, overlap == "two_way")
    if overlap == "none":
        y = product(manual.gather(x, 2, have[2], summed, mesh), gather_weight(w, w_split, left, mesh))
    elif left != w_split:
        y = weight_ring(manual.gather(x, 2, have[2], summed, mesh), w, w_split, gone, job)
    elif ahead:
        y = gather_matmul(x, w, ahead, job)
    else:
        into = () if want is None else tuple(a for a in want[2] if a in summed and a not in cols)
        if into and want[2] == cols + into:
            y, cols = matmul_scatter(x, w, into, job), want[2]
            summed = tuple(a for a in summed if a not in into)
        else:
            y = product(x, w)
    split = (*have[:2], cols, *((),) * (y.ndim - 3))
    return y if want is None else manual.reduce(y, summed, split, want, mesh)


class _Job:
    """What the rings share: the local matmul, how many in dims it has, the mesh, and whether to go both ways."""

    def __init__(self, product, inner: int, mesh: Mapping[str, int], two_way: bool):
        self.product, self.inner, self.mesh, self.two_way = product, inner, mesh, two_way


def gather_weight(w: jax.Array, have: Split, want: Split, mesh: Mapping[str, int]) -> jax.Array:
    """All-gathers every dim of w[*in,*out] from `have` to `want`."""
    for dim, (old, new) in enumerate(zip(have, want, strict=True)):
        w = manual.gather(w, dim, old, new, mesh)
    return w


# --- rings -------------------------------------------------------------------------------------------------


class Ring:
    """The chips along `axes`, in the order in which they split a dim."""

    def __init__(self, axes: Axes, mesh: Mapping[str, int]):
        self.axes, self.size = axes, torus_layouts.parts(axes, mesh)

    @property
    def me(self) -> jax.Array:
        return lax.axis_index(self.axes)

    def pass_on(self, x: Any, step: int) -> Any:
        """Everyone's x goes `step` places down the ring: chip i receives what chip i + step had."""
        pairs = [(i, (i - step) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda a: lax.ppermute(a, self.axes, pairs), x)

    def walk(self, body, carry: Any, parts: tuple[Any, ...]) -> Any:
        """carry = body(carry, part, owner, which) for the parts of all chips, starting with one's own. `parts` has one
        entry, or two that travel in opposite directions (`which` is 0 or 1).

        The permute of the next part does not depend on the matmul of this one, so that the two run side by side.
        """
        steps = (1, -1)[: len(parts)]

        def one(t, carry, parts, last=False):
            following = parts if last else tuple(self.pass_on(p, s) for p, s in zip(parts, steps, strict=True))
            for which, (part, step) in enumerate(zip(parts, steps, strict=True)):
                carry = body(carry, part, (self.me + t * step) % self.size, which)
            return carry, following

        if self.size <= UNROLLED:
            for t in range(self.size):
                carry, parts = one(t, carry, parts, t == self.size - 1)
            return carry
        carry, parts = one(0, carry, parts)
        carry, parts = lax.fori_loop(1, self.size - 1, lambda t, state: one(t, *state), (carry, parts))
        return one(self.size - 1, carry, parts, True)[0]


def gather_matmul(x: jax.Array, w: jax.Array, axes: Axes, job: _Job) -> jax.Array:
    """all_gather(x, over its first in dim) @ w: the shards of x[B,T,I/K,..] travel."""
    ring, width = Ring(axes, job.mesh), x.shape[2]
    halves = job.two_way and width % 2 == 0
    size = width // 2 if halves else width

    def body(carry, part, owner, which):
        y = job.product(part, lax.dynamic_slice_in_dim(w, owner * width + which * size, size, 0))
        return y if carry is None else carry + y

    return ring.walk(body, None, (x[:, :, :size], x[:, :, size:]) if halves else (x,))


def matmul_scatter(x: jax.Array, w: jax.Array, axes: Axes, job: _Job) -> jax.Array:
    """reduce_scatter(x @ w, over its first out dim): the sums travel; at step t chip i adds its share of what chip
    i + K - 1 - t shall hold and passes it on (sheet section 10)."""
    ring = Ring(axes, job.mesh)
    width = w.shape[job.inner] // ring.size
    halves = job.two_way and width % 2 == 0
    size = width // 2 if halves else width

    def run(step, first):
        total = None
        for t in range(ring.size):
            owner = (ring.me + step * (ring.size - 1 - t)) % ring.size
            share = job.product(x, lax.dynamic_slice_in_dim(w, owner * width + first, size, job.inner))
            total = share if total is None else ring.pass_on(total, -step) + share
        return total

    return jnp.concatenate([run(1, 0), run(-1, size)], 2) if halves else run(1, 0)


def weight_ring(x: jax.Array, w: jax.Array, w_split: Split, gone: Axes, job: _Job) -> jax.Array:
    """x @ all_gather(w): the shards of w travel round all chips that it is gathered over; each is multiplied with the
    part of x that it meets, and added into its columns."""
    inner, mesh = job.inner, job.mesh
    axes = tuple(a for a in gone if any(a in split for split in w_split))
    into = tuple(a for a in w_split[0] if a in axes)
    out = tuple(a for a in w_split[inner] if a in axes)
    ring, deep, wide = Ring(axes, mesh), w.shape[0], w.shape[inner]
    ins, outs = torus_layouts.parts(into, mesh), torus_layouts.parts(out, mesh)
    halves = job.two_way and wide % 2 == 0
    size = wide // 2 if halves else wide
    parts = tuple(lax.dynamic_slice_in_dim(w, h * size, size, inner) for h in (0, 1)) if halves else (w,)

    def meet(part, owner):
        row = _position(owner, axes, into, mesh)
        return job.product(x if ins == 1 else lax.dynamic_slice_in_dim(x, row * deep, deep, 2), part)

    def body(carry, part, owner, which):
        y = meet(part, owner)
        if outs == 1 and not halves:
            return carry + y
        start = _position(owner, axes, out, mesh) * wide + which * size
        old = lax.dynamic_slice_in_dim(carry, start, y.shape[2], 2)
        return lax.dynamic_update_slice_in_dim(carry, old + y, start, 2)

    like = jax.eval_shape(lambda part: meet(part, ring.me), parts[0])
    return ring.walk(body, jnp.zeros((*like.shape[:2], outs * wide, *like.shape[3:]), like.dtype), parts)


def _position(owner: jax.Array, axes: Axes, subset: Axes, mesh: Mapping[str, int]) -> Any:
    """The index along `subset` of the chip whose index along `axes` is `owner`."""
    coordinates, stride = {}, 1
    for axis in reversed(axes):
        coordinates[axis] = owner // stride % mesh[axis]
        stride *= mesh[axis]
    index: Any = 0
    for axis in subset:
        index = index * mesh[axis] + coordinates[axis]
    return index
