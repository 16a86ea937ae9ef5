"""What a layer attends to: one or more segments of stored entries with their absolute positions.

An owner layer makes the view once (appending its new entries to its cache on the way) and every reader of
that owner attends to the same value: sharing K and V across layers is sharing of values.
"""

from typing import Any

import flax.struct
import jax

from kvattn.cache.base import Cache, append, read, stored
from kvattn.cache.quantized import Entry
from kvattn.masks import Tokens
from sharding import reshard


@flax.struct.dataclass
class Segment:
    """entries: leaf -> [B, heads, S, dim], or a pallas_kernels.Leaf of S slots; tokens: positions and segment ids
    [B,S]. `cache`: the cache that the entries were read from, as kernels take it; None for the pass's own tokens."""

    entries: dict[str, Entry]
    tokens: Tokens
    cache: Cache | None = None

    @property
    def split(self) -> bool:
        """S may be split over chips (a cache), so that each sees a part of the keys."""
        return self.cache is not None


View = tuple[Segment, ...]


_TOGETHER = {
    "k": ("fresh_batch", "fresh_k_heads", "act_length", "cache_dim"),
    "v": ("fresh_batch", "fresh_v_heads", "act_length", "cache_dim"),
}
_CACHED = ("cache_batch", "cache_heads", "act_length", "cache_dim")


def make_view(entries: dict[str, jax.Array], axes: dict[str, Any], where: Any, cache: Cache | None) -> tuple[View, Any]:
    """The view of `entries` [B,heads,T,dim] just produced (logical `axes` by leaf), and the cache with them appended.

    No cache: the entries themselves. `where.fresh` (the cache is empty): the entries as the cache stores them.
    One token, or a full cache: append, then read everything. Several tokens into a ring: the ring before
    the append plus the new entries, because the append overwrites slots that early queries still see.
    """

    def together(entries):
        held = {n: reshard(x, axes[n], _TOGETHER.get(n, _TOGETHER["k"])) for n, x in entries.items()}
        return Segment(held, where.together)

    if cache is None:
        return (together(entries),), None
    arriving = {n: reshard(x, axes[n], _CACHED) for n, x in entries.items()}
    positions = where.cached.positions
    if where.fresh:
        return (together(stored(cache, entries, where.together.positions)),), append(cache, arriving, positions)
    if cache.ring and positions.shape[1] > 1:
        new = Segment(stored(cache, arriving, positions), where.cached)
        return (_read_segment(cache), new), append(cache, arriving, positions)
    cache = append(cache, arriving, positions)
    return (_read_segment(cache),), cache


def _read_segment(cache: Cache) -> Segment:
    entries, positions, _ = read(cache)
    return Segment(entries, Tokens(positions), cache)
