"""What a keep-policy leaves of the caches of a prompt: smaller caches, to decode with."""

from typing import Any

import jax
import jax.numpy as jnp

from kvattn.cache import encode
from kvattn.cache.address import Kept
from kvattn.cache.keep.base import Observed, Queries, Site
from kvattn.cache.keep.select import Room, budgets_of, selected
from kvattn.cache.leaf import per_token
from kvattn.cache.store import Cache, Groups, read
from kvattn.config import CacheConfig, ModelConfig
from kvattn.errors import UserError


def settle(
    cfg: ModelConfig,
    store: CacheConfig,
    caches: tuple[Any, ...],
    observed_queries: Queries | None = None,
    *,
    room: int,
    length: int | None = None,
) -> tuple[Any, ...]:
    """The caches after store.keep has chosen from every owner's, with room for `room` tokens to come; without a policy
    the caches as they are. `length`: tokens of the longest prompt (None = what the slots hold). A policy that wants
    queries scores an owner by those of all its readers. Caches without a token axis and those of a memory stay as they
    are. Pure and fit for jit (`room` and `length` static).

    Raises UserError: queries wanted and not given, budgets that are no integers or do not fit the heads.
    """
    policy = store.keep
    if policy is None:
        return caches
    if policy.wants_queries and observed_queries is None:
        raise UserError(
            f"cache.keep is {policy.tag!r}, which scores tokens by the prompt's last {policy.wants_queries} queries; "
            "collect them in the prefill (collect=('queries',)) and give them to settle."
        )
    if room < 0:
        raise UserError(f"room is {room}; give the number of tokens to come, at least 0.")

    def scores(owner, cache):
        queries = _of_readers(cfg, owner, observed_queries, policy.wants_queries) if policy.wants_queries else None
        return policy.score(observe(cfg, owner, cache, queries))

    return _settled(cfg, store, caches, scores, room, length)


def settled_specs(
    cfg: ModelConfig, store: CacheConfig, caches: tuple[Any, ...], *, room: int, length: int | None = None
) -> tuple[Any, ...]:
    """Abstract caches as `settle` makes them of abstract `caches` (kvattn.cache.specs): what is held while decoding,
    said before anything is allocated and without a query."""

    def no_scores(owner, cache):
        leaves, _ = read(cache)
        leaf = next(iter(leaves.values()))
        return jnp.zeros((cache.length.shape[0], leaf.heads, leaf.slots), jnp.float32)

    if store.keep is None:
        return caches
    return jax.eval_shape(lambda c: _settled(cfg, store, c, no_scores, room, length), caches)


def _settled(cfg, store, caches, scores, room: int, length: int | None) -> tuple[Any, ...]:
    """Every owner's cache with what its budget keeps by scores(owner, cache) -> [B,K,S]."""
    out, policy, what = list(caches), store.keep, f"cache.keep {store.keep.tag!r}"
    for number, owner in enumerate(cfg.owners):
        cache = caches[owner]
        if isinstance(cache, Groups):
            raise UserError(f"the cache of layer {owner} is in head groups, which are settled already; settle once.")
        if cfg.layer(owner).reads == "memory" or not cache.leaves:
            continue
        given = scores(owner, cache)
        leaf, slots = next(iter(per_token(cfg.attention(owner).leaves(cfg)).values())), cache.slots
        if given.shape != (cache.length.shape[0], leaf.shape[0], slots):
            raise UserError(
                f"{what} gives layer {owner} scores {list(given.shape)}; one a token and head is "
                f"{[cache.length.shape[0], leaf.shape[0], slots]}."
            )
        longest = slots if length is None else min(length, slots)
        budget = policy.budget(longest, Site(given.shape[1], number, len(cfg.owners)))
        each = tuple(min(one, longest) for one in budgets_of(budget, given.shape[1], what))
        page = cache.address.page if isinstance(cache.address, Kept) else 0
        out[owner] = selected(cache, given, each, Room(room, store.multiple, page))
    return tuple(out)


def observe(cfg: ModelConfig, owner: int, cache: Cache, queries: tuple[Any, jax.Array] | None = None) -> Observed:
    """What a policy is shown of an owner's cache."""
    declared, (leaves, positions) = cfg.attention(owner).leaves(cfg), read(cache)

    def of(*roles):
        own = [encode.decode(leaf, jnp.float32) for name, leaf in leaves.items() if declared[name].role in roles]
        return own[0] if len(own) == 1 else jnp.concatenate(own, axis=3)

    q, at = (None, None) if queries is None else queries
    return Observed(of("key", "both"), of("value", "both"), positions, cache.length, q, at)


def _of_readers(cfg: ModelConfig, owner: int, given: Queries, count: int) -> tuple[tuple[Any, ...], jax.Array]:
    """(the latest `count` queries of each row for every reader of the owner, their positions[B,count])."""
    positions = given.positions
    order = jnp.argsort(jnp.where(positions < 0, -1, positions), axis=1)[:, -count:]

    def latest(q):
        return jnp.take_along_axis(q, order.reshape(*order.shape, *([1] * (q.ndim - 2))), axis=1)

    q = tuple(jax.tree.map(latest, given.layers[reader]) for reader in cfg.readers(owner))
    return q, jnp.take_along_axis(positions, order, axis=1)
