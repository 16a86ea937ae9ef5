"""Pages: a paged cache is a contiguous one whatever its table; its allocator neither loses nor doubles a page."""

import collections
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvattn import cache, model
from kvattn.cache import LeafSpec, address, encode
from kvattn.cache.allocator import Allocator, OutOfPages
from kvattn.config import CacheConfig, DecodeConfig, MaskConfig
from kvattn.decode import generation as decode
from kvattn.errors import UserError
from tests.helpers import tiny
from tests.helpers.models import lively, tokens_of

P = 16
CFG = tiny.config(
    n_layers=3, n_k_heads=2, n_v_heads=6, kv_source=(0, 0, 2), masks=(MaskConfig(window=20, sinks=3), MaskConfig())
)
STORES = {
    "float32": CacheConfig(("paged",), page_size=P),
    "int8": CacheConfig(("paged",), "int8", page_size=P),
    "int4-lanes": CacheConfig(("paged",), "int4", layout="lanes", page_size=P),
    "bfloat16-v_lanes": CacheConfig(("paged",), "bfloat16", layout="v_lanes", page_size=P),
}


@functools.cache
def _params():
    return lively(CFG)


@functools.partial(jax.jit, static_argnames="fresh")
def _pass(params, tokens, positions, caches, fresh):
    out, caches = model.forward(params, CFG, model.Inputs(tokens, positions, empty=fresh), caches=caches)
    return out.logits, caches


def _forward(tokens, positions, caches, fresh=False):
    return _pass(_params(), jnp.asarray(tokens), positions, caches, fresh)


def at(starts, count):
    return jnp.asarray(np.asarray(starts)[:, None] + np.arange(count), jnp.int32)


def run(caches, tokens, prefill, length):
    """Rows in lock step: logits of each decoded position [B, length - prefill, W]."""
    rows = len(tokens)
    _, caches = _forward(tokens[:, :prefill], at([0] * rows, prefill), caches, fresh=True)
    out = []
    for t in range(prefill, length):
        logits, caches = _forward(tokens[:, t : t + 1], at([t] * rows, 1), caches)
        out.append(np.asarray(logits[:, 0]))
    return np.stack(out, 1), caches


def owners(caches):
    return [c for c in caches if c is not None]


def contiguous(store, batch, capacity):
    full = CacheConfig(("full",), store.dtype, layout=store.layout)
    return cache.create(CFG, full, batch, capacity)


def shuffled(caches, rng):
    """The same caches (empty) with their pages handed out in another order."""
    pages = owners(caches)[0].address.table.size
    order = rng.permutation(np.arange(1, pages + 1)).reshape(owners(caches)[0].address.table.shape).astype(np.int32)
    return cache.apply_pages(caches, order, np.zeros(len(order)))


@pytest.mark.parametrize("name", STORES)
def test_any_order_of_pages_is_a_contiguous_cache(name, rng):
    """Bit for bit: 2 rows, 3 pages each, 20 tokens prefilled and 16 decoded; two layers read the first owner."""
    tokens = tokens_of(CFG, rows=2, length=36)
    want, _ = run(contiguous(STORES[name], 2, 48), tokens, 20, 36)
    for _ in range(2):
        got, caches = run(shuffled(cache.create(CFG, STORES[name], 2, 48), rng), tokens, 20, 36)
        np.testing.assert_array_equal(got, want)
        assert all((np.asarray(c.length) == 36).all() for c in owners(caches))


@pytest.mark.parametrize("name", STORES)
def test_what_lies_in_unused_pages_and_slots_never_matters(name, rng):
    tokens = tokens_of(CFG, rows=2, length=30)
    caches = cache.create(CFG, STORES[name], 2, 48, tokens=[30, 30])  # two pages of three; the pool has six and page 0

    def littered(caches):
        def litter(x):
            noise = rng.uniform(-100, 100, x.shape).astype(np.float32)
            return jnp.asarray(noise).astype(x.dtype)

        return tuple(c and c.replace(leaves=jax.tree.map(litter, c.leaves)) for c in caches)

    want, _ = run(caches, tokens, 20, 30)
    got, after = run(littered(cache.create(CFG, STORES[name], 2, 48, tokens=[30, 30])), tokens, 20, 30)
    np.testing.assert_array_equal(got, want)
    # ... and is never written: page 0, the pages of nobody, and what padding rows could have touched.
    before = littered(cache.create(CFG, STORES[name], 2, 48, tokens=[30, 30]))
    held = [np.asarray(x).astype(np.float32) for x in jax.tree.leaves([c.leaves for c in owners(before)])]
    positions = jnp.asarray([[30, 31, 32, 40], [-1, 47, 48, 100]], jnp.int32)  # 32 and on have no page
    _, after = _forward(tokens[:, :4], positions, before)
    leaves = jax.tree.leaves([c.leaves for c in owners(after)])
    for was, now, c in zip(held, leaves, _owner_of_leaf(after), strict=True):
        used = np.asarray(c.address.table)[0, :2]
        others = np.setdiff1d(np.arange(len(was)), used)
        np.testing.assert_array_equal(np.asarray(now).astype(np.float32)[others], was[others])
        assert (np.asarray(now).astype(np.float32)[used[1], ..., -1] != was[used[1], ..., -1]).any()
        assert np.asarray(c.length).tolist() == [32, 0]  # a dropped token is not held


def _owner_of_leaf(caches):
    return [c for c in owners(caches) for _ in jax.tree.leaves(c.leaves)]


@pytest.mark.parametrize("name", STORES)
@pytest.mark.parametrize("length", [32, 37])  # at the end of a page, inside one
def test_a_fork_shares_pages_and_neither_branch_sees_the_other(name, length, rng):
    """Row 1 forks row 0 after `length` tokens; both go on with other tokens, as two rows that never shared."""
    store = CacheConfig(("paged",), STORES[name].dtype, layout=STORES[name].layout, page_size=P, pages=7)
    tokens = tokens_of(CFG, rows=2, length=50)
    tokens[1, :length] = tokens[0, :length]
    alone = contiguous(store, 2, 64)
    _, alone = _forward(tokens[:, :length], at([0, 0], length), alone, fresh=True)

    allocator = Allocator(7, P)
    caches = cache.create(CFG, store, 2, 64, tokens=[0, 0])
    allocator.allocate({0: 50})
    caches = cache.apply_pages(caches, allocator.table(2, 4), [0, 0])
    first = np.full((2, length), -1, np.int32)
    first[0] = np.arange(length)
    _, caches = _forward(tokens[:, :length], jnp.asarray(first), caches, fresh=True)
    copies = allocator.fork(0, 1, length, tokens=50)
    assert len(copies) == (length % P > 0)
    full = length // P
    assert allocator.rows[0][:full] == allocator.rows[1][:full] and not set(allocator.rows[0][full:]) & set(
        allocator.rows[1][full:]
    )
    caches = cache.apply_pages(caches, allocator.table(2, 4), [length, length], copies)
    for t in range(length, 50):
        want, alone = _forward(tokens[:, t : t + 1], at([t, t], 1), alone)
        got, caches = _forward(tokens[:, t : t + 1], at([t, t], 1), caches)
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_a_published_prefix_is_reused():
    """Row 1 starts with row 0's full pages, prefills the rest, and decodes as if it had computed all of it."""
    tokens = tokens_of(CFG, rows=2, length=44)
    tokens[1, :37] = tokens[0, :37]
    want, _ = run(cache.create(CFG, STORES["int8"], 2, 48), tokens, 40, 44)
    allocator = Allocator(6, P)
    allocator.allocate({0: 44})
    caches = cache.apply_pages(cache.create(CFG, STORES["int8"], 2, 48, tokens=[0, 0]), allocator.table(2, 3), [0, 0])
    first = np.stack([np.arange(40), np.full(40, -1)]).astype(np.int32)
    _, caches = _forward(tokens[:, :40], jnp.asarray(first), caches, fresh=True)
    allocator.publish(0, tokens[0, :40].tolist())
    assert allocator.reuse(1, tokens[1, :32].tolist()) == P  # one token is left to compute
    allocator.release(1)
    other = tokens[1, :40].copy()
    other[3] += 1 if other[3] == 0 else -1
    assert allocator.reuse(2, other.tolist()) == 0
    known = allocator.reuse(1, tokens[1, :40].tolist())
    assert known == 32
    allocator.allocate({1: 44})
    assert allocator.free == 2
    caches = cache.apply_pages(caches, allocator.table(2, 3), [40, known])
    rest = np.stack([np.full(8, -1), np.arange(32, 40)]).astype(np.int32)
    _, caches = _forward(tokens[:, 32:40], jnp.asarray(rest), caches)
    for t in range(40, 44):
        got, caches = _forward(tokens[:, t : t + 1], at([t, t], 1), caches)
        np.testing.assert_allclose(np.asarray(got[:, 0]), want[:, t - 40], rtol=1e-4, atol=1e-4)
    allocator.release(0)
    assert allocator.reuse(3, tokens[0].tolist()) == 32  # row 1 still has them
    for row in (1, 2, 3):
        allocator.release(row)
    assert allocator.free == 6 and allocator.reuse(0, tokens[0].tolist()) == 0


# --- the allocator ---------------------------------------------------------------------------------------------


def invariants(allocator, known):
    """`known`: row -> tokens it must have pages for."""
    rows = allocator.rows
    assert set(rows) == set(known)
    used = collections.Counter(page for pages in rows.values() for page in pages)
    assert allocator.free + len(used) == allocator.pages
    for page in range(allocator.pages + 1):
        assert allocator.references(page) == used[page]
    assert 0 not in used
    for row, tokens in known.items():
        assert len(rows[row]) * allocator.page_size >= tokens and len(set(rows[row])) == len(rows[row])
    width = max((len(pages) for pages in rows.values()), default=1)
    table = allocator.table(6, width)
    assert all(
        table[row, : len(pages)].tolist() == list(pages) and not table[row, len(pages) :].any()
        for row, pages in rows.items()
    )


_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["allocate", "fork", "release"]), st.integers(0, 5), st.integers(0, 5), st.integers(0, 90)
    ),
    max_size=25,
)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(pages=st.integers(1, 12), steps=_STEPS)
def test_no_page_is_lost_or_given_twice(pages, steps):
    allocator, known = Allocator(pages, P), {}
    for what, row, other, tokens in steps:
        before, free = allocator.rows, allocator.free
        try:
            if what == "allocate":
                allocator.allocate({row: tokens, other: tokens // 2})
                for r, n in ((row, tokens), (other, tokens // 2)):
                    n = tokens // 2 if row == other else n
                    known[r] = max(known.get(r, 0), n)
            elif what == "fork":
                if known and tokens % 3:  # mostly a fork that can be: of a row that has pages, to one that has none
                    row = sorted(known)[row % len(known)]
                    other = next((r for r in range(6) if r not in known), other)
                    tokens %= len(before[row]) * P + 1
                copies = allocator.fork(row, other, tokens)
                known[other] = tokens
                shared = tokens // P
                assert allocator.rows[other][:shared] == before[row][:shared]
                assert copies == ([(before[row][shared], allocator.rows[other][shared])] if tokens % P else [])
            else:
                row = sorted(known)[row % len(known)] if known else row
                allocator.release(row)
                del known[row]
        except UserError as error:
            assert "\n" not in str(error)
            assert allocator.rows == before and allocator.free == free  # all or nothing
            if isinstance(error, OutOfPages):
                assert what != "release"
        invariants(allocator, known)


def test_a_shared_page_is_free_when_nobody_has_it():
    allocator = Allocator(3, P)
    allocator.allocate({0: 40})
    allocator.release(0)
    allocator.allocate({0: 33})
    assert allocator.fork(0, 1, 32) == [] and allocator.rows == {0: (1, 2, 3), 1: (1, 2)}
    allocator.release(0)
    assert allocator.free == 1 and allocator.references(1) == allocator.references(2) == 1
    allocator.allocate({2: 16})
    assert allocator.rows == {1: (1, 2), 2: (3,)}
    allocator.release(1)
    assert allocator.free == 2


def test_a_prefix_is_its_tokens_and_all_before_them():
    """Two rows whose second pages hold the same tokens after different first pages."""
    allocator, one = Allocator(4, P), list(range(32))
    other = [99, *one[1:]]
    allocator.allocate({0: 32, 1: 32})
    allocator.publish(0, one)
    allocator.publish(1, other)
    for row, ids, source in ((2, one, 0), (3, other, 1)):
        assert allocator.reuse(row, [*ids, 5]) == 32
        assert allocator.rows[row] == allocator.rows[source]


def test_out_of_pages_is_said_before_anything_is_written():
    allocator = Allocator(4, P)
    allocator.allocate({0: 33})
    with pytest.raises(OutOfPages, match="2 pages of 16 tokens are needed and 1 of cache.pages = 4 are free"):
        allocator.allocate({1: 1, 2: 16})
    assert allocator.rows == {0: (1, 2, 3)}
    for wrong in (
        lambda: allocator.fork(9, 1, 1),
        lambda: allocator.fork(0, 0, 1),
        lambda: allocator.fork(0, 1, 49),
        lambda: allocator.release(1),
        lambda: allocator.reuse(0, [1]),
        lambda: allocator.table(1, 2),
    ):
        with pytest.raises(UserError):
            wrong()
    assert allocator.rows == {0: (1, 2, 3)}
    mixed = cache.create(CFG, CacheConfig(("paged", "full", "full"), page_size=P), 2, 32)
    with pytest.raises(UserError, match="cache.kinds"):
        cache.apply_pages(mixed, np.ones((2, 2), np.int32), [0, 0], [(1, 2)])


# --- generation ------------------------------------------------------------------------------------------------


def generate(store, prompts, **changes):
    return decode.generate(_params(), CFG, prompts, DecodeConfig(max_new_tokens=9, prefill_chunk=8, **changes), store)


def test_generate_pages_what_each_prompt_needs(monkeypatch):
    """Ragged prompts: the text of a full cache, from a pool that has exactly their pages; one page fewer is an error
    before a program is even compiled."""
    prompts = [tokens_of(CFG, rows=1, length=n, seed=n)[0].tolist() for n in (3, 25, 11)]
    need = sum(-(-(len(p) + 8) // P) for p in prompts)
    want = generate(CacheConfig(), prompts)
    for pages in (0, need):
        got = generate(CacheConfig(("paged",), page_size=P, pages=pages), prompts)
        assert got.tokens == want.tokens
    assert got.cache_bytes == (need + 1) * P * 2 * (2 * 10 + 6 * 14) * 4  # page 0 included, two owners
    streamed = []
    decode.generate(
        _params(),
        CFG,
        prompts,
        DecodeConfig(max_new_tokens=9, prefill_chunk=8),
        CacheConfig(("paged",), page_size=P, pages=need),
        on_token=lambda *token: streamed.append(token),
    )
    assert [[t for r, t in streamed if r == row] for row in range(3)] == want.tokens
    monkeypatch.setattr(decode, "_compiled", lambda *_: pytest.fail("compiled"))
    with pytest.raises(OutOfPages, match="cache.pages"):
        generate(CacheConfig(("paged",), page_size=P, pages=need - 1), prompts)


@pytest.mark.parametrize("name", STORES)
def test_pools_are_updated_in_place(name):
    """A step of decoding aliases every byte of pools, lengths and tables to its output."""
    caches = cache.specs(CFG, STORES[name], 3, 40)
    params = jax.eval_shape(_params)
    ints = jax.ShapeDtypeStruct((3,), jnp.int32)
    memory = decode.decode_step_jit.lower(params, CFG, ints, ints, caches).compile().memory_analysis()
    rest = sum(4 * (c.length.size + c.address.table.size) for c in owners(caches))
    if STORES[name].dtype != "int4" or jax.__version_info__ >= (0, 11):  # older: a byte a code on CPU
        assert memory.alias_size_in_bytes == cache.nbytes(caches) + rest


def test_reading_gathers_pages_in_the_tables_order(rng):
    leaf = encode.spec(CacheConfig(dtype="int8", layout="lanes"), LeafSpec((2, 10), role="key"), 5, P, 2)
    pool = jax.tree.map(lambda s: jnp.asarray(rng.integers(0, 99, s.shape)).astype(s.dtype), leaf)
    table = jnp.asarray([[3, 1, 0], [4, 0, 2]], jnp.int32)
    got = address.gathered(pool, table)
    for b in range(2):
        for slot in range(3 * P):
            page = int(table[b, slot // P])
            np.testing.assert_array_equal(got.values[b, :, :, slot], pool.values[page, :, :, slot % P])
            np.testing.assert_array_equal(got.scale[b, :, slot], pool.scale[page, :, slot % P])
