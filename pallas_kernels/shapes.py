"""What all kernels share: the rows of a group of query heads, the blocks of keys a sequence must read, splits."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.contract import KV, Options, Problem

LOG2E = math.log2(math.e)


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def rows_of(q: jax.Array, p: Problem, pad: int) -> jax.Array:
    """q[B,T,N,H] -> [B,J,R,H] with J = p.groups and R = p.rows padded to a multiple of `pad`: row g T + t is token t of
    the group's head g."""
    x = q.reshape(p.batch, p.tokens, p.groups, p.heads // p.groups, p.key_dim).transpose(0, 2, 3, 1, 4)
    x = x.reshape(p.batch, p.groups, p.rows, p.key_dim)
    return jnp.pad(x, ((0, 0), (0, 0), (0, round_up(p.rows, pad) - p.rows), (0, 0)))


def row_positions(positions: jax.Array, p: Problem, pad: int) -> jax.Array:
    """positions[B,T] int32 -> [B,R] of the rows of `rows_of`; padding rows are at -1 and see nothing."""
    x = jnp.tile(positions, (1, p.heads // p.groups))
    return jnp.pad(x, ((0, 0), (0, round_up(p.rows, pad) - p.rows)), constant_values=-1)


def heads_of(x: jax.Array, p: Problem) -> jax.Array:
    """[...,B,J,R,V] of a kernel's rows -> [...,B,T,N,V]: the inverse of `rows_of`."""
    lead, (b, j, _, v) = x.shape[:-4], x.shape[-4:]
    x = x[..., : p.rows, :].reshape(*lead, b, j, p.heads // p.groups, p.tokens, v)
    x = jnp.moveaxis(x, -2, -4)  # [..., b, t, j, g, v]
    return x.reshape(*lead, b, p.tokens, p.heads, v)


def stats_of(x: jax.Array, p: Problem) -> jax.Array:
    """[...,B,J,R] -> [...,B,T,N]."""
    return heads_of(x[..., None], p)[..., 0]


class Blocks(NamedTuple):
    """Blocks of `size` keys that row b reads: for i in range(count[b]), block `index(i)`; `first`, `count` int32 [B].
    `sink_blocks` leading blocks are read besides those from `first` on."""

    first: jax.Array
    count: jax.Array
    size: int
    sink_blocks: int

    def index(self, i: Any, first: Any) -> Any:
        """Block that the i-th step of a row reads, given that row's `first`."""
        if not self.sink_blocks:
            return first + i
        return jnp.where(i < self.sink_blocks, i, first + i - self.sink_blocks)


def blocks(kv: KV, positions: jax.Array, options: Options, size: int) -> Blocks:
    """Which blocks of `size` slots each row must read: those with a visible key for some of its queries. Rows with
    padding queries only read nothing."""
    start = jnp.int32(0) if kv.start is None else kv.start
    live = positions >= 0
    newest = jnp.max(jnp.where(live, positions, -1), axis=1)
    oldest = jnp.min(jnp.where(live, positions, jnp.iinfo(jnp.int32).max), axis=1)
    end = jnp.minimum(kv.length, newest + 1)  # tokens that can be seen
    used = kv.slots if not kv.ring else min(kv.slots, kv.ring + kv.ring_sinks)
    end = jnp.clip(end - start, 0, used)
    if kv.ring:  # a turned ring holds its window in any order
        end = jnp.where(newest < 0, 0, jnp.clip(kv.length - start, 0, used))
    last = -(-end // size)
    if not options.window or kv.ring:
        return Blocks(jnp.zeros_like(last), last, size, 0)
    sink_blocks = -(-min(options.sinks, kv.slots) // size)
    low = jnp.clip(oldest - options.window + 1 - start, 0, kv.slots) // size
    low = jnp.clip(low, sink_blocks, jnp.maximum(last, sink_blocks))
    return Blocks(low, jnp.where(last > sink_blocks, sink_blocks + last - low, last), size, sink_blocks)


def split_range(count: Any, splits: int, split: Any) -> tuple[Any, Any]:
    """Steps [low, high) of a row with `count` steps that split number `split` takes: even shares, none twice."""
    share = (count + splits - 1) // splits
    low = jnp.minimum(split * share, count)
    return low, jnp.minimum(low + share, count)
