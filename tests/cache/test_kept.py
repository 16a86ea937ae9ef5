"""Kept tokens: the shared property through the `kept` address, dense and in pages; what a policy leaves against a
float64 oracle that sees exactly the kept tokens; budgets that differ by head; decode kernels; bytes before
and after."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvattn import cache, config, model
from kvattn.attention import target
from kvattn.cache import Groups, Policy
from kvattn.cache.keep import KeepAll, KeepLast
from kvattn.cache.keep.select import pick
from kvattn.config import CacheConfig
from kvattn.errors import UserError
from tests.helpers import oracles, tiny
from tests.helpers.models import lively, tokens_of
from tests.helpers.splits import chunked, every_split, forward, repeated, whole
from tests.helpers.tolerances import (
    BF16_CACHE,
    CODES_STEP,
    EXACT,
    F32_DECODE,
    F32_MODEL,
    F32_OP,
    INT8_CACHE,
    apart,
    close,
)

LENGTH = 12
MODELS = {name: tiny.CASES[name].replace(n_layers=2) for name in ("gqa", "mqa", "tied_kv", "window_sinks")}
MODELS |= {name: tiny.CASES[name].replace(n_layers=2, kv_source=(0, 0)) for name in ("cla2", "mqa_cla2")}
FORMS = {
    "kept": CacheConfig(("kept",)),
    "kept_pages": CacheConfig(("kept",), kept_pages=True, page_size=16),
    "settled": CacheConfig(keep=KeepAll()),
    "settled_pages": CacheConfig(("kept",), kept_pages=True, page_size=16, keep=KeepAll()),
}
DTYPES = {"float32": F32_DECODE, "bfloat16": BF16_CACHE, "int8": INT8_CACHE}


@dataclasses.dataclass(frozen=True)
class PerHead(Policy, tag="test_per_head"):
    """The last `tokens[k]` tokens of head k."""

    tokens: tuple[int, ...] = (2, 2, 5)

    def budget(self, length, site):
        return self.tokens

    def score(self, observed):
        return jnp.broadcast_to(observed.positions.astype(jnp.float32), observed.keys.shape[:3])


@dataclasses.dataclass(frozen=True)
class Asked(Policy, tag="test_asked"):
    """The `tokens` keys of each head with the largest products with the queries of its group, summed over readers."""

    tokens: int = 3
    queries: int = 2

    @property
    def wants_queries(self):
        return self.queries

    def budget(self, length, site):
        return self.tokens

    def score(self, observed):
        real = (observed.query_positions >= 0)[..., None, None]
        heads, score = observed.keys.shape[1], 0.0
        for q in observed.queries:
            grouped = jnp.where(real, q, 0.0).reshape(*q.shape[:2], heads, -1, q.shape[3]).sum((1, 3))
            score += jnp.einsum("bkh,bksh->bks", grouped, observed.keys)
        return score


@functools.cache
def _case(name, length=LENGTH):
    cfg = MODELS[name]
    params, row = lively(cfg), tokens_of(cfg, rows=1, length=length)
    return cfg, params, repeated(row), np.repeat(whole(params, cfg, row), length, 0)


@functools.cache
def _full(name, dtype):
    cfg, params, tokens, _ = _case(name)
    return every_split(params, cfg, CacheConfig(dtype=dtype), tokens)[0]


@pytest.mark.parametrize(
    "name,form,dtype",
    [(n, f, d) for n in MODELS for f in FORMS for d in DTYPES if d == "float32" or n in ("gqa", "mqa_cla2")],
)
def test_keeping_everything_equals_a_full_cache_and_the_forward_pass(name, form, dtype):
    cfg, params, tokens, want = _case(name)
    store = dataclasses.replace(FORMS[form], dtype=dtype)
    got, caches = every_split(params, cfg, store, tokens)
    if dtype == "int8":
        assert apart(got, _full(name, dtype)) < CODES_STEP.rtol
        assert CODES_STEP.rtol < apart(got, want) < INT8_CACHE.rtol
    elif dtype == "bfloat16":
        close(got, _full(name, dtype), BF16_CACHE)
        assert 0 < apart(got, want) < BF16_CACHE.rtol
    else:
        close(got, want, F32_DECODE)
    for owner in cfg.owners:
        held = np.asarray(caches[owner].address.held)
        assert (np.asarray(caches[owner].address.count) == LENGTH).all() and (held[..., LENGTH:] == -1).all()
        assert (held[..., :LENGTH] == np.arange(LENGTH)).all()


@pytest.mark.parametrize(
    "name,form,dtype",
    [("gqa", "kept", "float32"), ("mqa_cla2", "kept_pages", "float32"), ("mqa", "kept_pages", "int8")],
)
@pytest.mark.parametrize("chunk,pad", [(1, 3), (4, 3), (5, 0)])
def test_chunks_and_left_padding(name, form, dtype, chunk, pad):
    cfg, params, tokens, want = _case(name)
    got = chunked(params, cfg, dataclasses.replace(FORMS[form], dtype=dtype), tokens[:2], chunk, pad)
    if dtype == "int8":
        same = chunked(params, cfg, CacheConfig(dtype=dtype), tokens[:2], chunk, pad)
        assert apart(got, same) < CODES_STEP.rtol
    else:
        close(got, want[:2], F32_DECODE)


def _oracle(cfg, params, row, split, budgets):
    """float64 logits [T,W]: queries behind the split see of the prompt the last budgets[k] tokens alone."""

    def seen_by(layer, k_head, t, s):
        return s <= t and (t < split or s >= split or s >= split - budgets[k_head])

    return oracles.logits(params, cfg, row, seen_by=seen_by)


@pytest.mark.parametrize(
    "name,policy,pages",
    [
        ("gqa", KeepLast(4), False),
        ("gqa", KeepLast(4), True),
        ("mqa_cla2", KeepLast(3), False),
        ("gqa", PerHead((2, 2, 5)), False),
        ("gqa", PerHead((5, 2, 3)), False),
        ("gqa", PerHead((2, 4, 1)), True),
    ],
)
def test_decoding_sees_exactly_the_kept_tokens(name, policy, pages):
    """The strongest test of eviction: the float64 forward with a mask that hides what was dropped, a row a split."""
    cfg, params, tokens, _ = _case(name)
    budgets = policy.tokens if isinstance(policy.tokens, tuple) else (policy.tokens,) * cfg.attention(0).n_k_heads
    store = FORMS["kept_pages"] if pages else CacheConfig()
    got, caches = every_split(params, cfg, dataclasses.replace(store, keep=policy), tokens)
    for row in range(LENGTH):
        close(got[row], _oracle(cfg, params, tokens[row], row + 1, budgets), F32_MODEL, f"split {row + 1}")
    grouped = len(set(budgets)) > 1 and not pages
    assert isinstance(caches[0], Groups) == grouped
    if grouped:
        assert caches[0].heads == {(2, 2, 5): (2, 1), (5, 2, 3): (1, 1, 1)}[budgets]


def test_the_sum_of_what_is_seen_does_not_depend_on_what_was_dropped():
    """Garbage in the dropped slots of the prompt changes nothing that is decoded."""
    cfg, params, tokens, _ = _case("gqa")
    store = CacheConfig(keep=KeepLast(3))
    caches = model.create_caches(cfg, store, 2, LENGTH)
    _, caches = forward(params, cfg, model.Inputs(jnp.asarray(tokens[:2, :7]), empty=True), caches=caches)
    spoilt = tuple(c.replace(leaves=jax.tree.map(lambda x: x.at[:, :, :4].set(1e9), c.leaves)) for c in caches)
    step = model.Inputs(jnp.asarray(tokens[:2, 7:8]), jnp.full((2, 1), 7, jnp.int32))
    a, b = (forward(params, cfg, step, caches=cache.settle(cfg, store, c, room=4))[0].logits for c in (caches, spoilt))
    close(a, b, EXACT)


def test_scores_choose_and_positions_order():
    """By hand: the highest scores of each head, in order of position; a tie goes to the earlier slot; -inf is dropped
    though there is room; slots without a token are never chosen."""
    scores = jnp.array(
        [[[3.0, 9.0, 1.0, 9.0, 5.0], [1.0, 1.0, 1.0, jnp.inf, -jnp.inf]], [[9.0, 1.0, 2.0, 0.0, 7.0]] * 2]
    )
    positions = jnp.array([[[4, 2, 3, 0, 1]], [[0, 1, -1, -1, 2]]], jnp.int32)
    slots, at = pick(scores, positions, 3)
    assert at.tolist() == [[[0, 1, 2], [0, 2, 4]], [[0, 1, 2]] * 2]
    assert slots[0].tolist() == [[3, 4, 1], [3, 1, 0]]
    _, at = pick(scores, positions, 99)
    assert at[0].tolist() == [[0, 1, 2, 3, 4], [0, 2, 3, 4, -1]] and at[1, 0].tolist() == [0, 1, 2, -1, -1]


@pytest.mark.parametrize("name,readers", [("gqa", 1), ("cla2", 2)])
def test_a_shared_cache_is_scored_by_the_queries_of_all_its_readers(name, readers):
    cfg, params, tokens, _ = _case(name)
    store, split = CacheConfig(keep=Asked(tokens=3, queries=2)), np.array([7, 1])
    at = np.where(np.arange(8)[None] < split[:, None], np.arange(8)[None], -1).astype(np.int32)
    inputs = model.Inputs(jnp.asarray(tokens[:2, :8]), jnp.asarray(at), empty=True)
    caches = model.create_caches(cfg, store, 2, LENGTH)
    _, caches, seen = model.hidden(params, cfg, inputs, caches=caches, collect=("queries",))
    queries = cache.Queries(seen["queries"], inputs.positions)
    settled = cache.settle(cfg, store, caches, queries, room=2)
    for owner in cfg.owners:
        assert len(cfg.readers(owner)) == readers
        keys = np.asarray(caches[owner].leaves["k"].values, np.float64)
        for row in range(2):
            latest = range(max(0, split[row] - 2), split[row])
            q = sum(np.asarray(seen["queries"][r], np.float64)[row, latest].sum(0) for r in cfg.readers(owner))
            for head in range(keys.shape[1]):
                asked = q[2 * head : 2 * head + 2].sum(0)  # N = 6 over K = 3
                scores = keys[row, head, : split[row]] @ asked
                want = sorted(np.argsort(-scores)[:3])
                got = np.asarray(settled[owner].address.held)[row, head]
                assert got[got >= 0].tolist() == want
    with pytest.raises(UserError, match="'test_asked', which scores tokens by the prompt's last 2 queries"):
        cache.settle(cfg, store, caches, room=2)


@pytest.mark.parametrize(
    "dtype,layout,policy,slots",
    [
        ("float32", "rows", KeepLast(4), (7, 7, 7)),
        ("int8", "lanes", KeepLast(4), (7, 7, 7)),
        ("int4", "v_lanes", PerHead((2, 2, 5)), (5, 5, 8)),
    ],
)
def test_bytes_shrink_to_what_budget_and_room_say(dtype, layout, policy, slots):
    """Exact bytes: 2 rows x 2 layers x 3 heads x slots x ((10 + 14) numbers and two scales)."""
    cfg, params, tokens, _ = _case("gqa")
    store = CacheConfig(dtype=dtype, layout=layout, keep=policy)
    caches = model.create_caches(cfg, store, 2, 40)
    _, caches = forward(params, cfg, model.Inputs(jnp.asarray(tokens[:2, :9]), empty=True), caches=caches)
    settled = cache.settle(cfg, store, caches, room=3)
    token = {"float32": 24 * 32, "int8": 24 * 8 + 64, "int4": 24 * 4 + 64}[dtype] // 8
    assert cache.nbytes(caches) == 2 * 2 * 3 * 40 * token
    assert cache.nbytes(settled) == 2 * 2 * sum(slots) * token
    said = cache.settled_specs(cfg, store, cache.specs(cfg, store, 2, 40), room=3)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), settled) == jax.tree.map(lambda x: (x.shape, x.dtype), said)


def test_pages_are_as_many_as_each_head_needs():
    """Budgets 2, 30, 14 with room for 3 tokens: 1, 3 and 2 pages of 16 a row, and page 0."""
    cfg, params, tokens, _ = _case("gqa", 33)
    store = dataclasses.replace(FORMS["kept_pages"], keep=PerHead((2, 30, 14)))
    caches = model.create_caches(cfg, store, 2, 40)
    _, caches = forward(params, cfg, model.Inputs(jnp.asarray(tokens[:2]), empty=True), caches=caches)
    settled = cache.settle(cfg, store, caches, room=3)
    assert cache.nbytes(caches) == 2 * (1 + 2 * 3 * 3) * 16 * 24 * 4
    assert cache.nbytes(settled) == 2 * (1 + 2 * 6) * 16 * 24 * 4
    assert np.asarray(settled[0].address.table)[:, :, :].tolist() == [
        [[1, 0, 0], [2, 3, 4], [5, 6, 0]],
        [[7, 0, 0], [8, 9, 10], [11, 12, 0]],
    ]
    assert np.asarray(settled[0].address.count).tolist() == [[2, 30, 14]] * 2


@pytest.mark.parametrize("form", ["kept", "kept_pages", "full", "paged"])
def test_truncate_equals_never_having_written(form):
    """Four tokens too many, then two others: the logits of a cache that saw only these."""
    cfg, params, tokens, _ = _case("gqa")
    store = {"full": CacheConfig(), "paged": CacheConfig(("paged",), page_size=16)}.get(form) or FORMS[form]

    def fed(caches, part, start, empty=False):
        at = jnp.arange(start, start + part.shape[1], dtype=jnp.int32)[None, :] + jnp.array([[0], [-2]], jnp.int32)
        at = jnp.where(at < 0, -1, at)
        out, caches = forward(params, cfg, model.Inputs(jnp.asarray(part), at, empty=empty), caches=caches)
        return out.logits, caches

    _, caches = fed(model.create_caches(cfg, store, 2, LENGTH), tokens[:2, :5], 0, True)
    _, longer = fed(caches, tokens[:2, 7:11], 5)
    back = cache.truncate(longer, jnp.array([5, 3], jnp.int32))
    (want, _), (got, after) = fed(caches, tokens[:2, 5:7], 5), fed(back, tokens[:2, 5:7], 5)
    close(got, want, F32_OP)
    assert np.asarray(after[0].length).tolist() == [7, 5]
    if form.startswith("kept"):
        assert np.asarray(after[0].address.count).tolist() == [[7] * 3, [5] * 3]


WIDE = dict(n_layers=2, n_heads=4, n_k_heads=2, n_v_heads=2, head_dim=128, v_head_dim=128)
KERNEL_STORES = {
    "pages": CacheConfig(("kept",), kept_pages=True, page_size=128),
    "dense": CacheConfig(("kept",), multiple=128),
    "pages_int8": CacheConfig(("kept",), "int8", kept_pages=True, page_size=128),
    "settled_pages": CacheConfig(("kept",), kept_pages=True, page_size=128, keep=PerHead((2, 4))),
    "settled_groups": CacheConfig(multiple=128, keep=PerHead((2, 4))),
    "settled_shared": CacheConfig(multiple=128, keep=KeepLast(3)),
}


@pytest.mark.parametrize("name", KERNEL_STORES)
def test_the_decode_kernel_reads_kept_tokens_by_a_table_a_row_and_head(name):
    store = KERNEL_STORES[name]
    cfg = tiny.config(**WIDE, kv_source=(0, 0) if name == "settled_shared" else ())
    params, tokens = lively(cfg), tokens_of(cfg, rows=2, length=10)

    def decoded(cfg):
        caches = model.create_caches(cfg, store, 2, 120)
        at = jnp.arange(6, dtype=jnp.int32)[None, :] - jnp.array([[0], [2]], jnp.int32)
        prompt = model.Inputs(jnp.asarray(tokens[:, :6]), jnp.where(at < 0, -1, at), empty=True)
        _, caches = model.forward(params, cfg, prompt, caches=caches)
        caches, out = cache.settle(cfg, store, caches, room=20), []
        for start, end in ((6, 7), (7, 10)):
            at = jnp.arange(start, end, dtype=jnp.int32)[None, :] - jnp.array([[0], [2]], jnp.int32)
            step = model.Inputs(jnp.asarray(tokens[:, start:end]), at)
            got, caches = model.forward(params, cfg, step, caches=caches)
            out.append(got.logits)
        return np.concatenate(out, 1)

    want = decoded(cfg)
    with target.of("tpu", interpret=True):
        got = decoded(dataclasses.replace(cfg, decode_kernel="mosaic_tpu"))
    close(got, want, F32_DECODE)
    assert store.keep is None or apart(want, whole(params, cfg, tokens)[:, 6:]) > CODES_STEP.rtol


@pytest.mark.parametrize(
    "change,store,words",
    [
        ({}, dict(keep=KeepLast(0)), "cache.keep.tokens is 0; keep at least 1"),
        ({}, dict(keep=KeepLast(2), kinds=("paged",)), "'paged' in cache.kinds cannot give back"),
        (dict(masks=(tiny.WINDOW,)), dict(keep=KeepLast(2), kinds=("ring",)), "'ring' in cache.kinds cannot give back"),
        (dict(n_k_heads=2, n_v_heads=6), dict(keep=KeepLast(2)), "leaves of layer 0 have unequal heads"),
        (dict(n_k_heads=2, n_v_heads=6), dict(kinds=("kept",)), "leaves of layer 0 have unequal heads"),
        (dict(decode_kernel="mosaic_tpu", **WIDE), dict(keep=KeepLast(2), capacity=128), "cannot read this cache"),
        (
            dict(decode_kernel="mosaic_tpu", masks=(tiny.WINDOW,), **WIDE),
            dict(keep=KeepLast(2), multiple=128),
            "kept tokens have positions of their own",
        ),
    ],
)
def test_what_cannot_be_kept_is_one_sentence(change, store, words):
    with pytest.raises(UserError, match=words):
        model.create_caches(tiny.config(**change), CacheConfig(**store), 2, 128)


def test_budgets_are_integers_that_fit_the_heads():
    cfg, params, tokens, _ = _case("gqa")
    caches = model.create_caches(cfg, CacheConfig(), 2, LENGTH)
    for tokens_kept, words in (((2, 2), "gives 2 budgets and the cache has 3 heads"), ((2, 0, 1), "budget of 0;")):
        store = CacheConfig(keep=PerHead(tokens_kept))
        with pytest.raises(UserError, match=words):
            cache.settle(cfg, store, caches, room=2)
    groups = cache.settle(cfg, CacheConfig(keep=PerHead((1, 2, 2))), caches, room=2)
    with pytest.raises(UserError, match="settled already"):
        cache.settle(cfg, CacheConfig(keep=KeepLast(1)), groups, room=2)


def test_policies_pass_the_door():
    store = CacheConfig(keep=KeepLast(7))
    assert config.from_config_dict(config.to_config_dict(store), CacheConfig) == store
    assert config.from_config_dict(config.plain(store), CacheConfig) == store
    with pytest.raises(UserError, match=r"config.keep.name is 'lasst' \(nearest valid: last\)"):
        config.from_config_dict(config.plain(store) | {"keep": {"name": "lasst"}}, CacheConfig)
