"""How one leaf of a cache encodes its tokens: as they are, along lanes, or as int8, int4 or fp8 codes with scales.

    token scales    s[B,heads,t] = max over dim of |x| / limit: a token's codes never depend on another token, so that
                    writing token by token and in bulk give the same bits, and a code may lie in a ring or a page
    channel scales  s[B,heads,1,dim] = HEADROOM max over the row's first tokens of |x| / limit, keys only: fixed when a
                    row first holds tokens (its first prefill, or its first chunk), what exceeds it later is clipped

Every leaf is a `pallas_kernels.Leaf`, the form that kernels read. KVQuant (arXiv 2401.18079) and KIVI (arXiv
2402.02750) found keys to have outlying channels; int4 keys want channel scales. Scales are float32: 4 bytes a token and
head. An encoding of another kind is a `kvattn.config.Encoding` with the four methods of `Method`, named by
CacheConfig.encoding; kernels refuse what it holds, and attention decodes it.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from kvattn.cache.leaf import LeafSpec
from kvattn.config import CODES, CacheConfig
from kvattn.typed import shaped
from pallas_kernels import Leaf, codes

HEADROOM = 1.25  # channel scales: how far a later key may exceed the first tokens' largest before it is clipped


class Method(Protocol):
    """What an Encoding provides. `abstract`: shape and dtype of values and scale of `rows` x `slots` tokens of a leaf,
    a Leaf of ShapeDtypeStructs whose arrays are [rows,heads,slots,...]; `encode`: x[B,heads,T,dim] as that Leaf;
    `decode`: a Leaf as [B,heads,S,dim]; `token_bits`: bits that one token of the leaf takes, scales included."""

    def abstract(self, leaf: LeafSpec, rows: int, slots: int) -> Leaf: ...

    def encode(self, x: jax.Array) -> Leaf: ...

    def decode(self, leaf: Leaf, dtype: Any) -> jax.Array: ...

    def token_bits(self, leaf: LeafSpec) -> int: ...


def lanes(store: CacheConfig, leaf: LeafSpec) -> bool:
    """Does this leaf hold its tokens along lanes, [dim, S]?"""
    return store.layout == "lanes" or (store.layout == "v_lanes" and leaf.role == "value")


def by_channel(store: CacheConfig, leaf: LeafSpec) -> bool:
    """Does this leaf have a scale a channel and sequence, in place of one a token?"""
    return store.key_scale == "channel" and leaf.role == "key"


def spec(store: CacheConfig, leaf: LeafSpec, rows: int, slots: int, batch: int) -> Leaf:
    """The abstract leaf of `rows` x `slots` tokens (rows are sequences, or pages of all `batch` sequences)."""
    of, (heads, dim) = jax.ShapeDtypeStruct, leaf.shape
    if store.encoding is not None:
        return _marked(store.encoding.abstract(leaf, rows, slots), store.encoding)
    along = lanes(store, leaf)
    shape = (rows, heads, dim, slots) if along else (rows, heads, slots, dim)
    dtype = leaf.dtype or store.dtype
    values = of(shape, jnp.dtype(dtype))
    if dtype not in CODES:
        return Leaf(values, None, along)
    if by_channel(store, leaf):
        return Leaf(values, of((batch, heads, 1, dim), jnp.float32), along, True)
    return Leaf(values, of((rows, heads, slots), jnp.float32), along)


def token_bits(store: CacheConfig, leaf: LeafSpec) -> int:
    """Bits that one token of the leaf takes: heads x (dim x bits, and 32 of a scale where a token has its own)."""
    if store.encoding is not None:
        return store.encoding.token_bits(leaf)
    heads, dim = leaf.shape
    dtype = leaf.dtype or store.dtype
    scaled = dtype in CODES and not by_channel(store, leaf)
    return heads * (dim * codes.bits(dtype) + (32 if scaled else 0))


def sequence_bits(store: CacheConfig, leaf: LeafSpec) -> int:
    """Bits that the leaf takes once a sequence: a state, or the channel scales of keys."""
    if leaf.per == "sequence":
        return leaf.size * codes.bits(state_dtype(leaf))
    return 32 * leaf.size if by_channel(store, leaf) else 0


def state_dtype(leaf: LeafSpec) -> str:
    return leaf.dtype or "float32"


def _marked(leaf: Leaf, encoding: Any) -> Leaf:
    return Leaf(leaf.values, leaf.scale, leaf.lanes, leaf.channel, encoding)


@shaped
def encode(held: Leaf, x: Float[Array, "B K T H"], positions: Int32[Array, "B T"], length: Int32[Array, " B"]) -> Leaf:
    """x[B,heads,T,dim] as `held` holds it: the same kind of value, of T slots.

    positions[B,T] (-1 = padding) and length[B] (tokens held before) say which tokens fix a row's channel scale.
    """
    if held.encoding is not None:
        return _marked(held.encoding.encode(x), held.encoding)
    name, scale = held.dtype.name, None
    if held.scale is None:
        values = x.astype(held.dtype)
    elif held.channel:
        scale = _channel_scale(held, x, positions, length)
        values = codes.encode(x, jnp.where(scale > 0, scale, 1.0), name)
    else:
        scale = codes.scale_of(x, name)
        values = codes.encode(x, scale[..., None], name)
    return Leaf(values.swapaxes(2, 3) if held.lanes else values, scale, held.lanes, held.channel)


def _channel_scale(held: Leaf, x: jax.Array, positions: jax.Array, length: jax.Array) -> jax.Array:
    """[B,heads,1,dim]: that of the row, or for a row without tokens that of the tokens that arrive; 0 = none yet."""
    here = (positions >= 0)[:, None, :, None]
    first = codes.scale_of(jnp.where(here, x, jnp.zeros((), x.dtype)), held.dtype.name, axis=2)[:, :, None] * HEADROOM
    starts = (length == 0) & (positions >= 0).any(1)
    return jnp.where(starts[:, None, None, None], first, held.scale)


def decode(leaf: Leaf, dtype: Any) -> jax.Array:
    """The leaf's tokens dequantised, [B,heads,S,dim] in `dtype`."""
    if leaf.encoding is not None:
        return leaf.encoding.decode(leaf, dtype)
    values = leaf.values.swapaxes(2, 3) if leaf.lanes else leaf.values
    if leaf.scale is None:
        return values.astype(dtype)
    return codes.decode(values, leaf.scale if leaf.channel else leaf.scale[..., None], dtype)


def cast(leaf: Leaf, dtype: Any) -> Leaf:
    """The leaf as a matmul wants it: its values in `dtype` (codes stay codes beside their scales)."""
    if leaf.encoding is not None:
        return Leaf(decode(leaf, dtype))
    return Leaf(leaf.values.astype(dtype), leaf.scale, leaf.lanes, leaf.channel)


# --- a leaf as arrays with a slot axis -------------------------------------------------------------------------


def planes(leaves: dict[str, Leaf]) -> tuple[dict[str, jax.Array], dict[str, int]]:
    """(arrays that hold something per token, their slot axis): what a write must touch."""
    arrays, axes = {}, {}
    for name, leaf in leaves.items():
        arrays[name], axes[name] = leaf.values, 3 if leaf.lanes else 2
        if leaf.scale is not None and not leaf.channel:
            arrays[f"{name}.scale"], axes[f"{name}.scale"] = leaf.scale, 2
    return arrays, axes


def joined(arrays: dict[str, jax.Array], like: dict[str, Leaf]) -> dict[str, Leaf]:
    """The inverse of `planes`; channel scales are those of `like`."""
    return {
        name: Leaf(arrays[name], arrays.get(f"{name}.scale", leaf.scale), leaf.lanes, leaf.channel, leaf.encoding)
        for name, leaf in like.items()
    }


def axes(leaf: Leaf, spec: LeafSpec) -> Leaf:
    """Logical axes of each array of a leaf, in the leaf's own form (for sharding tables)."""
    heads, dim = spec.axes
    plain = ("cache_batch", heads, "cache_length", dim)
    along = (*plain[:2], plain[3], plain[2]) if leaf.lanes else plain
    scale = None if leaf.scale is None else plain[: len(leaf.scale.shape)]
    if leaf.channel:
        scale = (*plain[:2], None, plain[3])
    return Leaf(along, scale, leaf.lanes, leaf.channel, leaf.encoding)
