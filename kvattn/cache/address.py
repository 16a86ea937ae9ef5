"""Which slot holds which token. A cache is leaves x an address; the address owns slots, positions, kv and truncate.

    Full     slot = position
    Ring     attention-sink tokens first, then position modulo the ring
    Paged    token t of row b lies at page table[b, t // P], offset t % P, of a pool of pages (arXiv 2309.06180)
    Kept     a position a slot and head: tokens that a keep-policy chose, and those that came after; dense, or in pages
             by a table per (row, head)

As slots follow from positions, left padding, right padding and ragged rows need no bookkeeping but `length`, the
number of tokens each row has seen. Positions -1 are padding and are never written. Masks see positions[B, 1 | K, S],
never slots.
"""

import flax.struct
import jax
import jax.numpy as jnp

from kvattn.errors import UserError
from pallas_kernels import KV, Leaf
from pallas_kernels.contract import key_positions
from sharding import offset


@flax.struct.dataclass
class Address:
    """Base of all. length[B] int32: tokens each row has seen. `slots` below is S, the slots of one row."""

    length: jax.Array

    @property
    def overwrites(self) -> bool:
        """Whether an append of several tokens overwrites what its earlier queries still see."""
        return False

    def slots(self, held: int) -> int:
        """S of a leaf that holds `held` slots (or tokens a page)."""
        return held

    def positions(self, slots: int) -> jax.Array:
        """Position of the token in each slot, [B, 1 | K, S] int32, -1 where there is none, of leaves that hold `slots`
        (or tokens a page)."""
        raise NotImplementedError

    def place(self, positions: jax.Array, slots: int) -> tuple[jax.Array | None, jax.Array]:
        """(index of dim 0, slot) [B,T], or [B,K,T] where heads differ, at which tokens at positions[B,T] are written;
        rows None = the sequence itself, a slot beyond the leaf = nowhere."""
        raise NotImplementedError

    def advanced(self, positions: jax.Array, slots: int) -> "Address":
        """The address once tokens at positions[B,T] are written."""
        return self.replace(length=jnp.maximum(self.length, positions.max(1) + 1))

    def rows(self, leaf: Leaf) -> Leaf:
        """The leaf as rows of S slots."""
        return leaf

    def truncated(self, length: jax.Array, slots: int) -> "Address":
        """The address with the first length[B] positions of each row only."""
        return self.replace(length=jnp.minimum(self.length, length))

    def kv(self, k: Leaf, v: Leaf | None, v_dim: int) -> KV:
        """K and V as decode kernels read them; v None: V is the first v_dim columns of K."""
        raise NotImplementedError


def _start(slots: int) -> jax.Array | None:
    start = offset("cache_length", slots)
    return None if isinstance(start, int) else jnp.asarray(start, jnp.int32)


@flax.struct.dataclass
class Full(Address):
    """Slot = position."""

    def positions(self, slots):
        return _of_slots(self, slots, 0, 0)

    def place(self, positions, slots):
        return None, _own_slots(positions, positions >= 0, slots)

    def kv(self, k, v, v_dim):
        return KV(k, v, self.length, None, _start(k.slots), v_dim)


@flax.struct.dataclass
class Ring(Address):
    """`sinks` slots for the first tokens, then `size` slots in turn."""

    size: int = flax.struct.field(pytree_node=False, default=0)
    sinks: int = flax.struct.field(pytree_node=False, default=0)

    @property
    def overwrites(self):
        return True

    def positions(self, slots):
        return _of_slots(self, slots, self.size, self.sinks)

    def place(self, positions, slots):
        length = self.advanced(positions, slots).length
        turned = self.sinks + (positions - self.sinks) % self.size
        kept = (positions >= 0) & ((positions < self.sinks) | (positions >= length[:, None] - self.size))
        return None, _own_slots(jnp.where(positions < self.sinks, positions, turned), kept, slots)

    def truncated(self, length, slots):
        raise UserError(
            "a ring has overwritten what a roll-back would need; commit only what is accepted "
            "(forward with commit=False, then commit)."
        )

    def kv(self, k, v, v_dim):
        return KV(k, v, self.length, None, _start(k.slots), v_dim, self.size, self.sinks)


def _of_slots(address: Address, slots: int, ring: int, sinks: int) -> jax.Array:
    slot = jnp.arange(slots, dtype=jnp.int32)[None, :] + offset("cache_length", slots)
    return key_positions(slot, address.length[:, None], ring, sinks)[:, None, :]


def _own_slots(slot: jax.Array, kept: jax.Array, slots: int) -> jax.Array:
    """Slots on this chip; `slots` = not written here (where they are split over chips, each writes its own)."""
    slot = slot - offset("cache_length", slots)
    return jnp.where(kept & (slot >= 0) & (slot < slots), slot, jnp.asarray(slots, slot.dtype))


@flax.struct.dataclass
class Paged(Address):
    """table[B,n] int32: page of tokens [i P, (i + 1) P) of a row; 0 = none, and page 0 belongs to nobody: what is read
    there is masked, nothing is written to it. Leaves are pools [pages, heads, P, dim]. One table serves all owners."""

    table: jax.Array = None
    page: int = flax.struct.field(pytree_node=False, default=0)

    def slots(self, held):
        return self.page * self.table.shape[1]

    def positions(self, slots):
        slot = jnp.arange(self.slots(slots), dtype=jnp.int32)[None, :]
        return key_positions(slot, self.length[:, None])[:, None, :]

    def place(self, positions, slots):
        index = positions // self.page
        held = (positions >= 0) & (index < self.table.shape[1])
        pages = jnp.take_along_axis(self.table, jnp.where(held, index, 0), axis=1)
        held &= pages > 0
        nowhere = jnp.asarray(self.page, positions.dtype)
        return jnp.where(held, pages, 0), jnp.where(held, positions % self.page, nowhere)

    def advanced(self, positions, slots):
        written = jnp.where(self.place(positions, slots)[1] < self.page, positions, -1)
        return self.replace(length=jnp.maximum(self.length, written.max(1) + 1))

    def rows(self, leaf):
        return gathered(leaf, self.table)

    def kv(self, k, v, v_dim):
        return KV(k, v, self.length, self.table, None, v_dim)


def gathered(leaf: Leaf, table: jax.Array) -> Leaf:
    """A pool's leaf as rows: [B,heads,n P,dim] (or lanes, with scales), pages in the order of table[B,n]."""

    def rows(pool, axis):  # [B,n,heads,...] -> n beside the slot axis, then merged with it
        x = jnp.moveaxis(pool[table], 1, axis)
        return x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])

    scale = None if leaf.scale is None else rows(leaf.scale, 2)
    return Leaf(rows(leaf.values, 3 if leaf.lanes else 2), scale, leaf.lanes, leaf.channel, leaf.encoding)


@flax.struct.dataclass
class Kept(Address):
    """held[B,K,S] int32: the position in each slot of each head, ascending, -1 behind the last; count[B,K]: tokens of
    each head. Dense leaves [B,K,S,dim]; with `table`[B,K,n], pools [pages,1,P,dim] and pages of their own for every
    row and head, so that heads keep different numbers of tokens in real memory."""

    held: jax.Array = None
    count: jax.Array = None
    table: jax.Array | None = None
    page: int = flax.struct.field(pytree_node=False, default=0)

    def slots(self, held):
        return self.held.shape[2]

    def positions(self, slots):
        return self.held

    def _new_slots(self, positions):
        """Slot [B,K,T] that each new token gets: behind the last one of its head."""
        live = (positions >= 0)[:, None, :]
        rank = jnp.cumsum(live, axis=2, dtype=jnp.int32) - 1
        slots = self.held.shape[2]
        slot = self.count[:, :, None] + rank
        room = slot < slots
        if self.table is not None:
            page = jnp.take_along_axis(self.table, jnp.minimum(slot // self.page, self.table.shape[2] - 1), axis=2)
            room &= page > 0
        return jnp.where(live & room, slot, slots)

    def place(self, positions, slots):
        slot = self._new_slots(positions)
        if self.table is None:
            return None, slot
        inside = slot < self.held.shape[2]
        index = jnp.where(inside, slot // self.page, 0)
        page = jnp.where(inside, jnp.take_along_axis(self.table, index, axis=2), 0)
        return page, jnp.where(inside, slot % self.page, self.page)

    def advanced(self, positions, slots):
        slot = self._new_slots(positions)
        batch, heads, _ = slot.shape
        b, k = jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, :, None]
        at = jnp.broadcast_to(positions[:, None, :], slot.shape)
        held = self.held.at[b, k, slot].set(at, mode="drop")
        count = self.count + (slot < self.held.shape[2]).sum(2, dtype=jnp.int32)
        return self.replace(length=jnp.maximum(self.length, positions.max(1) + 1), held=held, count=count)

    def rows(self, leaf):
        if self.table is None:
            return leaf
        batch, heads, pages = self.table.shape
        rows = gathered(leaf, self.table.reshape(batch * heads, pages))
        return jax.tree.map(lambda x: x.reshape(batch, heads, *x.shape[2:]), rows)

    def truncated(self, length, slots):
        stays = (self.held >= 0) & (self.held < length[:, None, None])
        return self.replace(
            length=jnp.minimum(self.length, length),
            held=jnp.where(stays, self.held, -1),
            count=stays.sum(2, dtype=jnp.int32),
        )

    def kv(self, k, v, v_dim):
        """Every (row, head) is a row of one head; queries are turned by `apart`, results by `together`."""
        batch, heads = self.count.shape
        if self.table is not None:
            table = self.table.reshape(batch * heads, -1)
            return KV(k, v, self.count.reshape(-1), table, None, v_dim)
        k, v = (x and jax.tree.map(lambda a: a.reshape(batch * heads, 1, *a.shape[2:]), x) for x in (k, v))
        return KV(k, v, self.count.reshape(-1), None, None, v_dim)

    def apart(self, q: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """q[B,T,N,H] at positions[B,T] -> (q[B K,T,G,H], the slot each query sees up to [B K,T], -1 = padding)."""
        batch, length, n, dim = q.shape
        heads = self.count.shape[1]
        q = q.reshape(batch, length, heads, n // heads, dim).transpose(0, 2, 1, 3, 4)
        held = self.held[:, :, None, :]
        seen = ((held >= 0) & (held <= positions[:, None, :, None])).sum(3, dtype=jnp.int32)
        at = jnp.where((positions >= 0)[:, None, :], seen - 1, -1)
        return q.reshape(batch * heads, length, n // heads, dim), at.reshape(batch * heads, length)

    def together(self, x: jax.Array) -> jax.Array:
        """The inverse of `apart` for what a kernel gives: x[B K,T,G,...] -> [B,T,N,...]."""
        batch, heads = self.count.shape
        x = x.reshape(batch, heads, *x.shape[1:])
        x = jnp.moveaxis(x, 1, 2)
        return x.reshape(batch, x.shape[1], heads * x.shape[3], *x.shape[4:])
