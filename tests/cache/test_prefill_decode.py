"""The shared property: prefill then decode equals the full forward, for every variant x store.

One batch holds every split point: row b prefills b + 1 tokens and decodes the rest, so ragged rows and all
split points go through one compiled program. Variants come from tests/helpers/tiny.py, stores from STORES; the
product is counted, legal plus illegal. Stores that hold codes are held against a forward pass without a cache whose
K and V are rounded as the sheet says; that a code has the same bits however it was written: test_cache_quantized.py.
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvattn import cache, model
from kvattn.attention import Heads
from kvattn.config import CacheConfig
from kvattn.errors import UserError
from tests.helpers import tiny
from tests.helpers.models import lively, tokens_of
from tests.helpers.splits import chunked, every_split
from tests.helpers.tolerances import BF16_CACHE, CODES_STEP, F32_DECODE, FP8_CACHE, INT4_CACHE, INT8_CACHE, apart, close

LENGTH = 12
STORES = {
    f"{kind}-{dtype}": CacheConfig((kind,), dtype)
    for kind in ("full", "ring", "by_mask")
    for dtype in ("float32", "bfloat16")
}
STORES["by_mask-int8"] = CacheConfig(("by_mask",), "int8")
EVERYWHERE = tuple(STORES)
# How a leaf is held meets heads, sharing, windows and rotation at read, but not the kind of norm or MLP.
STORES |= {
    "ring-int8-lanes": CacheConfig(("ring",), "int8", layout="lanes", multiple=4),
    "full-int4-v_lanes": CacheConfig(("full",), "int4", layout="v_lanes"),
    "full-float8_e4m3fn-lanes": CacheConfig(("full",), "float8_e4m3fn", layout="lanes", multiple=16),
    "full-float32-lanes": CacheConfig(("full",), layout="lanes"),
    "paged-float32": CacheConfig(("paged",), page_size=16),
    "paged-int8-v_lanes": CacheConfig(("paged",), "int8", layout="v_lanes", page_size=16),
    "paged-int4-lanes": CacheConfig(("paged",), "int4", layout="lanes", page_size=16),
}
MOVING = ("mqa", "uneven_kv", "tied_kv", "cla3", "window_sinks", "uneven_cla2_window", "gemma2", "scan")
CODES = {"int8": INT8_CACHE, "float8_e4m3fn": FP8_CACHE, "int4": INT4_CACHE}


def legal(cfg, store) -> bool:
    """Written out here, not taken from the library: a ring needs windows everywhere; a scan has no cache; tied keys
    leave no V to lay along lanes."""
    ring = store.kinds != ("ring",) or all(layer.mask.window for layer in cfg.layers)
    return not cfg.scan_layers and ring and not (cfg.attention(0).tied_kv and store.layout == "v_lanes")


CELLS = [(n, store) for n in sorted(tiny.CASES) for store in STORES if store in EVERYWHERE or n in MOVING]
LEGAL = [(name, store) for name, store in CELLS if legal(tiny.CASES[name], STORES[store])]
ILLEGAL = [cell for cell in CELLS if cell not in LEGAL]


@functools.cache
def _case(name):
    cfg = tiny.CASES[name]
    params, row = lively(cfg), tokens_of(cfg, rows=1, length=LENGTH)
    want = jax.jit(model.forward, static_argnums=1)(params, cfg, model.Inputs(jnp.asarray(row)))[0].logits
    return cfg, params, np.repeat(row, LENGTH, 0), np.repeat(np.asarray(want), LENGTH, 0)


def rounded(x, dtype):
    """x[B,heads,T,dim] as codes of a token and head would give it back: cache_storage.md, section 0."""
    limit = {"int8": 127, "int4": 7, "float8_e4m3fn": 448}[dtype]
    s = jnp.abs(x).max(-1, keepdims=True) / limit
    y = x / jnp.where(s == 0, 1, s)
    return (jnp.clip(jnp.rint(y), -limit, limit) if dtype[:3] == "int" else y.astype(dtype).astype(x.dtype)) * s


@functools.cache
def _rounded_case(name, dtype):
    """Logits [T,W] of a forward pass without a cache, K and V rounded."""
    cfg, params, tokens, _ = _case(name)
    plain = Heads.entries

    def entries(*args):
        made = plain(*args)
        return made.replace(entries={leaf: rounded(x, dtype) for leaf, x in made.entries.items()})

    with mock.patch.object(Heads, "entries", entries):
        inputs = model.Inputs(jnp.asarray(tokens[:1]))
        return np.asarray(jax.jit(lambda p: model.forward(p, cfg, inputs)[0].logits)(params))[0]


def check(name, store, got, want):
    """Logits [B,T,W] of rows that hold the same tokens, against the exact ones."""
    dtype = STORES[store].dtype
    if dtype == "bfloat16":  # the same rounded K and V at every split: the last row, all prefill, is the reference
        close(got, np.repeat(np.asarray(got)[-1:], LENGTH, 0), BF16_CACHE, f"{name} {store}")
        assert 0 < apart(got, want) < BF16_CACHE.rtol  # rounding is real, and small
    elif dtype in CODES:
        same = np.repeat(_rounded_case(name, dtype)[None], len(want), 0)
        assert apart(got, same) < CODES_STEP.rtol
        assert CODES_STEP.rtol < apart(got, want) < CODES[dtype].rtol
    else:
        close(got, want, F32_DECODE, f"{name} {store}")


@pytest.mark.parametrize("name,store", LEGAL)
def test_prefill_then_decode_equals_forward_at_every_split(name, store):
    cfg, params, tokens, want = _case(name)
    got, caches = every_split(params, cfg, STORES[store], tokens)
    check(name, store, got, want)
    for owner in cfg.owners:
        assert (np.asarray(caches[owner].length) == LENGTH).all()


@pytest.mark.parametrize("name,store", ILLEGAL)
def test_illegal_cells_raise(name, store):
    with pytest.raises(UserError, match="ring|scan_layers|v_lanes"):
        cache.create(tiny.CASES[name], STORES[store], 2, LENGTH)


def test_cells_are_counted():
    few = len(STORES) - len(EVERYWHERE)
    assert len(LEGAL) + len(ILLEGAL) == len(tiny.CASES) * len(EVERYWHERE) + len(MOVING) * few
    windowed = sum(all(layer.mask.window for layer in c.layers) and not c.scan_layers for c in tiny.CASES.values())
    looped = sum(not c.scan_layers for c in tiny.CASES.values())
    assert windowed >= 3 and looped == len(tiny.CASES) - 1
    rings, tied = 2, 1  # of MOVING: window_sinks and uneven_cla2_window have windows everywhere; two stores need a V
    moved = (few - 1) * (len(MOVING) - 1) + rings - 2 * tied
    assert len(LEGAL) == 2 * (2 * looped + windowed) + looped + moved


@pytest.mark.parametrize(
    "name,store",
    [
        ("gqa", "full-float32"),
        ("window_sinks", "ring-float32"),
        ("mqa_cla2_pattern", "by_mask-float32"),
        ("tied_kv", "full-float32"),
        ("uneven_cla2_window", "ring-float32"),
        ("window_sinks", "ring-int8-lanes"),
        ("mqa", "paged-float32"),
        ("uneven_kv", "paged-int8-v_lanes"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 4, 5])
@pytest.mark.parametrize("pad", [0, 3])
def test_chunked_and_left_padded_prefill(name, store, chunk, pad):
    """Chunks of any size, with left padding in the first ones, give the full forward's logits."""
    cfg, params, tokens, want = _case(name)
    check(name, store, chunked(params, cfg, STORES[store], tokens[:2], chunk, pad), want[:2])
