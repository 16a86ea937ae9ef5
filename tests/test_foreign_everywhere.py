"""The acid test, continued: the foreign family of tests/helpers/foreign.py where families are counted, sharded,
planned, studied, trained and offered to Flax users."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvattn import account, cache, model, plan
from kvattn import config as c
from kvattn.attention import Heads
from kvattn.decode import partitioned
from kvattn.nnx import Decoder
from kvattn.train import step as train_step
from sharding import make_mesh
from tests.helpers import foreign
from tests.helpers.models import lively, tokens_of
from tests.helpers.sharded_cases import mesh_of
from tests.helpers.tolerances import F32_DECODE, F32_GRAD, F32_MODEL, F32_SHARDED, close

PLAIN = Heads(n_heads=6, n_k_heads=3, n_v_heads=3, head_dim=10, v_head_dim=14)
CFG = foreign.model_of(foreign.Foreign(), PLAIN)
# Every dim that a layout splits is divisible by 8, and none is alike.
SPLIT = foreign.model_of(
    foreign.Foreign(n_heads=8), vocab_size=64, d_model=48, d_ff=40, n_layers=2, residual="parallel_palm"
)
STORES = {
    "f32": c.CacheConfig(),
    "bf16": c.CacheConfig(dtype="bfloat16"),
    "int8": c.CacheConfig(dtype="int8"),
    "paged": c.CacheConfig(("paged",), page_size=16),
}


@pytest.mark.parametrize("name", STORES)
def test_declared_allocated_and_compiled_bytes_are_equal(name):
    store, batch, capacity = STORES[name], 3, 21
    caches = cache.create(CFG, store, batch, capacity)
    declared = account.cache_bytes(CFG, store, batch, capacity)
    slots = {"paged": 16 * (1 + batch * 2)}.get(name, batch * capacity)
    bits = {"f32": 32, "bf16": 16, "int8": 8, "paged": 32}[name]
    zeta, heads, scale = 15 * bits, 3 * (10 + 14) * bits, 32 if name == "int8" else 0
    by_hand = 2 * slots * (zeta + scale + heads + 6 * scale) + 2 * batch * 3 * 32
    assert declared == cache.nbytes(caches) == by_hand // 8
    counters = sum(x.nbytes for x in jax.tree.leaves([held.address for held in caches]))
    compiled = jax.jit(lambda x: jax.tree.map(lambda y: y + y, x), donate_argnums=0).lower(caches).compile()
    assert compiled.memory_analysis().argument_size_in_bytes == declared + counters
    assert account.sequence_bytes_per_layer(CFG, store) == (12, 0, 12, 0)


def test_the_module_is_the_function():
    params, tokens = lively(CFG), jnp.asarray(tokens_of(CFG))
    decoder = Decoder.from_params(CFG, params)
    want = model.forward(params, CFG, model.Inputs(tokens))[0].logits
    close(decoder(tokens), want, F32_MODEL)
    got = nnx.value_and_grad(lambda m: (m(tokens) ** 2).mean())(decoder)[1]
    grads = jax.grad(lambda p: (model.forward(p, CFG, model.Inputs(tokens))[0].logits ** 2).mean())(params)
    for (path, mine), theirs in zip(
        jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(got)), jax.tree.leaves(grads), strict=True
    ):
        close(mine, theirs, F32_GRAD, jax.tree_util.keystr(path))
    caches = decoder.init_cache(2, tokens.shape[1])
    at = jnp.broadcast_to(jnp.arange(tokens.shape[1] - 1, dtype=jnp.int32), (2, tokens.shape[1] - 1))
    _, caches = decoder.prefill(tokens[:, :-1], at, caches)
    last = jnp.full((2,), tokens.shape[1] - 1, jnp.int32)
    close(decoder.decode_step(tokens[:, -1], last, caches)[0], want[:, -1], F32_DECODE)


@pytest.mark.parametrize("overlap", ["none", "compiler"])
@pytest.mark.parametrize(
    "layout", ["ws_2d/by_batch:xyz", "ws_1d/replicated", "ws_2d/by_seq:x+by_batch:yz", "wg_xyz/by_batch:xyz"]
)
def test_sharded_is_unsharded(layout, overlap):
    """A prompt and two more tokens on 8 chips, states and latents in the cache that is split."""
    batch, width, slots = 8, 6, 16
    params, tokens = lively(SPLIT), tokens_of(SPLIT, rows=batch, length=width + 2)
    want = np.asarray(model.forward(params, SPLIT, model.Inputs(jnp.asarray(tokens)))[0].logits)
    caches = cache.create(SPLIT, c.CacheConfig(), batch, slots)
    at = np.tile(np.arange(width + 2, dtype=np.int32), (batch, 1))
    for phase, part in (
        ("prefill", slice(0, width)),
        ("decode", slice(width, width + 1)),
        ("decode", slice(width + 1, None)),
    ):
        made = partitioned.build(
            SPLIT,
            c.CacheConfig(),
            layout,
            mesh_of(),
            phase=phase,
            batch=batch,
            context=slots,
            tokens=width if phase == "prefill" else 0,
            weights="float32",
            overlap=overlap,
        )
        args = jax.tree.map(
            lambda x, a: jax.device_put(jnp.asarray(x), a.sharding),
            (params, tokens[:, part], at[:, part], jax.device_get(caches)),
            made.args,
        )
        logits, caches = jax.jit(made.fn)(*args)
        close(logits, want[:, part.stop - 1 if part.stop else -1], F32_SHARDED, phase)


def test_trained_sharded_is_trained_alone(devices):
    cfg = dataclasses.replace(SPLIT, n_layers=2)
    tokens = tokens_of(cfg, rows=4, length=9)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.zeros_like(tokens[:, 1:]),
        "positions": np.tile(np.arange(8, dtype=np.int32), (4, 1)),
        "loss_mask": np.ones((4, 8), np.float32),
    }
    losses = []
    for mesh in (c.MeshConfig(), c.MeshConfig(2, 2, 2)):
        place = train_step.make_layout(
            cfg, c.OptimizerConfig(), 2, make_mesh(mesh, devices[: mesh.data * mesh.fsdp * mesh.tensor])
        )
        step, state = train_step.make_step(place, c.TrainConfig()), train_step.init_state(place, 0)
        rows = train_step.global_batch(place, [batch], train_step.data_share(place, 4))
        for _ in range(2):
            state, metrics = step(state, None, rows)
        losses.append(float(metrics["loss"]))
    close(losses[1], losses[0], F32_SHARDED)


def test_the_planner_places_what_it_never_heard_of():
    """Latents and states in the cost of a pass: bytes of the cache from the leaves, weights from their axes."""
    store = c.CacheConfig(dtype="bfloat16")
    found = plan.plan(SPLIT, store, chip="v4", chips=8, batch=64, context=2048, phase="decode")
    best = found.best
    held = account.cache_bytes(SPLIT, store, 64, 2048)
    assert best.prediction.cache_memory * 8 >= held * 0.999
    assert found.feasible and {cand.layout.ffn for cand in found.feasible} >= {"ws_1d", "ws_2d"}
    work = plan.workload(SPLIT, store)
    assert {leaf.role for layer in work.layers for leaf in layer.leaves} == {"both", "state"}
