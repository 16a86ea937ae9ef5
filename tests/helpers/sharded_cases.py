"""Small models and ragged prompts for programs on 8 fake chips, with the unsharded logits and caches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from kvattn import cache, model
from kvattn.config import CacheConfig, MaskConfig
from tests.helpers import tiny
from tests.helpers.models import lively

TOKENS, STEPS, SLOTS = 6, 2, 16  # of the longest prompt; decoded after it; of a full cache
# Every dim that a layout may split is divisible by 8: W 64, D 48, N 8, F 40, S 16; a ring has 6 + 2 slots.
BASE = {"vocab_size": 64, "d_model": 48, "n_heads": 8, "n_k_heads": 4, "n_v_heads": 4, "d_ff": 40, "n_layers": 2}
RING = CacheConfig(kinds=("ring",))


def config(**changes):
    return tiny.config(**(BASE | changes))


ONE_HEAD = {"n_k_heads": 1, "n_v_heads": 1}
MODELS = {
    "palm": config(**ONE_HEAD, residual="parallel_palm", norm="layernorm"),
    "mqa": config(**ONE_HEAD),
    "gqa": config(),
    "mha": config(n_k_heads=8, n_v_heads=8, d_ff=80, mlp="gelu"),
    "uneven": config(n_k_heads=2, n_v_heads=8),
    "many_v": config(n_k_heads=1, n_v_heads=4),
    "cla2": config(n_k_heads=2, n_v_heads=2, kv_source=(0, 0), kv_norm=True),
    "ring": config(masks=(MaskConfig(window=6, sinks=2),)),
    "qk_head": config(qk_norm="head", qkv_bias=True, o_bias=True, mlp_bias=True, tied_embeddings=False),
    "qk_full": config(qk_norm="full", residual="parallel_neox", norm="layernorm", o_bias=True, mlp_bias=True),
    "gemma": config(norm_placement="both", norm_offset=1.0, attn_soft_cap=9.0, embed_scale=48**0.5),
    "tied_kv": config(tied_kv=True, v_head_dim=10),
    "ladder": config(**ONE_HEAD, residual="ladder"),
    "cla4": config(n_layers=4, n_k_heads=2, n_v_heads=2, kv_source=(0, 0, 2, 2)),
}


def mesh_of(shape=(2, 2, 2)):
    return jax.make_mesh(shape, ("x", "y", "z"), axis_types=(AxisType.Auto,) * 3)


@functools.cache
def case(name, batch):
    """(params, the prompt's tokens and positions, those of STEPS later tokens, logits [1 + STEPS, B, W]).

    Rows are ragged: even rows are padded on the left, odd ones on the right.
    """
    cfg, rng = MODELS[name], np.random.default_rng(7)
    rows = rng.integers(0, cfg.vocab_size, (batch, TOKENS + STEPS)).astype(np.int32)
    lengths = TOKENS - np.arange(batch) % 4
    params = lively(cfg)
    prompt, positions = np.full((2, batch, TOKENS), -1, np.int32)
    for b, n in enumerate(lengths):
        at = slice(TOKENS - n, None) if b % 2 == 0 else slice(0, n)
        prompt[b, at], positions[b, at] = rows[b, :n], np.arange(n)
    inputs = model.Inputs(jnp.asarray(rows))
    logits = np.asarray(jax.jit(model.forward, static_argnums=1)(params, cfg, inputs)[0].logits)
    every = np.arange(batch)
    want = np.stack([logits[every, lengths - 1 + i] for i in range(1 + STEPS)])
    steps = [(rows[every, lengths + i][:, None], (lengths + i).astype(np.int32)[:, None]) for i in range(STEPS)]
    return params, (np.where(prompt < 0, 3, prompt).astype(np.int32), positions), steps, want


@functools.cache
def filled(name, batch):
    """The unsharded caches of `case`: after the prompt, and after the steps."""
    params, prompt, steps, _ = case(name, batch)
    cfg = MODELS[name]
    caches = cache.create(cfg, store(name), batch, SLOTS)
    after = []
    forward = jax.jit(model.forward, static_argnums=1)
    for i, (tokens, positions) in enumerate([prompt, *steps]):
        inputs = model.Inputs(jnp.asarray(tokens), jnp.asarray(positions), empty=i == 0)
        caches = forward(params, cfg, inputs, caches=caches)[1]
        after.append(jax.device_get(caches))
    return after[0], after[-1]


def store(name):
    return RING if name == "ring" else CacheConfig()
