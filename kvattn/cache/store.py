"""Axis D: caches as values. A cache is leaves x an address, and the states of its layer; it knows nothing of attention.

Two things vary apart: how tokens are addressed (address.py), how a leaf encodes them (encode.py). Values of a leaf are
[B, heads, S, dim]: heads before slots, so that a decode step's two matmuls have leading batch dims and the cache is
read in place. Where head groups of a layer differ in mask or budget, its cache is a `Groups` of caches, concatenated
over heads.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from kvattn.cache import encode as encoding
from kvattn.cache.address import Address, Full, Kept, Paged, Ring
from kvattn.cache.allocator import Allocator, pages_for
from kvattn.cache.leaf import LeafSpec, per_sequence, per_token
from kvattn.cache.write import write
from kvattn.config import CacheConfig, MaskConfig, ModelConfig
from kvattn.config.check import need
from kvattn.errors import UserError
from kvattn.typed import shaped
from pallas_kernels import Leaf, codes


@flax.struct.dataclass
class Cache:
    """leaves: name -> pallas_kernels.Leaf; state: name -> [B, ...] of leaves per sequence; the address of both."""

    leaves: dict[str, Leaf]
    state: dict[str, jax.Array]
    address: Address

    @property
    def length(self) -> jax.Array:
        """[B] int32: tokens each row has seen."""
        return self.address.length

    @property
    def slots(self) -> int:
        """Slots of one row; 0 where nothing is held per token."""
        return self.address.slots(self.held) if self.leaves else 0

    @property
    def held(self) -> int:
        """Slots of a leaf, or tokens of a page."""
        return next((leaf.slots for leaf in self.leaves.values()), 0)


@flax.struct.dataclass
class Groups:
    """Caches of consecutive head groups of one owner; heads[i]: K/V heads of group i. The first holds the states."""

    groups: tuple[Cache, ...]
    heads: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())

    @property
    def length(self) -> jax.Array:
        return self.groups[0].length


def parts(cache: Any) -> Iterator[tuple[Cache, slice]]:
    """(a cache, its heads among the owner's): one for a Cache, one a group for Groups."""
    if isinstance(cache, Cache):
        yield cache, slice(None)
        return
    start = 0
    for group, heads in zip(cache.groups, cache.heads, strict=True):
        yield group, slice(start, start + heads)
        start += heads


# --- from a config ---------------------------------------------------------------------------------------------


def kind_of(store: CacheConfig, owner: int) -> str:
    return store.kinds[owner % len(store.kinds)]


def is_paged(store: CacheConfig, owner: int) -> bool:
    return kind_of(store, owner) == "paged"


def layout(cfg: ModelConfig, store: CacheConfig, owner: int, capacity: int) -> tuple[int, int, int]:
    """(slots of one row, ring, sinks) of an owner's cache for `capacity` tokens per sequence; ring 0 means that every
    token is kept. Slots are whole pages, or multiples of `store.multiple`."""
    return slots_for(store, owner, [cfg.mask(reader) for reader in cfg.readers(owner)], capacity)


def slots_for(store: CacheConfig, owner: int, masks: list[MaskConfig], capacity: int) -> tuple[int, int, int]:
    """`layout` for given masks of everything that looks at the cache."""
    return _layout(store, kind_of(store, owner), masks, capacity)


def _layout(store: CacheConfig, kind: str, masks: list[MaskConfig], capacity: int) -> tuple[int, int, int]:
    def whole(slots, unit):
        return -(-slots // unit) * unit

    if kind == "paged" or (kind == "kept" and store.kept_pages):
        return whole(capacity, store.page_size), 0, 0
    full = whole(capacity, store.multiple), 0, 0
    if kind in ("full", "kept") or (kind == "by_mask" and not all(mask.window for mask in masks)):
        return full
    sinks, window = max(mask.sinks for mask in masks), max(mask.window for mask in masks)
    ring = whole(sinks + window, store.multiple), window, sinks
    # Where the whole sequence fits in the window, a ring would never turn.
    return full if sinks + window >= capacity or ring[0] >= full[0] else ring


def check_store(cfg: ModelConfig, store: CacheConfig) -> None:
    """Axes A, C x axis D: a ring needs a window in every reader of its owner, a layout of V or a scale of keys a
    leaf of that role, a kept store leaves of equal heads. Raises UserError."""
    store.check()
    need(
        not cfg.scan_layers,
        "model.scan_layers is True with a cache; scanned layers copy the cache, set scan_layers to False to decode.",
    )
    for owner in cfg.owners:
        leaves = per_token(cfg.attention(owner).leaves(cfg))
        roles, kind = {leaf.role for leaf in leaves.values()}, kind_of(store, owner)
        need(
            not leaves or store.layout != "v_lanes" or "value" in roles,
            f"cache.layout is 'v_lanes' but layer {owner} leaves no V of its own; use rows or lanes.",
        )
        need(
            not leaves or store.key_scale != "channel" or "key" in roles,
            f"cache.key_scale is 'channel' but the key of layer {owner} is also the value; use token.",
        )
        masks = _masks(cfg, owner)
        if cfg.layer(owner).reads == "memory":
            need(
                store.memory > 0,
                f"cache.memory is {store.memory} but layer {owner} reads a memory; set it to the memory's tokens.",
            )
            continue
        for reader, mask in masks:
            need(
                mask.kind == "causal",
                f"model.layers' mask of layer {reader} is {mask.kind!r}, which sees tokens that are yet to come; a "
                "cache "
                "needs kind causal.",
            )
        if kind == "ring":
            for reader, mask in masks:
                need(
                    mask.window > 0,
                    f"cache.kinds gives layer {owner} a ring but layer {reader}, which reads it, has no window; "
                    "use full or by_mask, or set model.layers' masks.",
                )
        if kind == "kept" or store.keep is not None:
            need(
                len({leaf.shape[0] for leaf in leaves.values()}) <= 1,
                f"cache keeps tokens a head, but the leaves of layer {owner} have unequal heads; give K and V as many.",
            )
        need(
            store.keep is None or kind in ("full", "kept"),
            f"cache.keep drops tokens after a prefill, which {kind!r} in cache.kinds cannot give back; use full "
            "or kept.",
        )
        need(
            store.keep is None or not cfg.layer(owner).groups,
            f"cache.keep chooses tokens a head, and layer {owner} has head groups with masks of their own; set "
            "cache.keep to None.",
        )
        need(
            not cfg.layer(owner).groups or kind in ("full", "ring", "by_mask"),
            f"layer {owner} has head groups, whose caches are full or rings; set cache.kinds to full, ring or by_mask.",
        )


def _masks(cfg: ModelConfig, owner: int) -> list[tuple[int, MaskConfig]]:
    """(reader, mask) of everything that looks at the owner's cache."""
    groups = cfg.layer(owner).groups
    if groups:
        return [(owner, group.mask) for group in groups]
    return [(reader, cfg.mask(reader)) for reader in cfg.readers(owner)]


def specs(cfg: ModelConfig, store: CacheConfig, batch: int, capacity: int) -> tuple[Any, ...]:
    """Abstract caches (ShapeDtypeStruct leaves), indexed by layer; None for layers that own none.

    Raises UserError when the store does not fit the model or capacity is not positive.
    """
    check_store(cfg, store)
    if capacity <= 0:
        raise UserError(f"cache.capacity is {capacity}; it must be positive.")
    return tuple(
        _owner_spec(cfg, store, layer, batch, capacity) if layer in cfg.owners else None
        for layer in range(cfg.n_layers)
    )


def _owner_spec(cfg: ModelConfig, store: CacheConfig, owner: int, batch: int, capacity: int) -> Any:
    leaves, kind, groups = cfg.attention(owner).leaves(cfg), kind_of(store, owner), cfg.layer(owner).groups
    if cfg.layer(owner).reads == "memory":  # written once, whole
        return _spec(store, "full", leaves, [], batch, store.memory)
    if not groups:
        masks = [mask for _, mask in _masks(cfg, owner)]
        return _spec(store, kind, leaves, masks, batch, capacity)
    made: list[Cache] = []
    for group in groups:  # states are no head's: the first group holds them
        cut = {name: _heads_of(leaf, group.heads) for name, leaf in per_token(leaves).items()}
        mine = cut if made else per_sequence(leaves) | cut
        made.append(_spec(store, kind, mine, [group.mask], batch, capacity))
    return Groups(tuple(made), tuple(group.heads for group in groups))


def _heads_of(leaf: LeafSpec, heads: int) -> LeafSpec:
    return LeafSpec((heads, *leaf.shape[1:]), leaf.per, leaf.axes, leaf.role, leaf.dtype)


def _spec(store, kind, leaves, masks, batch, capacity) -> Cache:
    of = jax.ShapeDtypeStruct
    slots, ring, sinks = _layout(store, kind, masks, capacity)
    length, rows, tokens = of((batch,), jnp.int32), batch, per_token(leaves)
    heads = max((leaf.shape[0] for leaf in tokens.values()), default=0)
    if kind == "paged":
        address: Address = Paged(length, of((batch, slots // store.page_size), jnp.int32), store.page_size)
        rows, slots = 1 + pool_pages(store, batch, capacity), store.page_size
    elif kind == "kept":
        held, count = of((batch, heads, slots), jnp.int32), of((batch, heads), jnp.int32)
        address = Kept(length, held, count)
        if store.kept_pages:
            table = of((batch, heads, slots // store.page_size), jnp.int32)
            address = Kept(length, held, count, table, store.page_size)
            rows, slots = 1 + batch * heads * (slots // store.page_size), store.page_size
            tokens = {name: _heads_of(leaf, 1) for name, leaf in tokens.items()}
    else:
        address = Ring(length, ring, sinks) if ring else Full(length)
    held = {name: encoding.spec(store, leaf, rows, slots, batch) for name, leaf in tokens.items()}
    state = {
        name: of((batch, *leaf.shape), jnp.dtype(encoding.state_dtype(leaf)))
        for name, leaf in per_sequence(leaves).items()
    }
    return Cache(held, state, address)


def pool_pages(store: CacheConfig, batch: int, capacity: int) -> int:
    """Pages of a paged owner's pool that sequences can have; page 0, which none has, comes on top."""
    return store.pages or batch * pages_for(capacity, store.page_size)


def create(
    cfg: ModelConfig, store: CacheConfig, batch: int, capacity: int, tokens: Sequence[int] | None = None
) -> tuple[Any, ...]:
    """Empty caches for `batch` sequences of up to `capacity` tokens; zero-filled (a masked slot is still read).

    Paged stores give row b pages for tokens[b] tokens (None: for `capacity`); who wants to give them out later passes
    zeros and uses Allocator and `apply_pages`. Raises UserError as `specs`, OutOfPages for too small a pool.
    """
    abstract = specs(cfg, store, batch, capacity)
    table = None
    if any(isinstance(c, Cache) and isinstance(c.address, Paged) for c in abstract):
        allocator = Allocator(pool_pages(store, batch, capacity), store.page_size)
        allocator.allocate(dict(enumerate([capacity] * batch if tokens is None else tokens)))
        table = allocator.table(batch, pages_for(capacity, store.page_size))
    made = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), abstract)
    return tuple(_addressed(c, table) for c in made)


def _addressed(cache: Any, table: np.ndarray | None) -> Any:
    """A zero-filled cache with what its address must say: pages, and no token in any kept slot."""
    if not isinstance(cache, Cache):
        return cache
    address = cache.address
    if isinstance(address, Paged):
        return cache.replace(address=address.replace(table=jnp.array(table)))
    if isinstance(address, Kept):
        pages = None if address.table is None else 1 + jnp.arange(address.table.size, dtype=jnp.int32)
        own = None if pages is None else pages.reshape(address.table.shape)
        return cache.replace(address=address.replace(held=jnp.full_like(address.held, -1), table=own))
    return cache


def nbytes(caches: Any) -> int:
    """Bytes of leaves and states held, scales included (an address's own, `length` at 4 bytes per row and owner, tables
    at 4 per page, positions of kept tokens at 4 per slot, are not KV)."""
    owned = [part for c in caches if c is not None for part, _ in parts(c)]
    arrays = jax.tree.leaves([(c.leaves, c.state) for c in owned])
    return sum(-(-math.prod(a.shape) * codes.bits(a.dtype) // 8) for a in arrays)


def axes(cfg: ModelConfig, owner: int, cache: Any) -> Any:
    """The logical axes of every array of an owner's cache, in its own form: tuples in place of arrays. Raises UserError
    for pages, positions of kept tokens and head groups, which no table splits."""
    declared = cfg.attention(owner).leaves(cfg)
    if not isinstance(cache, Cache) or isinstance(cache.address, Paged | Kept):
        raise UserError("pages, kept tokens and head groups are not split over chips; use full, ring or by_mask.")
    leaves = {name: encoding.axes(leaf, declared[name]) for name, leaf in cache.leaves.items()}
    state = {name: ("cache_batch", *declared[name].axes) for name in cache.state}
    return Cache(leaves, state, cache.address.replace(length=("cache_batch",)))


# --- tokens in, tokens out -------------------------------------------------------------------------------------


@shaped
def stored(
    cache: Cache, entries: dict[str, Float[Array, "B _ T _"]], positions: Int32[Array, "B T"]
) -> dict[str, Float[Array, "B _ T _"]]:
    """Entries [B,heads,T,dim] at positions[B,T] as the cache would give them back, in the same shape: what a first
    prefill attends to."""
    out = {}
    for name, leaf in cache.leaves.items():
        x = entries[name]
        new = encoding.encode(leaf, x, positions, cache.length)
        exact = leaf.scale is None and leaf.encoding is None
        out[name] = encoding.decode(new, leaf.dtype if exact else x.dtype)
    return out


@shaped
def append(
    cache: Cache, entries: dict[str, Float[Array, "B _ T _"]], positions: Int32[Array, "B T"], state: Any = None
) -> Cache:
    """Writes entries [B,heads,T,dim] at absolute positions[B,T] (-1 = padding, skipped), and the layer's new `state`.

    In place under donation. A position beyond a cache's capacity or pages is dropped: callers check lengths first.
    """
    address = cache.address
    if cache.leaves:
        new = {n: encoding.encode(leaf, entries[n], positions, cache.length) for n, leaf in cache.leaves.items()}
        rows, slots = address.place(positions, cache.held)
        held, where = encoding.planes(cache.leaves)
        held = write(held, encoding.planes(new)[0], where, rows, slots)
        cache = cache.replace(leaves=encoding.joined(held, new))
    advanced = address.advanced(positions, cache.held)
    return cache.replace(address=advanced, state=cache.state if state is None else state)


def read(cache: Cache) -> tuple[dict[str, Leaf], jax.Array]:
    """(name -> Leaf of S slots, positions[B, 1 | K, S] int32, -1 where there is no token). Pages are gathered."""
    return {n: cache.address.rows(leaf) for n, leaf in cache.leaves.items()}, cache.address.positions(cache.held)


@shaped
def truncate(caches: tuple[Any, ...], length: Int32[Array, " B"]) -> tuple[Any, ...]:
    """Caches with the first length[B] positions of every row only: what was written behind them is gone.

    Raises UserError for rings and states, which have overwritten what a roll-back would need."""

    def one(cache: Cache) -> Cache:
        if cache.state:
            raise UserError(
                f"a state ({', '.join(cache.state)}) holds no earlier one; commit only what is accepted "
                "(forward with commit=False, then commit)."
            )
        return cache.replace(address=cache.address.truncated(length, cache.held))

    return tuple(c if c is None else mapped(one, c) for c in caches)


def mapped(f: Any, cache: Any) -> Any:
    """f of a cache, or of each of its groups."""
    return f(cache) if isinstance(cache, Cache) else cache.replace(groups=tuple(f(c) for c in cache.groups))


@functools.partial(jax.jit, donate_argnames="caches")
def _apply(caches: Any, table: jax.Array, length: jax.Array, source: jax.Array, target: jax.Array) -> Any:
    def one(cache):
        address = cache.address.replace(length=cache.length.at[:].set(length))
        if not isinstance(address, Paged):
            return cache.replace(address=address)
        pools, _ = encoding.planes(cache.leaves)
        pools = {name: pool.at[target].set(pool[source]) for name, pool in pools.items()}
        address = address.replace(table=address.table.at[:].set(table))
        return cache.replace(leaves=encoding.joined(pools, cache.leaves), address=address)

    return tuple(None if cache is None else mapped(one, cache) for cache in caches)


def apply_pages(caches: Any, table: np.ndarray, length: Any, copies: Sequence[tuple[int, int]] = ()) -> Any:
    """Caches with this table[B,n] and length[B] in every owner, after copying pages (from, to) as `Allocator.fork`
    asks. The caches given are donated. Raises UserError for a fork of caches that are not all paged."""
    held = [part for c in caches if c is not None for part, _ in parts(c)]
    if copies and any(not isinstance(part.address, Paged) for part in held):
        raise UserError("a fork shares pages, and some layers of this cache have none; set cache.kinds to ('paged',).")
    width = 1 << max(0, len(copies) - 1).bit_length()  # few shapes; what is left copies page 0 onto itself
    pairs = np.zeros((width, 2), np.int32)
    pairs[: len(copies)] = np.asarray(copies, np.int32).reshape(-1, 2)
    length = jnp.asarray(np.asarray(length, np.int32))
    return _apply(caches, jnp.asarray(table), length, jnp.asarray(pairs[:, 0]), jnp.asarray(pairs[:, 1]))
