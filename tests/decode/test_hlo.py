"""The compiled decode programs hold the caches once: no copy of a cache, every cache byte aliased in place.

XLA inserts copies silently when an update and a read of one buffer cannot share it. A cache-sized copy per
layer and token is as dear as reading the cache again, so its absence is asserted on the compiled text, for one
step, for the loop over steps and for the whole prompt-to-text program, in every cache kind, dtype and kind of sharing.
"""

import collections
import re

import jax
import jax.numpy as jnp
import pytest

from kvattn import cache, model
from kvattn.config import CacheConfig, DecodeConfig
from kvattn.decode import generation as decode
from kvattn.decode import sampling
from tests.helpers import tiny

CAPACITY = 23
_SHORT = {"float32": "f32", "bfloat16": "bf16", "int32": "s32"}
_OP = re.compile(r"^\s*(?:ROOT )?%?\S+ = (\w+)\[([\d,]*)\]\S* ([\w-]+)\(", re.MULTILINE)

CASES = [
    ("gqa", CacheConfig()),
    ("mqa", CacheConfig(dtype="bfloat16")),
    ("uneven_kv", CacheConfig()),
    ("tied_kv", CacheConfig()),
    ("mqa_cla2", CacheConfig()),
    ("window_sinks", CacheConfig(kinds=("ring",))),
    ("pattern", CacheConfig(kinds=("by_mask",), dtype="bfloat16")),
    ("mqa_cla2_pattern", CacheConfig(kinds=("by_mask",))),
]
IDS = [f"{name}-{store.kinds[0]}-{store.dtype}" for name, store in CASES]


def lowered(program, name, store, batch, chunk=4):
    """`program` lowered for abstract arguments, and its abstract caches."""
    cfg = tiny.CASES[name]
    caches = cache.specs(cfg, store, batch, CAPACITY)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), cfg))
    ints = jax.ShapeDtypeStruct((batch,), jnp.int32)
    if program is decode.decode_step_jit:
        return program.lower(params, cfg, ints, ints, caches), caches
    if program is decode.advance_jit:
        state = loop_state(caches, batch)
        return program.lower(params, cfg, state, *_draws(batch), ints), caches
    prompt = jax.ShapeDtypeStruct((batch, 9), jnp.int32)
    args = (prompt, prompt, caches, *_draws(batch), jnp.int32(7))
    return program.lower(params, cfg, *args, chunk=chunk, width=16), caches


def _draws(batch):
    """A sampler that filters, and two end tokens."""
    return sampling.create(DecodeConfig(temperature=1.0, top_p=0.9), batch), jnp.asarray([1, 2], jnp.int32)


def loop_state(caches, batch):
    """An abstract state of `batch` rows with room for 16 tokens each."""
    ints = jax.ShapeDtypeStruct((batch,), jnp.int32)
    done, out = jax.ShapeDtypeStruct((batch,), bool), jax.ShapeDtypeStruct((batch, 16), jnp.int32)
    return decode.State(token=ints, position=ints, step=ints, done=done, out=out, caches=caches)


def leaf_sizes(caches):
    """(short dtype, element count) of every cache leaf."""
    return {(_SHORT[leaf.dtype.name], leaf.size) for leaf in held(caches)}


def held(caches):
    """The arrays that hold tokens."""
    return [leaf for leaf in jax.tree.leaves(caches) if leaf.ndim == 4]


def copies_of(text, sizes):
    """Instructions that make another buffer of a cache's size by copying, transposing or converting it."""
    found = collections.Counter()
    for dtype, dims, opcode in _OP.findall(text):
        count = 1
        for dim in filter(None, dims.split(",")):
            count *= int(dim)
        if opcode in ("copy", "copy-start", "transpose") and (dtype, count) in sizes:
            found[f"{dtype}[{dims}] {opcode}"] += 1
    return found


def check(program, name, store, batch, chunk=4):
    low, caches = lowered(program, name, store, batch, chunk)
    compiled = low.compile()
    counters = sum(c.length.size * 4 for c in caches if c is not None)
    if program is decode.advance_jit:  # token, position, step, done, out
        counters += batch * (3 * 4 + 1 + 16 * 4)
    aliased = compiled.memory_analysis().alias_size_in_bytes
    assert aliased == cache.nbytes(caches) + counters, f"{aliased} bytes aliased"
    return copies_of(compiled.as_text(), leaf_sizes(caches))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("name", "store"), CASES, ids=IDS)
def test_a_step_copies_no_cache(name, store, batch):
    assert not check(decode.decode_step_jit, name, store, batch)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("name", "store"), CASES, ids=IDS)
def test_a_loop_with_rows_apart_copies_no_cache(name, store, batch):
    """`until` [B], a step count per row; the rest of the state is updated in place too."""
    assert not check(decode.advance_jit, name, store, batch)


@pytest.mark.parametrize(("name", "store"), CASES, ids=IDS)
def test_prompt_to_text_copies_no_cache(name, store):
    """Full caches with a prompt in chunks, rings with one in a single chunk."""
    chunk = 4 if store.kinds == ("full",) else 9
    assert not check(decode.generate_jit, name, store, 1, chunk)


def test_a_batch_in_chunks_copies_no_cache():
    assert not check(decode.generate_jit, "gqa", CacheConfig(), 3)


def test_chunked_prefill_of_a_ring_copies_the_ring_alone():
    """The known exception. Early queries of a later chunk see ring slots that the same chunk overwrites, so the
    old ring is set aside, once per leaf and chunk; the token loop and full caches copy nothing."""
    store = CacheConfig(kinds=("by_mask",))
    found = check(decode.generate_jit, "mqa_cla2_pattern", store, 1)
    cfg = tiny.CASES["mqa_cla2_pattern"]
    caches = cache.specs(cfg, store, 1, CAPACITY)
    rings = {f"f32[{','.join(map(str, leaf.shape))}] copy" for leaf in held(caches[0])}
    assert [cache.layout(cfg, store, owner, CAPACITY)[1] > 0 for owner in (0, 2)] == [True, False]
    assert set(found) <= rings and all(count <= 2 for count in found.values())


def test_the_detector_sees_a_copy():
    """Without donation the same program must copy its caches, and the same search must find that."""
    name, store = CASES[0]
    program = jax.jit(decode.decode_step, static_argnames="cfg")
    cfg, caches = tiny.CASES[name], cache.specs(tiny.CASES[name], store, 3, CAPACITY)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), cfg))
    ints = jax.ShapeDtypeStruct((3,), jnp.int32)
    compiled = program.lower(params, cfg, ints, ints, caches).compile()
    assert sum(copies_of(compiled.as_text(), leaf_sizes(caches)).values()) >= 2 * cfg.n_layers
    assert compiled.memory_analysis().alias_size_in_bytes == 0
