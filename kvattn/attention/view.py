"""What a layer attends to: one or more segments of stored entries with their absolute positions.

An owner layer makes the view once (appending its new entries to its cache on the way) and every reader of
that owner attends to the same value: sharing K and V across layers is sharing of values.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kvattn.cache.base import Cache, append, read, stored
from kvattn.masks import Tokens


class Segment(NamedTuple):
    """entries: leaf -> [B, heads, S, dim]; tokens: positions and segment ids [B,S]."""

    entries: dict[str, jax.Array]
    tokens: Tokens


View = tuple[Segment, ...]


def make_view(entries: dict[str, jax.Array], tokens: Tokens, cache: Cache | None, fresh: bool) -> tuple[View, Any]:
    """The view of `entries` [B,heads,T,dim] just produced, and the cache with them appended.

    No cache: the entries themselves. `fresh` (the cache is empty): the entries as the cache stores them.
    One token, or a full cache: append, then read everything. Several tokens into a ring: the ring before
    the append plus the new entries, because the append overwrites slots that early queries still see.
    """
    if cache is None:
        return (Segment(entries, tokens),), None
    if fresh:
        return (Segment(stored(cache, entries), tokens),), append(cache, entries, tokens.positions)
    if cache.ring and tokens.positions.shape[1] > 1:
        old = _read_segment(cache)
        new = Segment(stored(cache, entries), tokens)
        return (old, new), append(cache, entries, tokens.positions)
    cache = append(cache, entries, tokens.positions)
    return (_read_segment(cache),), cache


def _read_segment(cache: Cache) -> Segment:
    entries, positions, valid = read(cache)
    return Segment(entries, Tokens(jnp.where(valid, positions, -1)))
