"""Head groups: heads of one layer with masks of their own, a cache a group, against a float64 loop of a mask a head."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvattn import cache, model
from kvattn.config import CacheConfig, HeadGroup, Layer, MaskConfig, RopeConfig
from kvattn.errors import UserError
from tests.helpers import oracles, tiny
from tests.helpers.models import lively, tokens_of
from tests.helpers.splits import chunked, every_split, forward, repeated, whole
from tests.helpers.tolerances import CODES_STEP, F32_DECODE, F32_GRAD, F32_MODEL, INT8_CACHE, apart, close

LENGTH = 13
NEAR, FAR = tiny.SINKS, MaskConfig()
GROUPS = (HeadGroup(1, NEAR), HeadGroup(2, FAR))
ROPE = RopeConfig(theta=100.0)


def grouped(*groups):
    layer = Layer(tiny.BASE.attention(0), rope=ROPE, groups=groups)
    return tiny.config(n_layers=2, layers=(layer,))


@functools.cache
def _case():
    cfg = grouped(*GROUPS)
    cfg.check()
    params, row = lively(cfg), tokens_of(cfg, rows=1, length=LENGTH)
    return cfg, params, repeated(row), np.repeat(whole(params, cfg, row), LENGTH, 0)


def test_each_head_sees_by_its_groups_mask():
    cfg, params, tokens, got = _case()
    want = oracles.logits(
        params, cfg, tokens[0], seen_by=lambda layer, k_head, t, s: oracles.visible((NEAR, FAR, FAR)[k_head], t, s)
    )
    close(got[0], want, F32_MODEL)
    for other in (NEAR, FAR):  # neither mask alone is the answer
        assert apart(whole(params, cfg.replace(masks=(other,)), tokens[:1]), got[:1]) > CODES_STEP.rtol


@pytest.mark.parametrize("kind", ["full", "by_mask"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_prefill_then_decode_equals_forward_at_every_split(kind, dtype):
    cfg, params, tokens, want = _case()
    got, caches = every_split(params, cfg, CacheConfig((kind,), dtype), tokens)
    if dtype == "int8":
        assert CODES_STEP.rtol < apart(got, want) < INT8_CACHE.rtol
    else:
        close(got, want, F32_DECODE)
    near, far = caches[0].groups
    assert caches[0].heads == (1, 2) and far.slots == LENGTH + 3
    assert near.slots == (7 if kind == "by_mask" else LENGTH + 3)


@pytest.mark.parametrize("chunk,pad", [(1, 3), (4, 3), (5, 0)])
def test_chunks_and_left_padding(chunk, pad):
    cfg, params, tokens, want = _case()
    close(chunked(params, cfg, CacheConfig(("by_mask",)), tokens[:2], chunk, pad), want[:2], F32_DECODE)


def test_bytes_are_those_of_each_groups_slots():
    """2 layers x 3 rows: one head of a ring of 2 + 5, two of 40 slots, 10 + 14 numbers of 4 bytes."""
    cfg, full, ring = _case()[0], CacheConfig(), CacheConfig(("by_mask",))
    assert cache.nbytes(model.create_caches(cfg, full, 3, 40)) == 2 * 3 * 3 * 40 * 24 * 4
    assert cache.nbytes(model.create_caches(cfg, ring, 3, 40)) == 2 * 3 * (7 + 2 * 40) * 24 * 4


def test_gradients_flow_through_both_groups_and_their_caches():
    cfg, params, tokens, _ = _case()
    tokens = jnp.asarray(tokens[:2])
    weigh = jax.random.normal(jax.random.key(2), (2, LENGTH, cfg.vocab_size))
    empty = model.create_caches(cfg, CacheConfig(("by_mask",)), 2, LENGTH)

    def straight(params):
        return (model.forward(params, cfg, model.Inputs(tokens))[0].logits * weigh).sum()

    def cached(params):
        first, caches = model.forward(params, cfg, model.Inputs(tokens[:, :9], empty=True), caches=empty)
        at = jnp.broadcast_to(jnp.arange(9, LENGTH, dtype=jnp.int32)[None, :], (2, LENGTH - 9))
        rest, _ = model.forward(params, cfg, model.Inputs(tokens[:, 9:], at), caches=caches)
        return (jnp.concatenate([first.logits, rest.logits], 1) * weigh).sum()

    want, got = (jax.jit(jax.grad(f))(params) for f in (straight, cached))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(got), strict=True):
        size = jnp.abs(a).max()
        assert size > 0, path
        close(b / size, a / size, F32_GRAD, str(path))
    assert (jnp.abs(want["layers"][0]["attn"]["k"]).max((0, 2)) > 0).all()


def test_a_pass_that_commits_nothing_and_its_commit():
    cfg, params, tokens, _ = _case()
    caches = model.create_caches(cfg, CacheConfig(("by_mask",)), 2, LENGTH)
    _, caches = forward(params, cfg, model.Inputs(jnp.asarray(tokens[:2, :8]), empty=True), caches=caches)
    at, part = jnp.broadcast_to(jnp.arange(8, 12, dtype=jnp.int32)[None, :], (2, 4)), jnp.asarray(tokens[:2, 8:12])
    seen, _ = forward(params, cfg, model.Inputs(part, at, commit=False), caches=caches)
    accepted = jnp.array([2, 3], jnp.int32)
    got = model.commit(params, cfg, caches, seen.pending, at, accepted)
    _, want = forward(params, cfg, model.Inputs(part, jnp.where(at - 8 < accepted[:, None], at, -1)), caches=caches)
    jax.tree.map(lambda a, b: close(a, b, F32_DECODE), got, want)


def test_what_groups_cannot_be_is_one_sentence():
    with pytest.raises(UserError, match="groups hold 2 heads, but the layer has 3 key and 3 value heads"):
        grouped(HeadGroup(1, NEAR), HeadGroup(1, FAR)).check()
    for kind in ("paged", "kept"):
        with pytest.raises(UserError, match="layer 0 has head groups, whose caches are full or rings"):
            model.create_caches(grouped(*GROUPS), CacheConfig((kind,)), 2, 20)
    with pytest.raises(UserError, match="a ring but layer 0, which reads it, has no window"):
        model.create_caches(grouped(*GROUPS), CacheConfig(("ring",)), 2, 20)
    with pytest.raises(UserError, match="cache.keep chooses tokens a head, and layer 0 has head groups"):
        model.create_caches(grouped(*GROUPS), CacheConfig(keep=cache.Policy.of("last", tokens=3)), 2, 20)
