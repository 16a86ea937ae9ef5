"""Decode kernels in sharded programs: each chip's kernel reads its own part of the cache, and the parts merge."""

import dataclasses

import jax
import numpy as np
import pytest

from kvattn import cache, model
from kvattn.attention import target
from kvattn.config import CacheConfig
from kvattn.decode import partitioned as sharded
from kvattn.errors import UserError
from tests.helpers import tiny
from tests.helpers.models import lively
from tests.helpers.sharded_cases import mesh_of
from tests.helpers.tolerances import F32_SHARDED, close

SIZES = dict(
    vocab_size=64, d_model=48, n_heads=8, n_k_heads=4, n_v_heads=4, d_ff=40, n_layers=1, head_dim=16, v_head_dim=16
)
ONE_HEAD = {"n_k_heads": 1, "n_v_heads": 1}
BATCH, SLOTS, LENGTHS = 8, 1024, (1, 130, 700, 1023, 128, 129, 512, 6)
LANES = CacheConfig(multiple=128, layout="lanes")
CELLS = [
    ("gqa", {}, {}, "ws_2d/by_head:z+by_batch:xy"),
    ("mqa", ONE_HEAD, {}, "ws_2d/by_batch:xyz"),
    ("mqa", ONE_HEAD, {}, "ws_1d/by_seq:xyz"),
    ("int8", {}, {"dtype": "int8"}, "ws_2d/by_head:z+by_seq:xy"),
]


def filled(cfg, store, rng):
    """Caches whose rows hold LENGTHS - 1 random tokens, made by one prefill."""
    tokens = rng.integers(0, cfg.vocab_size, (BATCH, SLOTS - 1)).astype(np.int32)
    at = np.where(np.arange(SLOTS - 1) < np.array(LENGTHS)[:, None] - 1, np.arange(SLOTS - 1), -1).astype(np.int32)
    params, caches = lively(cfg), cache.create(cfg, store, BATCH, SLOTS)
    inputs = model.Inputs(tokens, at, empty=True, last_only=True)
    return params, jax.jit(model.forward, static_argnums=1)(params, cfg, inputs, caches=caches)[1]


@pytest.mark.parametrize("name,change,store,layout", CELLS, ids=[f"{c[0]}-{c[3]}" for c in CELLS])
def test_a_sharded_step_with_kernels_equals_one_chip(name, change, store, layout):
    cfg, rng = tiny.config(**(SIZES | change)), np.random.default_rng(3)
    held = dataclasses.replace(LANES, **store)
    params, caches = filled(cfg, held, rng)
    token = rng.integers(0, cfg.vocab_size, (BATCH, 1)).astype(np.int32)
    at = np.array(LENGTHS, np.int32)[:, None] - 1
    want = jax.jit(model.forward, static_argnums=1)(params, cfg, model.Inputs(token, at), caches=caches)[0].logits[:, 0]
    fast = dataclasses.replace(cfg, decode_kernel="mosaic_tpu")
    with target.of("tpu", interpret=True):
        p = sharded.build(fast, held, layout, mesh_of(), phase="decode", batch=BATCH, context=SLOTS, weights="float32")
        lowered = jax.jit(p.fn).lower(*p.args)
    got, _ = lowered.compile()(
        *jax.tree.map(lambda a, s: jax.device_put(a, s.sharding), (params, token, at, caches), p.args)
    )
    close(got, want, F32_SHARDED, layout)


def test_a_program_that_the_compiler_partitions_takes_no_kernel():
    cfg = tiny.config(**SIZES, decode_kernel="mosaic_tpu")
    with target.of("tpu", interpret=True), pytest.raises(UserError, match="that the compiler partitions; write its"):
        p = sharded.build(
            cfg,
            LANES,
            "ws_2d/by_batch:xyz",
            mesh_of(),
            phase="decode",
            batch=BATCH,
            context=SLOTS,
            weights="float32",
            overlap="compiler",
        )
        jax.jit(p.fn).lower(*p.args)


def test_a_mesh_of_another_platform_raises():
    """The mesh says which chips the program is for."""
    cfg = tiny.config(**SIZES, decode_kernel="mosaic_tpu")
    p = sharded.build(
        cfg, LANES, "ws_2d/by_batch:xyz", mesh_of(), phase="decode", batch=BATCH, context=SLOTS, weights="float32"
    )
    with pytest.raises(UserError, match="a kernel for tpu, and this is a cpu"):
        jax.jit(p.fn).lower(*p.args)
