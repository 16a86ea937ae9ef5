"""Caches against a Python list that remembers everything."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvattn import cache
from kvattn.cache import Cache, Full, Ring
from kvattn.cache.write import ROW_WRITES
from kvattn.config import CacheConfig, MaskConfig
from kvattn.errors import UserError
from pallas_kernels import Leaf
from tests.helpers import tiny


def _empty(rows, slots, ring=0, sinks=0, dtype=jnp.float32):
    leaves = {"k": jnp.zeros((rows, 3, slots, 2), dtype), "v": jnp.zeros((rows, 1, slots, 5), dtype)}
    length = jnp.zeros((rows,), jnp.int32)
    leaves = {name: Leaf(x) for name, x in leaves.items()}
    return Cache(leaves, {}, Ring(length, ring, sinks) if ring else Full(length))


def _entries(rng, rows, count):
    shapes = {"k": (rows, 3, count, 2), "v": (rows, 1, count, 5)}
    return {name: jnp.asarray(rng.standard_normal(shape).astype(np.float32)) for name, shape in shapes.items()}


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    seed=st.integers(0, 10**6),
    ring=st.sampled_from([0, 3, 4]),
    sinks=st.sampled_from([0, 1, 2]),
    chunks=st.lists(st.sampled_from([1, 2, 5]), min_size=1, max_size=4),
    rows=st.sampled_from([2, ROW_WRITES + 1]),
)
def test_a_cache_holds_what_a_list_would(seed, ring, sinks, chunks, rows):
    """Ragged rows with padding anywhere; afterwards the valid slots are the full history, or sinks + last ring."""
    rng = np.random.default_rng(seed)
    sinks = sinks if ring else 0
    held = _empty(rows, sinks + ring if ring else 21, ring, sinks)
    history = [[] for _ in range(rows)]
    for count in chunks:
        new = _entries(rng, rows, count)
        positions = np.full((rows, count), -1, np.int32)
        for b in range(rows):
            for t in range(count):
                if rng.random() < 0.7:
                    positions[b, t] = len(history[b])
                    history[b].append({name: new[name][b, :, t] for name in new})
        held = cache.append(held, new, jnp.asarray(positions))
    entries, positions = jax.tree.map(np.asarray, cache.read(held))
    entries, positions = {name: leaf.values for name, leaf in entries.items()}, positions[:, 0]
    valid = positions >= 0
    for b in range(rows):
        n = len(history[b])
        want = [p for p in range(n) if not ring or p < sinks or p >= n - ring]
        assert sorted(positions[b][valid[b]].tolist()) == want
        for slot in np.flatnonzero(valid[b]):
            for name in entries:
                np.testing.assert_array_equal(entries[name][b, :, slot], history[b][positions[b, slot]][name])


def test_hand_checked_ring():
    """Ring of 3 after 1 sink, 6 tokens: slots hold positions 0 | 4 5 3."""
    held = _empty(1, 4, ring=3, sinks=1)
    values = np.arange(6, dtype=np.float32)
    for p in range(6):
        entries = {"k": jnp.full((1, 3, 1, 2), values[p]), "v": jnp.full((1, 1, 1, 5), values[p])}
        held = cache.append(held, entries, jnp.full((1, 1), p, jnp.int32))
    _, positions = cache.read(held)
    assert positions[0, 0].tolist() == [0, 4, 5, 3]
    assert held.leaves["v"].values[0, 0, :, 0].tolist() == [0, 4, 5, 3]


def test_a_full_cache_drops_what_does_not_fit_and_keeps_the_rest():
    held = _empty(1, 3)
    rng = np.random.default_rng(0)
    first = _entries(rng, 1, 3)
    held = cache.append(held, first, jnp.arange(3, dtype=jnp.int32)[None])
    after = cache.append(held, _entries(rng, 1, 1), jnp.full((1, 1), 3, jnp.int32))
    for name in first:
        np.testing.assert_array_equal(after.leaves[name].values, first[name])


def test_layout_covers_the_widest_reader():
    cfg = tiny.config(kv_source=(0, 0, 2, 2), masks=(MaskConfig(5, 2), MaskConfig(7, 1), MaskConfig(3), MaskConfig(4)))
    assert cache.layout(cfg, CacheConfig(("ring",)), 0, 50) == (9, 7, 2)
    assert cache.layout(cfg, CacheConfig(("ring",)), 2, 50) == (4, 4, 0)
    assert cache.layout(cfg, CacheConfig(("ring",)), 0, 8) == (8, 0, 0)  # everything fits: full
    mixed = tiny.config(masks=(MaskConfig(5), MaskConfig()))
    assert [cache.layout(mixed, CacheConfig(("by_mask",)), i, 50)[0] for i in range(4)] == [5, 50, 5, 50]


@pytest.mark.parametrize(
    "kinds,dtype,capacity,field",
    [
        (("pages",), "float32", 9, "cache.kinds"),
        (("full",), "int7", 9, "cache.dtype"),
        (("full",), "float32", 0, "cache.capacity"),
        (("ring",), "float32", 9, "cache.kinds"),
    ],
)
def test_bad_stores_raise(kinds, dtype, capacity, field):
    with pytest.raises(UserError, match=field):
        cache.create(tiny.CASES["gqa"], CacheConfig(kinds, dtype), 1, capacity)
