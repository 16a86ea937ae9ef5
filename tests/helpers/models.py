"""Parameters without zeros or ones, random tokens, and a forward pass of both."""

import jax
import jax.numpy as jnp
import numpy as np

from kvattn import model

LENGTH = 13


def lively(cfg, seed=3):
    """Parameters with no zeros or ones: norms, biases and offsets all draw random values."""
    params = model.init(jax.random.key(seed), cfg)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy)


def tokens_of(cfg, rows=2, length=LENGTH, seed=5):
    return np.random.default_rng(seed).integers(0, cfg.vocab_size, (rows, length)).astype(np.int32)


def run(params, cfg, tokens, **kw):
    return jax.jit(model.forward, static_argnums=1)(params, cfg, model.Inputs(jnp.asarray(tokens), **kw))[0].logits
