"""Axis D: how K and V are held. A cache is a value of named leaves; it knows nothing of attention.

Two things vary apart. How tokens are addressed, here: full (slot = position), ring (sinks first, then position modulo
the ring), or paged (kvattn/cache/paged.py). How a leaf encodes them: kvattn/cache/quantized.py. A plain leaf is an
array [B, heads, S, dim]: heads before slots, so that a decode step's two matmuls have leading batch dims and the cache
is read in place. As slots follow from positions, left padding, right padding and ragged rows need no bookkeeping but
`length`, the number of tokens each row has seen. Positions -1 are padding and are never written.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from kvattn.cache import paged, quantized
from kvattn.cache.quantized import Entry
from kvattn.cache.write import ROW_WRITES, write
from kvattn.config import CacheConfig, ModelConfig, legality
from kvattn.errors import UserError
from pallas_kernels import KV, codes
from pallas_kernels.contract import key_positions
from sharding import offset

__all__ = ["ROW_WRITES", "Cache", "append", "axes", "create", "kv", "layout", "nbytes", "read", "specs", "stored"]


@flax.struct.dataclass
class Cache:
    """entries: leaf -> [B, heads, S, dim] or pallas_kernels.Leaf; length[B] int32 tokens seen; table[B,n] int32 of a
    paged cache, whose entries are pools of pages; ring slots after `sinks` (0 = full)."""

    entries: dict[str, Entry]
    length: jax.Array
    ring: int = flax.struct.field(pytree_node=False, default=0)
    sinks: int = flax.struct.field(pytree_node=False, default=0)
    table: jax.Array | None = None

    @property
    def page(self) -> int:
        """Tokens of a page; 0 where slots are contiguous."""
        return 0 if self.table is None else quantized.as_leaf(next(iter(self.entries.values()))).slots

    @property
    def slots(self) -> int:
        """Slots of one row."""
        slots = quantized.as_leaf(next(iter(self.entries.values()))).slots
        return slots if self.table is None else slots * self.table.shape[1]


def layout(cfg: ModelConfig, cache: CacheConfig, owner: int, capacity: int) -> tuple[int, int, int]:
    """(slots of one row, ring, sinks) of an owner's cache for `capacity` tokens per sequence; ring 0 means that every
    token is kept. Slots are whole pages, or multiples of `cache.multiple`."""

    def whole(slots, unit):
        return -(-slots // unit) * unit

    kind = cache.kinds[owner % len(cache.kinds)]
    if kind == "paged":
        return whole(capacity, cache.page_size), 0, 0
    full = whole(capacity, cache.multiple), 0, 0
    masks = [cfg.mask(reader) for reader in cfg.readers(owner)]
    if kind == "full" or (kind == "by_mask" and not all(mask.window for mask in masks)):
        return full
    sinks, window = max(mask.sinks for mask in masks), max(mask.window for mask in masks)
    ring = whole(sinks + window, cache.multiple), window, sinks
    # Where the whole sequence fits in the window, a ring would never turn.
    return full if sinks + window >= capacity or ring[0] >= full[0] else ring


def specs(cfg: ModelConfig, cache: CacheConfig, batch: int, capacity: int) -> tuple[Any, ...]:
    """Abstract caches (ShapeDtypeStruct leaves), indexed by layer; None for layers that own none.

    Raises UserError when the store does not fit the model or capacity is not positive.
    """
    from kvattn.attention import VARIANTS

    legality.check_model_cache(cfg, cache, max(capacity, 0))
    if capacity <= 0:
        raise UserError(f"cache.capacity is {capacity}; it must be positive.")
    out: list[Any] = []
    for layer in range(cfg.n_layers):
        if cfg.sources[layer] != layer:
            out.append(None)
            continue
        slots, ring, sinks = layout(cfg, cache, layer, capacity)
        rows, table = batch, None
        if is_paged(cache, layer):
            table = jax.ShapeDtypeStruct((batch, slots // cache.page_size), jnp.int32)
            rows, slots = 1 + pool_pages(cache, batch, capacity), cache.page_size
        leaves = {
            name: quantized.spec(cache, name, rows, heads, slots, dim, batch)
            for name, (heads, dim) in VARIANTS[cfg.variant].kv_spec(cfg).items()
        }
        out.append(Cache(leaves, jax.ShapeDtypeStruct((batch,), jnp.int32), ring, sinks, table))
    return tuple(out)


def is_paged(cache: CacheConfig, owner: int) -> bool:
    return cache.kinds[owner % len(cache.kinds)] == "paged"


def pool_pages(cache: CacheConfig, batch: int, capacity: int) -> int:
    """Pages of a paged owner's pool that sequences can have; page 0, which none has, comes on top."""
    return cache.pages or batch * paged.pages_for(capacity, cache.page_size)


def create(
    cfg: ModelConfig, cache: CacheConfig, batch: int, capacity: int, tokens: Sequence[int] | None = None
) -> tuple[Any, ...]:
    """Empty caches for `batch` sequences of up to `capacity` tokens; zero-filled (a masked slot is still read).

    Paged stores give row b pages for tokens[b] tokens (None: for `capacity`); who wants to give them out later passes
    zeros and uses paged.Allocator and paged.apply. Raises UserError as `specs`, paged.OutOfPages for too small a pool.
    """
    abstract = specs(cfg, cache, batch, capacity)
    table = None
    if any(c is not None and c.table is not None for c in abstract):
        allocator = paged.Allocator(pool_pages(cache, batch, capacity), cache.page_size)
        allocator.allocate(dict(enumerate([capacity] * batch if tokens is None else tokens)))
        table = allocator.table(batch, paged.pages_for(capacity, cache.page_size))
    made = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), abstract)
    return tuple(c if c is None or c.table is None else c.replace(table=jnp.array(table)) for c in made)


def nbytes(caches: Any) -> int:
    """Bytes of K and V held, scales included (the `length` counters, 4 bytes per row and owner, and tables, 4 bytes per
    page of a row and owner, are not KV)."""
    leaves = jax.tree.leaves([c.entries for c in caches if c is not None])
    return sum(-(-math.prod(leaf.shape) * codes.bits(leaf.dtype) // 8) for leaf in leaves)


def axes(cache: Cache) -> Cache:
    """The logical axes of every array of a contiguous cache, in its own form: tuples in place of arrays."""
    entries = {name: quantized.axes(entry) for name, entry in cache.entries.items()}
    return cache.replace(entries=entries, length=("cache_batch",))


def stored(cache: Cache, entries: dict[str, jax.Array], positions: jax.Array) -> dict[str, jax.Array]:
    """Entries [B,heads,T,dim] at positions[B,T] as the cache would give them back, in the same shape: what a first
    prefill attends to."""
    out = {}
    for name, entry in cache.entries.items():
        x = entries[name]
        new = quantized.encode(entry, x, positions, cache.length)
        out[name] = quantized.decode(new, x.dtype if getattr(entry, "scale", None) is not None else entry.dtype)
    return out


def slot_of(cache: Cache, positions: jax.Array, length: jax.Array) -> jax.Array:
    """Slot[B,T] of each position[B,T] once rows hold length[B] tokens; `cache.slots` = do not write (here: where the
    slots are split over chips, each writes its own)."""
    slot, kept = positions, positions >= 0
    if cache.ring:
        turned = cache.sinks + (positions - cache.sinks) % cache.ring
        slot = jnp.where(positions < cache.sinks, positions, turned)
        kept &= (positions < cache.sinks) | (positions >= length[:, None] - cache.ring)
    slot = slot - offset("cache_length", cache.slots)
    return jnp.where(kept & (slot >= 0) & (slot < cache.slots), slot, jnp.asarray(cache.slots, positions.dtype))


def append(cache: Cache, entries: dict[str, jax.Array], positions: jax.Array) -> Cache:
    """Writes entries [B,heads,T,dim] at absolute positions[B,T] (-1 = padding, skipped).

    In place under donation. A position beyond a cache's capacity or pages is dropped: callers check lengths first.
    """
    new = {n: quantized.encode(entry, entries[n], positions, cache.length) for n, entry in cache.entries.items()}
    if cache.table is None:
        length = jnp.maximum(cache.length, positions.max(1) + 1)
        rows, slots = None, slot_of(cache, positions, length)
    else:
        rows, slots = paged.address(cache.table, cache.page, positions)
        length = jnp.maximum(cache.length, jnp.where(slots < cache.page, positions, -1).max(1) + 1)
    held, where = quantized.planes(cache.entries)
    held = write(held, quantized.planes(new)[0], where, rows, slots)
    return cache.replace(entries=quantized.joined(held, new), length=length)


def read(cache: Cache) -> tuple[dict[str, Entry], jax.Array, jax.Array]:
    """(entries leaf -> [B,heads,S,dim] or Leaf of S slots, positions[B,S] int32, valid[B,S] bool); positions are -1
    where not valid. Pages are gathered into rows."""
    slot = jnp.arange(cache.slots, dtype=jnp.int32)[None, :] + offset("cache_length", cache.slots)
    positions = key_positions(slot, cache.length[:, None], cache.ring, cache.sinks)
    entries = cache.entries
    if cache.table is not None:
        entries = {name: paged.gather(entry, cache.table) for name, entry in entries.items()}
    return entries, positions, positions >= 0


def kv(cache: Cache, k: str = "k", v: str = "v", v_dim: int = 0) -> KV:
    """The cache as decode kernels read it: leaves `k` and `v`, or with v_dim > 0 V as the first columns of `k`."""
    start = offset("cache_length", cache.slots)
    value = None if v_dim else quantized.as_leaf(cache.entries[v])
    return KV(
        quantized.as_leaf(cache.entries[k]),
        value,
        cache.length,
        cache.table,
        None if isinstance(start, int) else jnp.asarray(start, jnp.int32),
        v_dim,
        cache.ring,
        cache.sinks,
    )
