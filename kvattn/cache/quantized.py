"""How one leaf of a cache encodes its tokens: as they are, along lanes, or as int8, int4 or fp8 codes with scales.

    token scales    s[B,heads,t] = max over dim of |x| / limit: a token's codes never depend on another token, so that
                    writing token by token and in bulk give the same bits, and a code may lie in a ring or a page
    channel scales  s[B,heads,1,dim] = HEADROOM max over the row's first tokens of |x| / limit, keys only: fixed when a
                    row first holds tokens (its first prefill, or its first chunk), what exceeds it later is clipped

A leaf with neither codes nor lanes is a bare array [B,heads,S,dim]; every other one is a `pallas_kernels.Leaf`, the
form that kernels read. KVQuant (arXiv 2401.18079) and KIVI (arXiv 2402.02750) found keys to have outlying channels;
int4 keys want channel scales. Scales are float32: 4 bytes a token and head.
"""

from typing import Any

import jax
import jax.numpy as jnp

from kvattn.config import CacheConfig
from pallas_kernels import Leaf, codes

HEADROOM = 1.25  # channel scales: how far a later key may exceed the first tokens' largest before it is clipped

Entry = Any  # jax.Array [B,heads,S,dim] or Leaf


def lanes(store: CacheConfig, name: str) -> bool:
    """Does this leaf hold its tokens along lanes, [dim, S]?"""
    return store.layout == "lanes" or (store.layout == "v_lanes" and name == "v")


def spec(store: CacheConfig, name: str, rows: int, heads: int, slots: int, dim: int, batch: int) -> Entry:
    """The abstract leaf of `rows` x `slots` tokens (rows are sequences, or pages of all `batch` sequences)."""
    along = lanes(store, name)
    shape = (rows, heads, dim, slots) if along else (rows, heads, slots, dim)
    values = jax.ShapeDtypeStruct(shape, jnp.dtype(store.dtype))
    if store.dtype not in codes.LIMITS:
        return Leaf(values, None, along) if along else values
    if store.key_scale == "channel" and name == "k":
        return Leaf(values, jax.ShapeDtypeStruct((batch, heads, 1, dim), jnp.float32), along, True)
    return Leaf(values, jax.ShapeDtypeStruct((rows, heads, slots), jnp.float32), along)


def as_leaf(entry: Entry) -> Leaf:
    """An entry as kernels take it."""
    return entry if isinstance(entry, Leaf) else Leaf(entry)


def encode(entry: Entry, x: jax.Array, positions: jax.Array, length: jax.Array) -> Entry:
    """x[B,heads,T,dim] as `entry` holds it: the same kind of value, of T slots.

    positions[B,T] (-1 = padding) and length[B] (tokens held before) say which tokens fix a row's channel scale.
    """
    if not isinstance(entry, Leaf):
        return x.astype(entry.dtype)
    name, scale = entry.dtype.name, None
    if entry.scale is None:
        values = x.astype(entry.dtype)
    elif entry.channel:
        scale = _channel_scale(entry, x, positions, length)
        values = codes.encode(x, jnp.where(scale > 0, scale, 1.0), name)
    else:
        scale = codes.scale_of(x, name)
        values = codes.encode(x, scale[..., None], name)
    return Leaf(values.swapaxes(2, 3) if entry.lanes else values, scale, entry.lanes, entry.channel)


def _channel_scale(entry: Leaf, x: jax.Array, positions: jax.Array, length: jax.Array) -> jax.Array:
    """[B,heads,1,dim]: that of the row, or for a row without tokens that of the tokens that arrive; 0 = none yet."""
    here = (positions >= 0)[:, None, :, None]
    first = codes.scale_of(jnp.where(here, x, jnp.zeros((), x.dtype)), entry.dtype.name, axis=2)[:, :, None] * HEADROOM
    starts = (length == 0) & (positions >= 0).any(1)
    return jnp.where(starts[:, None, None, None], first, entry.scale)


def decode(entry: Entry, dtype: Any) -> jax.Array:
    """The leaf's tokens dequantised, [B,heads,S,dim] in `dtype`."""
    if not isinstance(entry, Leaf):
        return entry.astype(dtype)
    values = entry.values.swapaxes(2, 3) if entry.lanes else entry.values
    if entry.scale is None:
        return values.astype(dtype)
    return codes.decode(values, entry.scale if entry.channel else entry.scale[..., None], dtype)


def cast(entry: Entry, dtype: Any) -> Entry:
    """The leaf with its values (codes stay codes) in `dtype`, as a matmul wants them."""
    if not isinstance(entry, Leaf):
        return entry.astype(dtype)
    return Leaf(entry.values.astype(dtype), entry.scale, entry.lanes, entry.channel)


# --- a leaf as arrays with a slot axis -------------------------------------------------------------------------


def planes(entries: dict[str, Entry]) -> tuple[dict[str, jax.Array], dict[str, int]]:
    """(arrays that hold something per token, their slot axis): what a write must touch."""
    arrays, axes = {}, {}
    for name, entry in entries.items():
        if not isinstance(entry, Leaf):
            arrays[name], axes[name] = entry, 2
            continue
        arrays[name], axes[name] = entry.values, 3 if entry.lanes else 2
        if entry.scale is not None and not entry.channel:
            arrays[f"{name}.scale"], axes[f"{name}.scale"] = entry.scale, 2
    return arrays, axes


def joined(arrays: dict[str, jax.Array], like: dict[str, Entry]) -> dict[str, Entry]:
    """The inverse of `planes`; channel scales are those of `like`."""
    out: dict[str, Entry] = {}
    for name, entry in like.items():
        out[name] = arrays[name]
        if isinstance(entry, Leaf):
            scale = arrays.get(f"{name}.scale", entry.scale)
            out[name] = Leaf(arrays[name], scale, entry.lanes, entry.channel)
    return out


def axes(entry: Entry) -> Any:
    """Logical axes of each array of a leaf, in the leaf's own form (for sharding tables)."""
    plain = ("cache_batch", "cache_heads", "cache_length", "cache_dim")
    if not isinstance(entry, Leaf):
        return plain
    along = (*plain[:2], plain[3], plain[2]) if entry.lanes else plain
    scale = None if entry.scale is None else plain[:3]
    if entry.channel:
        scale = (*plain[:2], None, plain[3])
    return Leaf(along, scale, entry.lanes, entry.channel)
