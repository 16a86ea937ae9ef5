"""Attention without order: a mask that sees everything, and layers that read what an encoder left, written once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvattn import model
from kvattn.attention import dispatch
from kvattn.config import CacheConfig, Layer, MaskConfig, RopeConfig
from kvattn.errors import UserError
from tests.helpers import oracles, tiny
from tests.helpers.models import lively, tokens_of
from tests.helpers.splits import every_split, forward, repeated, whole
from tests.helpers.tolerances import BF16_CACHE, EXACT, F32_DECODE, F32_MODEL, apart, close

LENGTH, MEMORY = 9, 7
FULL, ROPE = MaskConfig(kind="full"), RopeConfig(theta=100.0)
HEADS = tiny.BASE.attention(0)
ENCODER = tiny.config(n_layers=2, masks=(FULL,), tied_embeddings=False)
DECODER = tiny.config(layers=(Layer(HEADS, rope=ROPE), Layer(HEADS, FULL, ROPE, reads="memory")))


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("blocks", [False, True])
def test_every_token_sees_every_other_and_no_padding(empty, blocks, monkeypatch):
    """Rows of 9, 6 (right padded) and 4 (left padded) tokens, each as a float64 loop over its tokens alone; the same
    where scores are made in blocks of queries."""
    if blocks:
        monkeypatch.setattr(dispatch, "SCORE_BYTES", 1)
    params, tokens = lively(ENCODER), tokens_of(ENCODER, rows=3, length=10)
    at = np.full((3, 10), -1, np.int32)
    spans = [(0, 9), (0, 6), (6, 10)]
    for row, (start, end) in enumerate(spans):
        at[row, start:end] = np.arange(end - start)
    inputs = model.Inputs(jnp.asarray(tokens), jnp.asarray(at), empty=empty)
    got = jax.jit(lambda p: model.forward(p, ENCODER, inputs)[0].logits)(params)
    for row, (start, end) in enumerate(spans):
        close(got[row, start:end], oracles.logits(params, ENCODER, tokens[row, start:end]), F32_MODEL, f"row {row}")


def test_gradients_reach_later_tokens_and_no_padding():
    params, tokens = lively(ENCODER), np.arange(10, dtype=np.int32)[None]
    at = jnp.asarray(np.r_[np.arange(8), -1, -1][None], jnp.int32)

    def one(params):
        return model.forward(params, ENCODER, model.Inputs(jnp.asarray(tokens), at))[0].logits[0, 2, 5]

    grads = jax.jit(jax.grad(one))(params)
    table = np.abs(np.asarray(grads["embed"]["table"])).max(1)
    assert (table[:8] > 0).all() and (table[8:] == 0).all()
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))


def test_a_cache_needs_an_order():
    with pytest.raises(UserError, match="mask of layer 0 is 'full', which sees tokens that are yet to come"):
        model.create_caches(ENCODER, CacheConfig(), 2, LENGTH)
    with pytest.raises(UserError, match="a window needs kind causal"):
        tiny.config(masks=(MaskConfig(window=3, kind="full"),)).check()


@functools.cache
def _case():
    """Row b has 7 - b % 4 entries of memory, odd rows left padded."""
    DECODER.check()
    params, row = lively(DECODER), tokens_of(DECODER, rows=1, length=LENGTH)
    memory = np.random.default_rng(8).normal(size=(LENGTH, MEMORY, DECODER.d_model)).astype(np.float32)
    at = np.full((LENGTH, MEMORY), -1, np.int32)
    for b in range(LENGTH):
        count = MEMORY - b % 4
        span = slice(MEMORY - count, MEMORY) if b % 2 else slice(0, count)
        at[b, span] = np.arange(count)
    given = dict(memory=jnp.asarray(memory), memory_positions=jnp.asarray(at))
    tokens = repeated(row)
    return params, tokens, given, whole(params, DECODER, tokens, **given)


def test_cross_attention_equals_a_float64_loop():
    params, tokens, given, got = _case()
    for row in (0, 3, 5):
        real = np.asarray(given["memory"][row], np.float64)[np.asarray(given["memory_positions"][row]) >= 0]
        close(got[row], oracles.logits(params, DECODER, tokens[row], memory=real), F32_MODEL, f"row {row}")
    assert apart(got[0], got[1]) > 1e-2  # the memory matters


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["full", "paged"])
def test_prefill_then_decode_equals_forward_at_every_split(kind, dtype):
    """The memory is given once, in the first pass."""
    params, tokens, given, want = _case()
    store = CacheConfig((kind,), dtype, memory=MEMORY, page_size=16)
    got, caches = every_split(params, DECODER, store, tokens, **given)
    if dtype == "bfloat16":
        assert 0 < apart(got, want) < BF16_CACHE.rtol
    else:
        close(got, want, F32_DECODE)
    assert [c.slots for c in caches] == [16 if kind == "paged" else LENGTH + 3, MEMORY] * 2
    assert np.asarray(caches[1].length).tolist() == [MEMORY - b % 4 for b in range(LENGTH)]


def test_the_memory_is_written_once():
    """Later passes leave every bit of its store alone, and chunks of a prompt read it."""
    params, tokens, given, want = _case()
    store, got = CacheConfig(memory=MEMORY), []
    caches = model.create_caches(DECODER, store, LENGTH, LENGTH)
    for start, end in ((0, 4), (4, 8), (8, 9)):
        at = jnp.broadcast_to(jnp.arange(start, end, dtype=jnp.int32)[None, :], (LENGTH, end - start))
        inputs = model.Inputs(jnp.asarray(tokens[:, start:end]), at, empty=start == 0, **(given if start == 0 else {}))
        before = caches
        out, caches = forward(params, DECODER, inputs, caches=caches)
        got.append(out.logits)
        if start:
            for layer in (1, 3):
                jax.tree.map(lambda a, b: close(a, b, EXACT), caches[layer], before[layer])
            assert float(jnp.abs(caches[0].leaves["k"].values - before[0].leaves["k"].values).max()) > 0
    close(np.concatenate(got, 1), want, F32_DECODE)


@pytest.mark.parametrize(
    "cfg,store,inputs,words",
    [
        (DECODER, None, {}, "give inputs.memory"),
        (ENCODER, None, dict(memory=1), "no layer of the model reads one"),
        (DECODER, CacheConfig(memory=MEMORY), dict(empty=True), "give inputs.memory"),
        (DECODER, CacheConfig(memory=MEMORY), dict(memory=1), "a memory is written once"),
        (DECODER, CacheConfig(memory=MEMORY), dict(memory=1, empty=True, commit=False), "a memory is written once"),
        (DECODER, CacheConfig(), {}, "cache.memory is 0 but layer 1 reads a memory"),
    ],
)
def test_what_a_memory_needs_is_one_sentence(cfg, store, inputs, words):
    params, tokens = model.init(jax.random.key(0), cfg), jnp.zeros((2, 3), jnp.int32)
    if "memory" in inputs:
        inputs = inputs | {"memory": jnp.ones((2, MEMORY, cfg.d_model))}
    with pytest.raises(UserError, match=words):
        caches = None if store is None else model.create_caches(cfg, store, 2, 9)
        model.forward(params, cfg, model.Inputs(tokens, **inputs), caches=caches)


def test_a_memory_has_no_order_beside_the_text():
    with pytest.raises(UserError, match="a memory has no order beside the text"):
        tiny.config(layers=(Layer(HEADS, rope=ROPE, reads="memory"),)).check()
    with pytest.raises(UserError, match="one of them reads a memory"):
        tiny.config(n_layers=2, layers=DECODER.layers, kv_source=(0, 0)).check()
