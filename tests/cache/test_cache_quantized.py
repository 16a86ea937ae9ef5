"""Codes of K and V: the bounds of the sheet, whatever the kind and layout of the store."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvattn import cache, model
from kvattn.attention.core import attend_partial
from kvattn.cache import LeafSpec, encode
from kvattn.config import CacheConfig, MaskConfig
from kvattn.errors import UserError
from pallas_kernels import Leaf, codes
from pallas_kernels import reference as loops
from pallas_kernels.contract import Options
from tests.helpers import tiny
from tests.helpers.tolerances import F32_OP, close

NAMES = ("int8", "int4", "float8_e4m3fn")
LAYOUTS = ("rows", "lanes", "v_lanes")
KEY = LeafSpec((2, 10), role="key")
WINDOWED = tiny.config(n_k_heads=2, n_v_heads=6, masks=(MaskConfig(window=7, sinks=2),), n_layers=1)


def entries_of(rng, batch, count, cfg=WINDOWED):
    """{k: [B,2,T,10], v: [B,6,T,14]} of very different sizes from token to token."""
    sizes = 10.0 ** rng.uniform(-2, 2, (batch, 1, count, 1))
    return {
        name: jnp.asarray((sizes * rng.standard_normal((batch, heads, count, dim))).astype(np.float32))
        for name, heads, dim in ((name, *leaf.shape) for name, leaf in model.leaves(cfg)[0].items())
    }


def empty(store, batch=2, capacity=24):
    return cache.create(WINDOWED, store, batch, capacity)[0]


def dense(entry):
    return np.asarray(encode.decode(entry, jnp.float32))


def scales_of(x, name):
    """By the sheet, in float64: [B,heads,T,1]."""
    return np.abs(np.asarray(x, np.float64)).max(-1, keepdims=True) / codes.LIMITS[name]


# --- one token -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_read_is_within_half_a_step_of_what_was_written(name, layout, rng):
    new = entries_of(rng, 2, 24)
    held = cache.append(empty(CacheConfig(dtype=name, layout=layout)), new, jnp.tile(jnp.arange(24)[None], (2, 1)))
    got = cache.read(held)[0]
    for leaf, x in new.items():
        assert isinstance(got[leaf], Leaf)
        assert got[leaf].lanes == (layout == "lanes" or (layout == "v_lanes" and leaf == "v"))
        x, step = np.asarray(x, np.float64), scales_of(x, name)
        # An integer step is s; fp8 has 3 bits of mantissa, and below 2^-6 steps of 2^-9.
        bound = step / 2 if name != "float8_e4m3fn" else np.maximum(np.abs(x) / 16, step * 2.0**-10)
        error = np.abs(dense(got[leaf]) - x)
        assert (error <= bound * (1 + 1e-5)).all()
        assert (error.max((0, 1, 2)) > 0).all()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_values_on_the_grid_come_back_exactly(name, rng):
    limit = int(codes.LIMITS[name])
    grid = rng.integers(-limit, limit + 1, (2, 2, 24, 10))
    grid[..., 0] = limit  # so that the scale is the grid's
    x = (grid * 2.0 ** rng.integers(-8, 8, (2, 2, 24, 1))).astype(np.float32)
    new = {"k": jnp.asarray(x), "v": entries_of(rng, 2, 24)["v"]}
    held = cache.append(empty(CacheConfig(dtype=name)), new, jnp.tile(jnp.arange(24)[None], (2, 1)))
    np.testing.assert_array_equal(dense(held.leaves["k"]), x)
    np.testing.assert_array_equal(np.asarray(held.leaves["k"].values).astype(int), grid)


@pytest.mark.parametrize("name", NAMES)
def test_codes_do_not_depend_on_the_size_of_a_token_and_zero_stays_zero(name, rng):
    x = np.array(entries_of(rng, 2, 6)["k"])
    x[0, 0, 3] = 0
    leaf = encode.spec(CacheConfig(dtype=name), KEY, 2, 6, 2)
    at, none = jnp.zeros((2, 6), jnp.int32), jnp.zeros((2,), jnp.int32)
    one, other = (encode.encode(leaf, jnp.asarray(x * a), at, none) for a in (np.float32(1), np.float32(64)))
    some, others = (np.asarray(x.values).astype(np.float32) for x in (one, other))
    np.testing.assert_array_equal(some, others)
    kept = np.abs(x).max(-1) > 0
    np.testing.assert_array_equal(np.asarray(one.scale)[kept] * 64, np.asarray(other.scale)[kept])
    assert not dense(one)[0, 0, 3].any()


# --- however it was written ------------------------------------------------------------------------------------

BITS = [
    *(CacheConfig((kind,), name, layout=layout) for kind in ("full", "ring") for name in NAMES for layout in LAYOUTS),
    *(CacheConfig(("paged",), name, page_size=16, layout=layout) for name in NAMES for layout in ("rows", "lanes")),
    CacheConfig(("paged",), page_size=16),
    CacheConfig(("full",), layout="lanes", multiple=5),
    CacheConfig(("ring",), "bfloat16", layout="v_lanes", multiple=8),
]


def _id(store):
    return f"{store.kinds[0]}-{store.dtype}-{store.layout}"


@pytest.mark.parametrize("batch", [2, 9])  # rows written one by one, and by a scatter
@pytest.mark.parametrize("store", BITS, ids=_id)
def test_token_by_token_and_in_bulk_are_the_same_bits(store, batch, rng):
    """Ragged rows, padding in between; every array of every leaf, scales and unwritten slots included."""
    new, width = entries_of(rng, batch, 20), 20
    positions = np.full((batch, width), -1, np.int32)
    for b in range(batch):
        there = np.sort(rng.choice(width, width - b, replace=False))
        positions[b, there] = np.arange(len(there))
    append = jax.jit(cache.append)
    bulk = append(empty(store, batch), new, jnp.asarray(positions))
    single = empty(store, batch)
    for t in range(width):
        part = {name: x[:, :, t : t + 1] for name, x in new.items()}
        single = append(single, part, jnp.asarray(positions[:, t : t + 1]))
    some, others = jax.tree.leaves(bulk), jax.tree.leaves(single)
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        np.testing.assert_array_equal(np.asarray(one).astype(np.float32), np.asarray(other).astype(np.float32))
    assert any(np.asarray(x).astype(np.float32).any() for x in some[:-1])


@pytest.mark.parametrize("store", BITS, ids=_id)
def test_a_store_holds_what_a_list_would(store, rng):
    """Addressing and encoding are apart: every kind gives back the decoded token of every position it should hold."""
    new = entries_of(rng, 2, 20)
    at = jnp.tile(jnp.arange(20)[None], (2, 1))
    held = jax.jit(cache.append)(empty(store), new, at)
    entries, positions = jax.jit(cache.read)(held)
    positions = positions[:, 0]
    valid = positions >= 0
    want = [p for p in range(20) if store.kinds != ("ring",) or p < 2 or p >= 13]
    for b in range(2):
        assert sorted(np.asarray(positions)[b][np.asarray(valid)[b]].tolist()) == want
    alone = encode.spec(dataclasses.replace(store, layout="rows"), KEY, 2, 20, 2)
    for name in entries:
        exact = dense(encode.encode(alone, new[name], at, jnp.zeros((2,), jnp.int32)))
        for b, slot in zip(*np.nonzero(np.asarray(valid)), strict=True):
            np.testing.assert_array_equal(dense(entries[name])[b, :, slot], exact[b, :, positions[b, slot]])


# --- keys per channel ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["rows", "lanes"])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_channel_scales_are_fixed_by_the_first_tokens(name, layout, rng):
    """Each row by its own first tokens, padding apart; later tokens clip at the headroom and change no earlier code."""
    store = CacheConfig(dtype=name, key_scale="channel", layout=layout)
    new = entries_of(rng, 2, 6)
    positions = jnp.asarray([[0, 1, 2, 3, 4, 5], [-1, -1, 0, 1, 2, 3]], jnp.int32)
    held = cache.append(empty(store), new, positions)
    k, first = np.asarray(new["k"], np.float64), held.leaves["k"]
    top = np.stack([np.abs(k[0]).max(1), np.abs(k[1, :, 2:]).max(1)])[:, :, None]
    close(first.scale, top * encode.HEADROOM / codes.LIMITS[name], F32_OP)
    assert (np.abs(dense(first)[0, :, :6] - k[0]) <= np.asarray(first.scale)[0] / 2 * (1 + 1e-5)).all()

    later = {"k": jnp.full((2, 2, 1, 10), 1e6), "v": new["v"][:, :, :1]}
    after = cache.append(held, later, jnp.asarray([[6], [-1]], jnp.int32)).leaves["k"]
    np.testing.assert_array_equal(after.scale, first.scale)
    close(dense(after)[0, :, 6], top[0, :, 0] * encode.HEADROOM, F32_OP)
    np.testing.assert_array_equal(dense(after)[0, :, :6], dense(first)[0, :, :6])
    np.testing.assert_array_equal(dense(after)[1], dense(first)[1])


def test_channel_scales_help_keys_with_an_outlying_channel(rng):
    x = rng.standard_normal((2, 2, 20, 10)).astype(np.float32)
    x[..., 3] *= 50
    new = {"k": jnp.asarray(x), "v": entries_of(rng, 2, 20)["v"]}
    at = jnp.tile(jnp.arange(20)[None], (2, 1))

    def error(key_scale):
        held = cache.append(empty(CacheConfig(dtype="int4", key_scale=key_scale)), new, at)
        return np.abs(dense(held.leaves["k"])[:, :, :20] - x)[..., [0, 1, 2, 4, 5, 6, 7, 8, 9]].mean()

    assert 5 * error("channel") < error("token")


# --- attention folds the scales --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "store",
    [s for s in BITS if s.dtype in NAMES and s.kinds != ("ring",)]
    + [CacheConfig(dtype="int8", key_scale="channel", layout="v_lanes")],
    ids=_id,
)
def test_attention_over_codes_is_attention_over_what_they_mean(store, rng):
    """Against the loops of the kernels' contract on the raw cache (pages, lanes, codes), and over the decoded K, V."""
    new, length = entries_of(rng, 2, 20), 20
    new = {name: x / jnp.abs(x).max() for name, x in new.items()}
    held = cache.append(empty(store), new, jnp.tile(jnp.arange(length, dtype=jnp.int32)[None], (2, 1)))
    q = jnp.asarray(rng.standard_normal((2, 3, 6, 10)).astype(np.float32))
    at = jnp.asarray([[17, 18, 19], [0, 7, -1]], jnp.int32)
    entries, positions = cache.read(held)
    mask = (positions[:, :, None] >= 0) & (positions[:, :, None] <= at[:, None, :, None])
    got = attend_partial(q, *(encode.cast(entries[n], q.dtype) for n in "kv"), mask, scale=0.3)
    kv = held.address.kv(held.leaves["k"], held.leaves["v"], 0)
    want = loops.decode_attention(q, kv, at, Options(0.3))
    for part, name in zip(got, ("out", "max", "sum"), strict=True):
        close(part, getattr(want, name), F32_OP, name)
    plain = attend_partial(q, *(jnp.asarray(dense(entries[n])) for n in "kv"), mask, scale=0.3)
    close(got.out, plain.out, F32_OP)

    exact = attend_partial(q, new["k"], new["v"], mask[..., :length], scale=0.3)
    if store.dtype != "float8_e4m3fn" and store.key_scale == "token":
        # |logit error| <= |q|_1 max_s / 2, which moves a probability by at most e^(2 error); values move by max_s / 2.
        sk, sv = (scales_of(new[n], store.dtype).max() for n in "kv")
        moved = 0.3 * np.abs(np.asarray(q)).sum(-1) * sk / 2
        bound = sv / 2 + (np.exp(2 * moved) - 1) * 1.0  # |v| <= 1
        assert (np.abs(np.asarray(got.out - exact.out)).max(-1) <= bound).all()
        seen = np.asarray(got.sum) > 0
        assert (np.abs(np.asarray(got.max - exact.max))[seen] <= moved[seen] * (1 + 1e-5)).all()


def test_error_halves_with_each_bit(rng):
    """Three more bits of int4: int8 has a sixteenth of its error, by the limits 127 and 7."""
    new, at = entries_of(rng, 2, 20), jnp.tile(jnp.arange(20)[None], (2, 1))
    error = {}
    for name in ("int8", "int4"):
        held = cache.append(empty(CacheConfig(dtype=name)), new, at).leaves["k"]
        error[name] = (np.abs(dense(held)[:, :, :20] - np.asarray(new["k"])) / scales_of(new["k"], "int8")).mean()
    assert 0.8 < error["int4"] / error["int8"] / (127 / 7) < 1.2


# --- what is legal ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"key_scale": "channel"}, "cache.key_scale"),
        ({"key_scale": "head"}, "cache.key_scale"),
        ({"key_scale": "channel", "dtype": "int8", "kinds": ("paged",)}, "cache.key_scale"),
        ({"layout": "columns"}, "cache.layout"),
        ({"dtype": "float16"}, "cache.dtype"),
        ({"multiple": 0}, "cache.multiple"),
        ({"kinds": ("paged",), "page_size": 24}, "cache.page_size"),
        ({"kinds": ("paged",), "pages": -1}, "cache.pages"),
        ({"pages": 3}, "cache.pages"),
    ],
)
def test_bad_stores_raise(changes, field):
    with pytest.raises(UserError, match=field):
        cache.create(tiny.BASE, CacheConfig(**changes), 1, 8)


def test_what_a_model_has_no_leaf_for_raises():
    tied = tiny.CASES["tied_kv"]
    for changes, field in (({"layout": "v_lanes"}, "cache.layout"), ({"key_scale": "channel"}, "cache.key_scale")):
        with pytest.raises(UserError, match=f"{field}.*layer 0"):
            cache.create(tied, CacheConfig(dtype="int8", **changes), 1, 8)


def test_slots_are_rounded_up_to_a_multiple():
    for kind, multiple, capacity, want in (
        ("full", 8, 20, (24, 0, 0)),
        ("ring", 4, 40, (12, 7, 2)),
        ("ring", 16, 12, (16, 0, 0)),
        ("paged", 8, 20, (32, 0, 0)),
    ):
        store = CacheConfig((kind,), multiple=multiple, page_size=16)
        assert cache.layout(WINDOWED, store, 0, capacity) == want
        assert cache.create(WINDOWED, store, 1, capacity)[0].slots == want[0]
