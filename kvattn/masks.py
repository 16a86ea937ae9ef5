"""Axis C: which positions may be seen, as values that combine with & and |.

A mask is called with two `Tokens` (queries, keys) and returns bool[B, 1 | K,T,S]: K where the heads of a cache hold
different tokens. It sees absolute positions, never slot numbers, so full, ring, paged and kept caches share it.
Position -1 marks padding or an empty slot; it is never visible.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvattn.config import MaskConfig


class Tokens(NamedTuple):
    """positions int32 (-1 = nothing here): [B,T] of queries, [B, 1 | K,S] of keys; and, in packed batches, segments
    int32 [B,T] or [B,S]."""

    positions: jax.Array
    segments: jax.Array | None = None


def as_keys(tokens: Tokens) -> Tokens:
    """Tokens at positions[B,T] as keys see them: positions[B,1,T], alike for all heads."""
    return Tokens(tokens.positions[:, None, :], tokens.segments)


@dataclasses.dataclass(frozen=True)
class Mask:
    """Base of all masks; combine with & and |."""

    def __call__(self, q: Tokens, k: Tokens) -> jax.Array:
        raise NotImplementedError

    def __and__(self, other: "Mask") -> "Mask":
        return Both(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return Either(self, other)


@dataclasses.dataclass(frozen=True)
class Both(Mask):
    a: Mask
    b: Mask

    def __call__(self, q, k):
        return self.a(q, k) & self.b(q, k)


@dataclasses.dataclass(frozen=True)
class Either(Mask):
    a: Mask
    b: Mask

    def __call__(self, q, k):
        return self.a(q, k) | self.b(q, k)


@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """Key position <= query position."""

    def __call__(self, q, k):
        return k.positions[:, :, None, :] <= q.positions[:, None, :, None]


@dataclasses.dataclass(frozen=True)
class Window(Mask):
    """The `size` latest positions, the query's own included."""

    size: int

    def __call__(self, q, k):
        return q.positions[:, None, :, None] - k.positions[:, :, None, :] < self.size


@dataclasses.dataclass(frozen=True)
class Sinks(Mask):
    """The first `count` positions (arXiv 2309.17453)."""

    count: int

    def __call__(self, q, k):
        batch, heads, slots = k.positions.shape
        early = k.positions[:, :, None, :] < self.count
        return jnp.broadcast_to(early, (batch, heads, q.positions.shape[1], slots))


@dataclasses.dataclass(frozen=True)
class Present(Mask):
    """Keys and queries that exist: neither padding nor an empty slot; same segment in packed batches."""

    def __call__(self, q, k):
        seen = (k.positions[:, :, None, :] >= 0) & (q.positions[:, None, :, None] >= 0)
        if q.segments is not None and k.segments is not None:
            seen = seen & (q.segments[:, None, :, None] == k.segments[:, None, None, :])
        return seen


def from_config(mask: MaskConfig) -> Mask:
    """The mask of one layer."""
    if mask.kind == "full":
        return Present()
    seen = Causal() & Present()
    if mask.window:
        near = Window(mask.window)
        seen = seen & (near | Sinks(mask.sinks) if mask.sinks else near)
    return seen
