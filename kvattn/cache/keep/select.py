"""From scores and budgets to a smaller cache: chosen once, gathered once, for all policies and encodings.

    pick        scores [B,K,S], a budget  -> slots [B,K,n] in order of position
    selected    a cache, slots            -> a cache with a `Kept` address, of n slots and room for tokens to come

Scores are float32 (in bfloat16 they tie in masses); slots without a token are never chosen; the chosen ones lie in
order of position, whatever their score, so that windows and kernels see an order. Codes and scales move together.
Sizes are static: where the budgets of heads differ, consecutive heads of one budget share a cache (`Groups`), or, in
pages, every head has as many pages as its budget takes.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvattn.cache import encode
from kvattn.cache.address import Kept
from kvattn.cache.store import Cache, Groups, read
from kvattn.errors import UserError
from pallas_kernels import Leaf


class Room(NamedTuple):
    """Slots of a row behind its kept tokens: at least `tokens`, the whole a multiple of `multiple`; `page` > 0: in
    pages of that many."""

    tokens: int
    multiple: int = 1
    page: int = 0

    def slots(self, budget: int) -> int:
        """Slots of a head that keeps `budget` tokens."""
        unit = self.page or self.multiple
        return -(-(budget + self.tokens) // unit) * unit


def pick(scores: jax.Array, positions: jax.Array, budget: int) -> tuple[jax.Array, jax.Array]:
    """(slots[B,K,n] int32, positions[B,K,n] int32, -1 behind the last) of the `budget` highest scores[B,K,S] of each
    head, in order of position; positions[B, 1 | K, S] as the cache has them."""
    positions = jnp.broadcast_to(positions, scores.shape)
    scores = jnp.where(positions >= 0, scores.astype(jnp.float32), -jnp.inf)
    best, slots = jax.lax.top_k(scores, min(budget, scores.shape[2]))
    at = jnp.where(best > -jnp.inf, jnp.take_along_axis(positions, slots, axis=2), -1)
    last = jnp.iinfo(jnp.int32).max
    order = jnp.argsort(jnp.where(at < 0, last, at), axis=2)
    return (jnp.take_along_axis(x, order, axis=2).astype(jnp.int32) for x in (slots, at))


def selected(cache: Cache, scores: jax.Array, budgets: tuple[int, ...], room: Room) -> Cache | Groups:
    """The cache with what each head's budget keeps of it. `budgets`: one a head."""
    leaves, positions = read(cache)
    positions = jnp.broadcast_to(positions, scores.shape)
    if room.page:
        return _paged(cache, leaves, scores, positions, budgets, room)
    spans, start = [], 0
    for budget, same in itertools.groupby(budgets):
        count = len(list(same))
        spans.append((slice(start, start + count), budget))
        start += count
    made = []
    for number, (span, budget) in enumerate(spans):
        slots, at = pick(scores[:, span], positions[:, span], budget)
        mine = {name: _of_heads(leaf, span) for name, leaf in leaves.items()}
        address = Kept(cache.length, _padded(at, 2, room.slots(budget), -1), _count(at))
        state = cache.state if number == 0 else {}
        made.append(Cache(_gathered(mine, slots, room.slots(budget)), state, address))
    return made[0] if len(made) == 1 else Groups(tuple(made), tuple(span.stop - span.start for span, _ in spans))


def _count(at: jax.Array) -> jax.Array:
    return (at >= 0).sum(2, dtype=jnp.int32)


def _of_heads(leaf: Leaf, span: slice) -> Leaf:
    return jax.tree.map(lambda x: x[:, span], leaf)


def _padded(x: jax.Array, axis: int, size: int, value: int = 0) -> jax.Array:
    widths = [(0, size - n if dim == axis else 0) for dim, n in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=jnp.asarray(value, x.dtype))


def _gathered(leaves: dict[str, Leaf], slots: jax.Array, size: int) -> dict[str, Leaf]:
    """Leaves [B,K,S,dim] at slots[B,K,n], zeros behind up to `size` slots; channel scales as they are."""
    arrays, axes = encode.planes(leaves)
    held = {}
    for name, x in arrays.items():
        shape = [*slots.shape[:2], *([1] * (x.ndim - 2))]
        shape[axes[name]] = slots.shape[2]
        held[name] = _padded(jnp.take_along_axis(x, slots.reshape(shape), axis=axes[name]), axes[name], size)
    return encode.joined(held, leaves)


def _paged(cache, leaves, scores, positions, budgets, room) -> Cache:
    """Pages for every row and head: as many as its budget and room take, page 0 nobody's."""
    batch, heads, _ = scores.shape
    pages = [room.slots(budget) // room.page for budget in budgets]
    size, most = max(pages) * room.page, min(max(budgets), scores.shape[2])
    slots, at = pick(scores, positions, most)
    if min(budgets) < most:
        slots, at = _cut(scores, positions, budgets, most)
    table = np.zeros((batch, heads, max(pages)), np.int32)
    owned = [(b, k, j) for b in range(batch) for k in range(heads) for j in range(pages[k])]
    for page, where in enumerate(owned, start=1):
        table[where] = page
    b, k, j = np.array(owned).T
    rows, axes = encode.planes(_gathered(leaves, slots, size))
    pools = {}
    for name, x in rows.items():
        axis = axes[name]
        cut = x.reshape(*x.shape[:axis], max(pages), room.page, *x.shape[axis + 1 :])
        own = jnp.moveaxis(cut, axis, 2)[b, k, j][:, None]  # [pages, 1, P, dim] or [pages, 1, dim, P]
        pools[name] = jnp.concatenate([jnp.zeros_like(own[:1]), own])
    address = Kept(cache.length, _padded(at, 2, size, -1), _count(at), jnp.asarray(table), room.page)
    return Cache(encode.joined(pools, leaves), cache.state, address)


def _cut(scores, positions, budgets, most):
    """`pick` with a budget a head, in the width of the largest."""
    slots, at = [], []
    for head, budget in enumerate(budgets):
        s, a = pick(scores[:, head : head + 1], positions[:, head : head + 1], budget)
        slots.append(_padded(s, 2, most))
        at.append(_padded(a, 2, most, -1))
    return jnp.concatenate(slots, 1), jnp.concatenate(at, 1)


def budgets_of(budget: int | tuple[int, ...], heads: int, what: str) -> tuple[int, ...]:
    """One budget a head. Raises UserError for a number of them that is not the heads', and for what is no integer of at
    least 1."""
    each = (budget,) * heads if isinstance(budget, int) else tuple(budget)
    if len(each) != heads:
        raise UserError(f"{what} gives {len(each)} budgets and the cache has {heads} heads; give one a head.")
    for one in each:
        if not isinstance(one, int) or one < 1:
            raise UserError(f"{what} gives a budget of {one!r}; a budget is an integer of at least 1.")
    return each
