"""The model with decode kernels: the same logits as with the reference, step by step, in every store; what cannot be
is one sentence; and no copy of a cache in what the compilers for H200 and TPU make of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvattn import cache, config, model
from kvattn.attention import gate, step, target
from kvattn.config import CacheConfig, MaskConfig
from kvattn.errors import UserError
from pallas_kernels import gpu
from tests.helpers import tiny
from tests.helpers.models import lively, tokens_of
from tests.helpers.tolerances import F32_DECODE, KERNEL_MODEL, close

LENGTH, PROMPT = 13, 5
WIDE = dict(n_layers=2, n_heads=4, n_k_heads=2, n_v_heads=2, head_dim=128, v_head_dim=128)
MODELS = {
    "gqa": tiny.config(**{**WIDE, "n_layers": 1}),
    "window_sinks": tiny.config(**WIDE, masks=(MaskConfig(window=5, sinks=2), MaskConfig())),
    "cla2_cap": tiny.config(**WIDE, kv_source=(0, 0), attn_soft_cap=5.0),
}
FULL = CacheConfig(multiple=128)
TPU_STORES = {
    "f32": FULL,
    "bf16": dataclasses.replace(FULL, dtype="bfloat16"),
    "ring": dataclasses.replace(FULL, kinds=("by_mask",)),
    "lanes": dataclasses.replace(FULL, layout="lanes"),
    "int8": dataclasses.replace(FULL, dtype="int8"),
    "int8_channel": dataclasses.replace(FULL, dtype="int8", key_scale="channel"),
    "paged": CacheConfig(kinds=("paged",), page_size=128),
    "paged_int8": CacheConfig(kinds=("paged",), page_size=128, dtype="int8"),
}
GPU_STORES = {
    "bf16": dataclasses.replace(FULL, dtype="bfloat16"),
    "int8": dataclasses.replace(FULL, dtype="int8", layout="v_lanes"),
    "paged": CacheConfig(kinds=("paged",), page_size=64, dtype="bfloat16"),
}
CELLS = [
    ("mosaic_tpu", m, s)
    for m, s in [
        *(("gqa", s) for s in TPU_STORES),
        ("window_sinks", "f32"),
        ("window_sinks", "ring"),
        ("cla2_cap", "f32"),
    ]
]
CELLS += [("mosaic_gpu", "gqa", s) for s in GPU_STORES] + [("mosaic_gpu", "window_sinks", "bf16")]


def with_kernel(cfg, name):
    return dataclasses.replace(cfg, decode_kernel=name)


def decoded(params, cfg, store, tokens, sizes, dtype):
    """Logits [B,T,W] of a prompt, then passes of `sizes` tokens each over the cache; rows of unequal length."""
    caches = cache.create(cfg, store, tokens.shape[0], 120)
    starts = np.array([[0], [2]], np.int32)  # row 1 begins two tokens late
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    out, at = [], 0

    @functools.partial(jax.jit, static_argnames="fresh")
    def run(caches, part, where, fresh):
        result, caches = model.forward(params, cfg, model.Inputs(part, where, empty=fresh), caches=caches)
        return result.logits, caches

    for size in (PROMPT, *sizes):
        where = np.arange(at, at + size, dtype=np.int32)[None] - starts
        where = jnp.asarray(np.where(where < 0, -1, where))
        logits, caches = run(caches, jnp.asarray(tokens[:, at : at + size]), where, at == 0)
        out, at = [*out, logits], at + size
    return np.concatenate(out, 1)


@pytest.mark.parametrize("kernel,name,store", CELLS)
def test_decoding_with_a_kernel_equals_the_reference(kernel, name, store):
    """Single tokens and passes of several, over caches that both paths read."""
    platform = "tpu" if kernel == "mosaic_tpu" else "gpu"
    held = (TPU_STORES if platform == "tpu" else GPU_STORES)[store]
    if platform == "gpu" and not gpu.AVAILABLE:
        with pytest.raises(UserError, match="JAX 0.11"):
            model.create_caches(with_kernel(MODELS[name], kernel), held, 2, 120)
        return
    cfg, dtype = MODELS[name], jnp.float32 if platform == "tpu" else jnp.bfloat16
    params, tokens = lively(cfg), tokens_of(cfg, rows=2, length=LENGTH)
    sizes = (1, 3, 1, 3) if platform == "tpu" else (1, 1, 3)  # the GPU interpreter is slow
    want = decoded(params, cfg, held, tokens, sizes, dtype)
    with target.of(platform, interpret=True):
        got = decoded(params, with_kernel(cfg, kernel), held, tokens, sizes, dtype)
    close(got[0], want[0], F32_DECODE if dtype == jnp.float32 else KERNEL_MODEL, "row 0")
    close(got[1, 2:], want[1, 2:], F32_DECODE if dtype == jnp.float32 else KERNEL_MODEL, "row 1")


def test_the_kernel_is_what_runs():
    """A Pallas call for every layer of a step; none in the prefill, nor with the reference."""
    cfg = MODELS["gqa"]
    params, caches = lively(cfg), cache.create(cfg, FULL, 2, 120)

    def calls(cfg, length, fresh=False):
        inputs = model.Inputs(jnp.zeros((2, length), jnp.int32), empty=fresh)
        with target.of("tpu", interpret=True):
            made = jax.make_jaxpr(lambda c: model.forward(params, cfg, inputs, caches=c))(caches)
        return str(made).count("pallas_call")

    fast = with_kernel(cfg, "mosaic_tpu")
    assert calls(fast, 1) == calls(fast, step.STEP_TOKENS) == cfg.n_layers
    assert calls(cfg, 1) == calls(fast, step.STEP_TOKENS + 1) == calls(fast, 7, fresh=True) == 0


@pytest.mark.parametrize(
    "change,store,words",
    [
        (
            dict(decode_kernel="mosaic"),
            {},
            "model.decode_kernel is 'mosaic'; choose one of xla, mosaic_tpu, mosaic_gpu",
        ),
        (dict(decode_kernel="mosaic_tpu", tied_kv=True), {"multiple": 128}, "made from what is stored"),
        (dict(decode_kernel="mosaic_tpu"), {"capacity": 100}, r"cannot read this cache \(.*slots.*xla can"),
        (dict(decode_kernel="mosaic_tpu", head_dim=64), {"multiple": 128}, "rows of 64 do not .*cache.layout lanes"),
        (dict(decode_kernel="mosaic_tpu"), {"kinds": ("paged",), "page_size": 16}, r"cannot read this cache \(.*page"),
        (dict(decode_kernel="mosaic_gpu"), {"multiple": 128}, r"cannot read this cache \(.*; mosaic_tpu and xla can"),
    ],
)
def test_what_a_kernel_cannot_read_is_said_of_the_config(change, store, words):
    with pytest.raises(UserError, match=words):
        gate(tiny.config(**{**WIDE, **change}), CacheConfig(**store))


def test_the_configs_kernels_reach_a_checkpoints_model():
    """What a checkpoint says of execution gives way to config.model; what cannot serve it raises."""
    held = config.executed(MODELS["gqa"], tiny.config(decode_kernel="mosaic_tpu", kernel="splash", remat="full"))
    assert (held.kernel, held.decode_kernel, held.remat) == ("splash", "mosaic_tpu", "full")
    assert dataclasses.replace(held, kernel="xla", decode_kernel="xla", remat="none") == MODELS["gqa"]
    with pytest.raises(UserError, match="attention-sink tokens"):
        gate(config.executed(MODELS["window_sinks"], tiny.config(kernel="splash")))


def test_off_its_platform_a_kernel_raises():
    cfg = with_kernel(MODELS["gqa"], "mosaic_tpu")
    caches = cache.create(cfg, FULL, 1, 120)
    with pytest.raises(UserError, match="model.decode_kernel is 'mosaic_tpu', a kernel for tpu, and this is a cpu"):
        model.forward(lively(cfg), cfg, model.Inputs(jnp.zeros((1, 1), jnp.int32)), caches=caches)
