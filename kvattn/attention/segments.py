"""What a layer can attend to in one pass: its own tokens, a cache, or both.

A view is built once, by the layer that owns K and V, after its entries were appended to its cache; every reader of
that owner attends to the same value: sharing K and V across layers is sharing of values. New entries are seen first and
committed last wherever an append would overwrite what early queries still see (rings), or nothing is to be committed.
"""

import dataclasses
from typing import Any

import flax.struct
import jax

from kvattn.attention import layouts
from kvattn.cache import Cache, Groups, append, parts, read, stored
from kvattn.config import Layer, MaskConfig
from kvattn.masks import Tokens, as_keys
from pallas_kernels import Leaf
from sharding import own_group, reshard


@dataclasses.dataclass(frozen=True)
class Where:
    """Positions of a pass, in each layout that needs them. tables: (rope, width) -> cos and sin where queries and where
    keys are made; made, own, cached: the pass's Tokens where entries are produced, where the tokens attend to each
    other, where to a cache. `empty`: the caches hold nothing yet. `commit`: entries are appended."""

    q_tables: dict[Any, Any]
    k_tables: dict[Any, Any]
    made: Tokens
    own: Tokens
    cached: Tokens
    empty: bool = False
    commit: bool = True


@flax.struct.dataclass
class Made:
    """What an owner's tokens leave: entries name -> [B,heads,T,dim], state name -> [B, ...] after them. `pass_only`:
    what readers of this very pass want beside, in no cache."""

    entries: dict[str, jax.Array]
    state: dict[str, jax.Array] = flax.struct.field(default_factory=dict)
    pass_only: Any = None


@flax.struct.dataclass
class Segment:
    """leaves: name -> Leaf of S slots; tokens: key positions [B, 1 | K, S] and segment ids [B,S]. `cache`: the cache
    that the leaves were read from, as kernels take it; None for the pass's own tokens."""

    leaves: dict[str, Leaf]
    tokens: Tokens
    cache: Cache | None = None

    @property
    def own(self) -> bool:
        """Whether these are the pass's own tokens. A cache's slots may be split over chips; own tokens are not."""
        return self.cache is None


@flax.struct.dataclass
class Part:
    """The segments of one head group; `heads`: its (first, count) of all K heads, () = all of them."""

    segments: tuple[Segment, ...]
    mask: MaskConfig = flax.struct.field(pytree_node=False)
    heads: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())

    def queries(self, q: Any) -> Any:
        """Of q[B,T,N,H] those that read these heads."""
        if not self.heads:
            return q
        first, count, total = self.heads
        return jax.tree.map(lambda a: a[:, :, first * (n := a.shape[2] // total) : (first + count) * n], q)


@flax.struct.dataclass
class View:
    """What one owner's readers see: head groups in order, the states before the pass, what was made for it alone."""

    parts: tuple[Part, ...]
    state: dict[str, jax.Array] = flax.struct.field(default_factory=dict)
    pass_only: Any = None

    @property
    def own(self) -> bool:
        """Whether the pass attends to its own tokens alone."""
        return all(segment.own for part in self.parts for segment in part.segments)


def view(family: Any, cfg: Any, layer: Layer, made: Made, where: Where, cache: Any) -> tuple[View, Any]:
    """The view of what was just made, and the cache with it appended.

    No cache: the entries themselves. `where.empty`: the entries as the cache stores them. One token, or an address that
    overwrites nothing: append, then read everything. Otherwise the cache before the append beside the new entries.
    """
    before = {} if cache is None else _state(cache)
    groups = _groups(layer, cache)
    if cache is None or not made.entries:
        segments = _own(family, cfg, made.entries, where) if made.entries else None
        out = tuple(Part((_heads(segments, h),), mask, h) for mask, h in groups) if segments else ()
        if cache is not None and where.commit:
            cache = append(cache, {}, where.cached.positions, made.state)
        return View(out, before, made.pass_only), cache
    out, held = [], []
    for (mask, heads), (part, span) in zip(groups, parts(cache), strict=True):
        entries = {n: x[:, span] for n, x in made.entries.items()} if heads else made.entries
        segments, new = _part(family, cfg, entries, where, part, made.state if part.state else None)
        out.append(Part(segments, mask, heads))
        held.append(new)
    new = held[0] if isinstance(cache, Cache) else Groups(tuple(held), cache.heads)
    return View(tuple(out), before, made.pass_only), new


def read_only(layer: Layer, cache: Any) -> View:
    """The view of a store that was written once: nothing is made, nothing is appended."""
    groups = zip(_groups(layer, cache), parts(cache), strict=True)
    return View(tuple(Part((_read(part),), mask, heads) for (mask, heads), (part, _) in groups), _state(cache))


def _state(cache: Any) -> dict[str, jax.Array]:
    return {name: x for part, _ in parts(cache) for name, x in part.state.items()}


def _groups(layer: Layer, cache: Any) -> list[tuple[MaskConfig, tuple[int, ...]]]:
    """(mask, (first, count, all) of the K heads) of each head group; one with () where there are none."""
    if layer.groups:
        counts, masks = [g.heads for g in layer.groups], [g.mask for g in layer.groups]
    elif isinstance(cache, Groups):
        counts, masks = list(cache.heads), [layer.mask] * len(cache.heads)
    else:
        return [(layer.mask, ())]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return [(mask, (first, count, sum(counts))) for mask, first, count in zip(masks, starts, counts, strict=True)]


def _heads(segment: Segment, heads: tuple[int, ...]) -> Segment:
    if not heads:
        return segment
    span = slice(heads[0], heads[0] + heads[1])
    return segment.replace(leaves=jax.tree.map(lambda x: x[:, span], segment.leaves))


def _part(family: Any, cfg: Any, entries: dict[str, jax.Array], where: Where, cache: Cache, state: Any) -> tuple:
    """(segments, the cache with the entries appended) of one cache."""
    axes = family.entry_axes(cfg)
    arriving = {n: reshard(x, axes[n], layouts.HELD) for n, x in entries.items()}
    positions = where.cached.positions
    after = append(cache, arriving, positions, state) if where.commit else cache
    if where.empty:
        return (_own(family, cfg, stored(cache, entries, where.own.positions), where),), after
    if not where.commit or (cache.address.overwrites and positions.shape[1] > 1):
        new = {n: Leaf(x) for n, x in stored(cache, arriving, positions).items()}
        return (_read(cache), Segment(new, as_keys(where.cached))), after
    return (_read(after),), after


def _own(family: Any, cfg: Any, entries: dict[str, jax.Array], where: Where) -> Segment:
    axes, leaves = family.entry_axes(cfg), family.leaves(cfg)
    held = {}
    for name, x in entries.items():
        want = layouts.OWN_VALUES if leaves[name].role == "value" else layouts.OWN_KEYS
        held[name] = Leaf(reshard(x, axes[name], want))
    return Segment(held, as_keys(where.own))


def _read(cache: Cache) -> Segment:
    leaves, positions = read(cache)
    return Segment(leaves, Tokens(positions), cache)


def own_heads(leaf: Leaf, q_heads: int, own: bool) -> Leaf:
    """Of a pass's own K or V with all heads here, those that this chip's query heads read; a cache as it is."""
    return Leaf(own_group(leaf.values, q_heads, "fresh_heads")) if own else leaf
