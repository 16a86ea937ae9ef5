"""The shared property: prefill then decode equals the full forward, for every variant x store.

One batch holds every split point: row b prefills b + 1 tokens and decodes the rest, so ragged rows and all
split points go through one compiled program. Variants come from tests/tiny.py, stores from STORES; the
product is counted, legal plus illegal.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvattn import cache, model
from kvattn.config import CacheConfig
from kvattn.errors import UserError
from tests import tiny
from tests.test_model import lively, tokens_of
from tests.tolerances import BF16_CACHE, F32_DECODE, close

LENGTH = 12
STORES = {
    f"{kind}-{dtype}": CacheConfig((kind,), dtype) for kind in ("full", "ring", "by_mask")
    for dtype in ("float32", "bfloat16")
}


def legal(cfg, store) -> bool:
    """Written out here, not taken from legality: a ring needs windows everywhere; a scan has no cache."""
    return not cfg.scan_layers and (store.kinds != ("ring",) or all(m.window for m in cfg.masks))


CELLS = [(name, store) for name in sorted(tiny.CASES) for store in STORES]
LEGAL = [(name, store) for name, store in CELLS if legal(tiny.CASES[name], STORES[store])]
ILLEGAL = [cell for cell in CELLS if cell not in LEGAL]


@functools.partial(jax.jit, static_argnums=1)
def _every_split(params, cfg, tokens, caches):
    """Prefill row b up to split b + 1 (right padded), then decode token by token: logits of both [B,T,W]."""
    rows, length = tokens.shape
    split = jnp.arange(rows, dtype=jnp.int32)[:, None] + 1
    at = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None, :], tokens.shape)
    prompt = model.Inputs(tokens, jnp.where(at < split, at, -1), fresh=True)
    first, caches = model.forward(params, cfg, prompt, caches=caches)

    def step(caches, t):
        position = jnp.where(split <= t, t, -1)
        token = jax.lax.dynamic_slice_in_dim(tokens, t, 1, 1)
        out, caches = model.forward(params, cfg, model.Inputs(token, position), caches=caches)
        return caches, out.logits[:, 0]

    caches, rest = jax.lax.scan(step, caches, jnp.arange(length, dtype=jnp.int32))
    return jnp.where((at < split)[..., None], first.logits, rest.swapaxes(0, 1)), caches


@functools.cache
def _case(name):
    cfg = tiny.CASES[name]
    params, row = lively(cfg), tokens_of(cfg, rows=1, length=LENGTH)
    want = jax.jit(model.forward, static_argnums=1)(params, cfg, model.Inputs(jnp.asarray(row)))[0].logits
    return cfg, params, np.repeat(row, LENGTH, 0), np.repeat(np.asarray(want), LENGTH, 0)


@pytest.mark.parametrize("name,store", LEGAL)
def test_prefill_then_decode_equals_forward_at_every_split(name, store):
    cfg, params, tokens, want = _case(name)
    caches = cache.create(cfg, STORES[store], LENGTH, LENGTH + 3)
    got, caches = _every_split(params, cfg, jnp.asarray(tokens), caches)
    if "bfloat16" in store:  # the same rounded K and V at every split: the last row, all prefill, is the reference
        close(got, np.repeat(np.asarray(got)[-1:], LENGTH, 0), BF16_CACHE, f"{name} {store}")
        error = np.sqrt(np.mean((np.asarray(got) - want) ** 2) / np.mean(want**2))
        assert 0 < error < BF16_CACHE.rtol, error  # rounding is real, and small
    else:
        close(got, want, F32_DECODE, f"{name} {store}")
    for owner in cfg.owners:
        assert (np.asarray(caches[owner].length) == LENGTH).all()


@pytest.mark.parametrize("name,store", ILLEGAL)
def test_illegal_cells_raise(name, store):
    with pytest.raises(UserError, match="ring|scan_layers"):
        cache.create(tiny.CASES[name], STORES[store], 2, LENGTH)


def test_cells_are_counted():
    assert len(LEGAL) + len(ILLEGAL) == len(tiny.CASES) * len(STORES)
    windowed = sum(all(m.window for m in c.masks) and not c.scan_layers for c in tiny.CASES.values())
    looped = sum(not c.scan_layers for c in tiny.CASES.values())
    assert windowed >= 3 and len(LEGAL) == 2 * (2 * looped + windowed)


@pytest.mark.parametrize("name,store", [
    ("gqa", "full-float32"), ("window_sinks", "ring-float32"), ("mqa_cla2_pattern", "by_mask-float32"),
    ("tied_kv", "full-float32"), ("uneven_cla2_window", "ring-float32"),
])
@pytest.mark.parametrize("chunk", [1, 4, 5])
@pytest.mark.parametrize("pad", [0, 3])
def test_chunked_and_left_padded_prefill(name, store, chunk, pad):
    """Chunks of any size, with left padding in the first ones, give the full forward's logits."""
    cfg, params, tokens, want = _case(name)
    rows = np.concatenate([np.zeros((2, pad), np.int32), tokens[:2]], 1)
    at = np.concatenate([np.full((2, pad), -1), np.tile(np.arange(LENGTH), (2, 1))], 1).astype(np.int32)
    at[1], rows[1] = np.roll(at[1], -pad), np.roll(rows[1], -pad)  # the second row is right padded
    caches = cache.create(cfg, STORES[store], 2, LENGTH)
    forward, got = jax.jit(model.forward, static_argnums=1), []
    for start in range(0, LENGTH + pad, chunk):
        part = slice(start, start + chunk)
        inputs = model.Inputs(jnp.asarray(rows[:, part]), jnp.asarray(at[:, part]), fresh=start == 0)
        out, caches = forward(params, cfg, inputs, caches=caches)
        got.append(out.logits)
    got = np.concatenate(got, 1)
    close(got[0, pad:], want[0], F32_DECODE, "left padded")
    close(got[1, :LENGTH], want[0], F32_DECODE, "right padded")
