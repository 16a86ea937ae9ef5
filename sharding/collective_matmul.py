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

from sharding import manual
from sharding.manual import Axes, Split

OVERLAPS = ("none", "one_way", "two_way")
UNROLLED = 16  # rings up to this many chips are written out; longer ones are a loop


def matmul(
    x: jax.Array,
    w: Any,
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
    local [rows, in] x [in, out] matmul; w is an array or an int8 weight (.values, .scale).
    """
    inner = len(have) - 2
    gone = have[0]
    w_left = tuple(tuple(a for a in axes if a not in gone) for axes in w_split)
    summed, cols = w_left[0], w_left[inner]
    gathered = tuple(a for a in gone if any(a in axes for axes in w_split))
    ahead = tuple(a for a in have[2] if a not in summed)
    shape = _gathered_shape(w, w_split, w_left, mesh)[inner:]
    split = (*have[:2], cols, *((),) * (len(shape) - 1))
    if overlap == "none":
        x = manual.gather(x, 2, have[2], summed, mesh)
        y = product(_rows(x, inner), _flat(gather_weight(w, w_split, w_left, inner, mesh), inner))
    elif gathered:
        x = manual.gather(x, 2, have[2], summed, mesh)
        y = _weight_ring(_rows(x, inner), w, product, w_split, gone, inner, mesh, overlap == "two_way")
    elif ahead:
        ring = Ring(ahead, mesh, overlap == "two_way")
        y = gather_matmul(_rows(x, inner), _flat(w, inner), product, ring)
    else:
        into = () if want is None else tuple(a for a in want[2] if a not in cols)
        ring = Ring(into, mesh, overlap == "two_way")
        if into and into == tuple(a for a in want[2] if a in summed) and cols == want[2][: len(cols)]:
            y = matmul_scatter(_rows(x, inner), _flat(w, inner), product, ring)
            summed = tuple(a for a in summed if a not in into)
            split = (*have[:2], want[2], *((),) * (len(shape) - 1))
            shape = (shape[0] // ring.size, *shape[1:])
        else:
            y = product(_rows(x, inner), _flat(w, inner))
    y = y.reshape(*x.shape[:2], *shape)
    return y if want is None else manual.reduce(y, summed, split, want, mesh)


def gather_weight(w: Any, have: Split, want: Split, inner: int, mesh: Mapping[str, int]) -> Any:
    """All-gathers every dim of w[*in,*out] from `have` to `want`; of an int8 weight the scale[*out] too."""
    if have == want:
        return w
    values = getattr(w, "values", w)
    for dim, (old, new) in enumerate(zip(have, want, strict=True)):
        values = manual.gather(values, dim, old, new, mesh)
    if values is w or not hasattr(w, "scale"):
        return values
    scale = w.scale
    for dim, (old, new) in enumerate(zip(have[inner:], want[inner:], strict=True)):
        scale = manual.gather(scale, dim, old, new, mesh)
    return w.replace(values=values, scale=scale)


def _gathered_shape(w: Any, have: Split, want: Split, mesh: Mapping[str, int]) -> tuple[int, ...]:
    size = manual.ring_size
    return tuple(n * size(old, mesh) // size(new, mesh) for n, old, new in zip(w.shape, have, want, strict=True))


def _rows(x: jax.Array, inner: int) -> jax.Array:
    """x[B,T,*in] -> [B T, in]."""
    return x.reshape(x.shape[0] * x.shape[1], -1)


def _flat(w: Any, inner: int) -> Any:
    """w[*in,*out] -> [in, out]."""
    rows = 1
    for n in w.shape[:inner]:
        rows *= n
    return w.reshape(rows, -1)


# --- rings -------------------------------------------------------------------------------------------------


class Ring:
    """The chips along `axes`, in the order in which they split a dim."""

    def __init__(self, axes: Axes, mesh: Mapping[str, int], two_way: bool):
        self.axes, self.size, self.two_way = axes, manual.ring_size(axes, mesh), two_way

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


def gather_matmul(x: jax.Array, w: Any, product, ring: Ring) -> jax.Array:
    """all_gather(x, over its columns) @ w: x[rows, I/K], w[I, O] -> [rows, O]. The shards of x travel."""
    width = x.shape[1]
    halves = ring.two_way and width % 2 == 0
    size = width // 2 if halves else width

    def body(carry, part, owner, which):
        y = product(part, _take_rows(w, owner * width + which * size, size))
        return y if carry is None else carry + y

    return ring.walk(body, None, (x[:, :size], x[:, size:]) if halves else (x,))


def matmul_scatter(x: jax.Array, w: Any, product, ring: Ring) -> jax.Array:
    """reduce_scatter(x @ w, over its columns): x[rows, I], w[I, O] -> [rows, O/K]. The sums travel: at step t chip i
    adds its share of what chip i + K - 1 - t shall hold and passes it on (sheet section 10)."""
    width = w.shape[1] // ring.size
    halves = ring.two_way and width % 2 == 0
    size = width // 2 if halves else width

    def run(step, first):
        total = None
        for t in range(ring.size):
            owner = (ring.me + step * (ring.size - 1 - t)) % ring.size
            share = product(x, _take_cols(w, owner * width + first, size))
            total = share if total is None else ring.pass_on(total, -step) + share
        return total

    return jnp.concatenate([run(1, 0), run(-1, size)], 1) if halves else run(1, 0)


def _weight_ring(x, w, product, w_split, gone, inner, mesh, two_way) -> jax.Array:
    """x[rows, I] @ gather(w): the shards of w travel round all chips that it is gathered over."""
    axes = tuple(a for a in gone if any(a in split for split in w_split))
    into = tuple(a for a in w_split[0] if a in axes)
    out = tuple(a for a in w_split[inner] if a in axes)
    ring = Ring(axes, mesh, two_way)
    flat = _flat(w, inner)
    deep, wide = flat.shape
    ins, outs = manual.ring_size(into, mesh), manual.ring_size(out, mesh)
    halves = ring.two_way and wide % 2 == 0
    parts = tuple(_take_cols(flat, h * wide // 2, wide // 2) for h in (0, 1)) if halves else (flat,)

    def body(carry, part, owner, which):
        row, col = _position(owner, axes, into, mesh), _position(owner, axes, out, mesh)
        mine = x if ins == 1 else lax.dynamic_slice_in_dim(x, row * deep, deep, 1)
        y = product(mine, part)
        start = col * wide + which * (wide // 2)
        if carry is None:
            carry = jnp.zeros((x.shape[0], outs * wide), y.dtype)
        if outs == 1 and not halves:
            return carry + y
        old = lax.dynamic_slice_in_dim(carry, start, y.shape[1], 1)
        return lax.dynamic_update_slice_in_dim(carry, old + y, start, 1)

    return ring.walk(body, None if ring.size <= UNROLLED else _zeros(x, parts[0], product, outs * wide), parts)


def _zeros(x: jax.Array, part: Any, product, width: int) -> jax.Array:
    dtype = jax.eval_shape(lambda a, b: product(a[:, : b.shape[0]], b), x, part).dtype
    return jnp.zeros((x.shape[0], width), dtype)


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


def _take_rows(w: Any, start: Any, size: int) -> Any:
    """Rows of w[I,O]; an int8 weight keeps its scale[O]."""
    cut = lambda a: lax.dynamic_slice_in_dim(a, start, size, 0)  # noqa: E731
    return w.replace(values=cut(w.values)) if hasattr(w, "scale") else cut(w)


def _take_cols(w: Any, start: Any, size: int) -> Any:
    """Columns of w[I,O], and of an int8 weight's scale[O]."""
    if not hasattr(w, "scale"):
        return lax.dynamic_slice_in_dim(w, start, size, 1)
    cut = lambda a: lax.dynamic_slice_in_dim(a, start, size, a.ndim - 1)  # noqa: E731
    return w.replace(values=cut(w.values), scale=cut(w.scale))
