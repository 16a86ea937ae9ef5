"""Schedules, AdamW and Adafactor against NumPy float64 written from the papers, and where their state lives."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvattn import model, spec
from kvattn.config import MeshConfig, OptimizerConfig
from kvattn.errors import UserError
from kvattn.train import optimizer
from sharding import RULES, make_mesh, named
from tests.helpers import tiny
from tests.helpers.tolerances import F32_OP, close

CFG = OptimizerConfig(learning_rate=0.02, warmup_steps=2, weight_decay=0.3, clip_norm=0.7, eps=1e-3, beta2=0.9)
STEPS = 5


def _tree(rng):
    """A matrix that decays, a bias of rank 2 and a scale that do not."""
    return {
        "attn": {"q": rng.normal(size=(37, 3, 41)), "q_bias": rng.normal(size=(3, 41))},
        "norm": {"scale": rng.normal(size=(37,)) + 1},
    }


def _run(cfg, params, grads):
    tx = optimizer.make(cfg, STEPS)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    state, update = tx.init(params), jax.jit(tx.update)
    for grad in grads:
        updates, state = update(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), grad), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params, state


def _clip(grad, norm):
    size = math.sqrt(sum(float(np.sum(g**2)) for g in jax.tree.leaves(grad)))
    return jax.tree.map(lambda g: g * min(1.0, norm / size), grad)


def _rate(step):
    """Warm-up of two steps to 0.02, then a cosine to a tenth of it at step 5."""
    if step < 2:
        return 0.02 * (step + 1) / 2
    return 0.02 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 2) / 3)))


def _decays(path):
    return path[-1].key == "q"


def test_adamw_follows_the_paper(rng):
    params, grads = _tree(rng), [_tree(rng) for _ in range(4)]
    got, _ = _run(CFG, params, grads)
    m = v = jax.tree.map(np.zeros_like, params)
    for t, grad in enumerate(grads):
        grad = _clip(grad, 0.7)
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, grad)
        v = jax.tree.map(lambda v, g: 0.9 * v + 0.1 * g * g, v, grad)

        def move(path, p, m, v, t=t):
            step = (m / (1 - 0.9 ** (t + 1))) / (np.sqrt(v / (1 - 0.9 ** (t + 1))) + 1e-3)
            return p - _rate(t) * (step + (0.3 * p if _decays(path) else 0.0))

        params = jax.tree_util.tree_map_with_path(move, params, m, v)
    jax.tree.map(lambda g, w: close(g, w, F32_OP), got, params)


def test_adafactor_follows_the_paper(rng):
    """Shazeer & Stern 2018, algorithms 4 (factored, over dims 37 and 41) and 5, without momentum."""
    params, grads = _tree(rng), [_tree(rng) for _ in range(3)]
    cfg = dataclasses.replace(CFG, name="adafactor", clip_norm=0.0)
    got, state = _run(cfg, params, grads)
    rms = lambda x: math.sqrt(float(np.mean(x**2)))  # noqa: E731
    rows, columns, full = np.zeros((3, 37)), np.zeros((3, 41)), jax.tree.map(np.zeros_like, params)
    for t, grad in enumerate(grads):
        decay = 1 - (t + 1) ** -0.8

        def move(path, p, g, v, decay=decay, t=t):
            nonlocal rows, columns
            square = g**2 + 1e-30
            if _decays(path):
                rows = decay * rows + (1 - decay) * square.mean(2).T
                columns = decay * columns + (1 - decay) * square.mean(0)
                estimate = np.einsum("nd,nh->dnh", rows / rows.mean(1, keepdims=True), columns)
            else:
                v[...] = decay * v + (1 - decay) * square
                estimate = v
            u = g / np.sqrt(estimate)
            u = u / max(1.0, rms(u)) * max(1e-3, rms(p))
            return p - _rate(t) * (u + (0.3 * p if _decays(path) else 0.0))

        params = jax.tree_util.tree_map_with_path(move, params, grad, full)
    jax.tree.map(lambda g, w: close(g, w, F32_OP), got, params)
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(state))
    assert 37 * 3 * 41 not in sizes, "the big moment must be factored"


@pytest.mark.parametrize(("kind", "want"), [("cosine", _rate), ("linear", None), ("constant", None)])
def test_schedules(kind, want):
    f = optimizer.schedule(dataclasses.replace(CFG, schedule=kind), STEPS)
    if kind == "linear":
        want = lambda t: 0.02 * (t + 1) / 2 if t < 2 else 0.02 - (0.02 - 0.002) * (t - 2) / 3  # noqa: E731
    if kind == "constant":
        want = lambda t: 0.02 * min(1.0, (t + 1) / 2)  # noqa: E731
    close([float(f(t)) for t in range(6)], [want(t) for t in range(6)], F32_OP)


def test_wrong_names_and_long_warmup_are_refused():
    for change in ({"schedule": "step"}, {"name": "sgd"}, {"warmup_steps": 6}):
        with pytest.raises(UserError, match=str(list(change.values())[0])):
            optimizer.make(dataclasses.replace(CFG, **change), STEPS)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_moments_are_laid_out_like_their_parameters(name):
    heads = {"n_heads": 8, "n_k_heads": 4, "n_v_heads": 2, "head_dim": 32, "v_head_dim": 48}
    cfg = tiny.config(d_model=64, d_ff=76, vocab_size=134, **heads)
    specs = model.param_specs(cfg)
    mesh = make_mesh(MeshConfig(2, 2, 2))
    shardings = named(specs, mesh, RULES["fsdp_tp"])
    tx = optimizer.make(dataclasses.replace(CFG, name=name), STEPS)
    abstract, placed = optimizer.state_shardings(tx, spec.abstract(specs), shardings, mesh)
    assert jax.tree.structure(abstract) == jax.tree.structure(placed)
    jax.tree.map(lambda a, s: s.shard_shape(a.shape), abstract, placed)  # raises where dims do not divide
    by_name = {
        jax.tree_util.keystr(path, simple=True, separator="."): (leaf.shape, tuple(sharding.spec))
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(abstract), jax.tree.leaves(placed), strict=True
        )
    }
    table = {k: v for k, v in by_name.items() if k.endswith("embed.table")}
    if name == "adamw":
        assert {v for v in table.values()} == {((134, 64), ("tensor", "fsdp"))} and len(table) == 2
    else:
        assert sorted(table.values()) == [((1,), ()), ((64,), ("fsdp",)), ((134,), ("tensor",))]
