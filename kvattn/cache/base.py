"""Axis D: how K and V are held. A cache is a value of named leaves; it knows nothing of attention.

Leaves are [B, heads, S, dim]: heads before slots, so that a decode step's two matmuls have leading batch dims
and the cache is read in place. Slots are addressed by position (full: slot = position; ring: sinks first,
then position modulo the ring), so left padding, right padding and ragged rows need no bookkeeping but
`length`, the number of tokens each row has seen. Positions -1 are padding and are never written.
"""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from kvattn import legality
from kvattn.config import CacheConfig, ModelConfig
from kvattn.errors import UserError
from sharding import offset

ROW_WRITES = 8  # up to this batch one token is written row by row in place (on CPU); above, by one scatter


@flax.struct.dataclass
class Cache:
    """entries: leaf -> [B, heads, S, dim]; length[B] int32 tokens seen; ring slots after `sinks` (0 = full)."""

    entries: dict[str, jax.Array]
    length: jax.Array
    ring: int = flax.struct.field(pytree_node=False, default=0)
    sinks: int = flax.struct.field(pytree_node=False, default=0)

    @property
    def slots(self) -> int:
        return next(iter(self.entries.values())).shape[2]


def layout(cfg: ModelConfig, cache: CacheConfig, owner: int, capacity: int) -> tuple[int, int, int]:
    """(slots, ring, sinks) of an owner's cache for `capacity` tokens per sequence; ring 0 means full."""
    kind = cache.kinds[owner % len(cache.kinds)]
    masks = [cfg.mask(reader) for reader in cfg.readers(owner)]
    windowed = all(mask.window for mask in masks)
    if kind == "full" or (kind == "by_mask" and not windowed):
        return capacity, 0, 0
    sinks, window = max(mask.sinks for mask in masks), max(mask.window for mask in masks)
    if sinks + window >= capacity:
        return capacity, 0, 0  # the whole sequence fits in the window: a ring would never turn
    return sinks + window, window, sinks


def specs(cfg: ModelConfig, cache: CacheConfig, batch: int, capacity: int) -> tuple[Any, ...]:
    """Abstract caches (ShapeDtypeStruct leaves), indexed by layer; None for layers that own none.

    Raises UserError when the store does not fit the masks or capacity is not positive.
    """
    from kvattn.attention import VARIANTS

    legality.check_model_cache(cfg, cache)
    if capacity <= 0:
        raise UserError(f"cache.capacity is {capacity}; it must be positive.")
    out: list[Any] = []
    for layer in range(cfg.n_layers):
        if cfg.sources[layer] != layer:
            out.append(None)
            continue
        slots, ring, sinks = layout(cfg, cache, layer, capacity)
        leaves = {
            name: jax.ShapeDtypeStruct((batch, heads, slots, dim), jnp.dtype(cache.dtype))
            for name, (heads, dim) in VARIANTS[cfg.variant].kv_spec(cfg).items()
        }
        out.append(Cache(leaves, jax.ShapeDtypeStruct((batch,), jnp.int32), ring, sinks))
    return tuple(out)


def create(cfg: ModelConfig, cache: CacheConfig, batch: int, capacity: int) -> tuple[Any, ...]:
    """Empty caches for `batch` sequences of up to `capacity` tokens; zero-filled (a masked slot is still read)."""
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), specs(cfg, cache, batch, capacity))


def nbytes(caches: Any) -> int:
    """Bytes of K and V held (the `length` counters, 4 bytes per row and owner, are not KV)."""
    leaves = jax.tree.leaves([c.entries for c in caches if c is not None])
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in leaves)


def stored(cache: Cache, entries: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Entries as the cache would give them back: what a first prefill attends to."""
    return {name: entries[name].astype(leaf.dtype) for name, leaf in cache.entries.items()}


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

    In place under donation. A position beyond a full cache's capacity is dropped: callers check lengths first.
    """
    length = jnp.maximum(cache.length, positions.max(1) + 1)
    slots, new = slot_of(cache, positions, length), stored(cache, entries)
    if positions.shape[1] == 1:
        few = _write_rows if positions.shape[0] <= ROW_WRITES else _write_scatter
        held = jax.lax.platform_dependent(cache.entries, new, slots, cpu=few, tpu=_write_loop, default=_write_scatter)
    else:
        held = _write_scatter(cache.entries, new, slots)
    return cache.replace(entries=held, length=length)


def _write_rows(held: dict[str, jax.Array], new: dict[str, jax.Array], slots: jax.Array) -> dict[str, jax.Array]:
    """One token per row: a dynamic-update-slice per row, skipped where there is nothing to write.

    The branch also keeps XLA:CPU from fusing the update into its readers, which for a batch of one writes it
    twice (once for the attention, once for the result) and copies the cache four times to do so.
    """
    size = next(iter(held.values())).shape[2]
    for b in range(slots.shape[0]):

        def write(held, b=b):
            at = (b, 0, slots[b, 0], 0)
            return {n: jax.lax.dynamic_update_slice(leaf, new[n][b : b + 1], at) for n, leaf in held.items()}

        held = jax.lax.cond(slots[b, 0] < size, write, lambda held: held, held)
    return held


def _write_loop(held: dict[str, jax.Array], new: dict[str, jax.Array], slots: jax.Array) -> dict[str, jax.Array]:
    """One token per row, by a read and a dynamic-update-slice of that token per row: a TPU does them in place in any
    layout, where a scatter wants the cache in a layout of its own and copies it there and back."""
    size = next(iter(held.values())).shape[2]

    def write(b, held):
        at = (b, 0, jnp.minimum(slots[b, 0], size - 1), 0)
        out = {}
        for n, leaf in held.items():
            row = jax.lax.dynamic_slice_in_dim(new[n], b, 1, 0)
            old = jax.lax.dynamic_slice(leaf, at, row.shape)
            new_leaf = jax.lax.dynamic_update_slice(leaf, jnp.where(slots[b, 0] < size, row, old), at)
            out[n] = with_layout_constraint(new_leaf, Layout((0, 1, 2, 3)))
        return out

    if slots.shape[0] > ROW_WRITES:
        return jax.lax.fori_loop(0, slots.shape[0], write, held)
    for b in range(slots.shape[0]):
        held = write(b, held)
    return held


def _write_scatter(held: dict[str, jax.Array], new: dict[str, jax.Array], slots: jax.Array) -> dict[str, jax.Array]:
    """Any number of tokens; slots beyond the cache are dropped."""
    rows = jnp.arange(slots.shape[0])[:, None]
    return {n: leaf.at[rows, :, slots].set(new[n].swapaxes(1, 2), mode="drop") for n, leaf in held.items()}


def read(cache: Cache) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    """(entries leaf -> [B,heads,S,dim], positions[B,S] int32, valid[B,S] bool)."""
    slot = jnp.arange(cache.slots, dtype=jnp.int32)[None, :] + offset("cache_length", cache.slots)
    length = cache.length[:, None]
    if not cache.ring:
        positions = jnp.broadcast_to(slot, (cache.length.shape[0], cache.slots))
        return cache.entries, positions, positions < length
    newest = length - cache.sinks - 1  # index of the newest token after the sinks
    index = newest - (newest - (slot - cache.sinks)) % cache.ring
    positions = jnp.where(slot < cache.sinks, slot, cache.sinks + index)
    valid = jnp.where(slot < cache.sinks, slot < length, (newest >= 0) & (index >= 0))
    return cache.entries, positions, valid
