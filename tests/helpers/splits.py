"""The shared property's programs: prefill then decode at every split point at once, chunks with left padding, and a
full forward pass to hold them against."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kvattn import cache, model

forward = jax.jit(model.forward, static_argnums=1)


def whole(params, cfg, tokens, **inputs):
    """Logits [B,T,W] of one pass without caches."""
    return np.asarray(forward(params, cfg, model.Inputs(jnp.asarray(tokens), **inputs))[0].logits)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _every_split(params, cfg, store, tokens, caches, memory):
    rows, length = tokens.shape
    split = jnp.arange(rows, dtype=jnp.int32)[:, None] + 1
    at = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None, :], tokens.shape)
    prompt = model.Inputs(tokens, jnp.where(at < split, at, -1), empty=True, **memory)
    first, caches = model.forward(params, cfg, prompt, caches=caches)
    caches = cache.settle(cfg, store, caches, room=length)

    def step(caches, t):
        position = jnp.where(split <= t, t, -1)
        token = jax.lax.dynamic_slice_in_dim(tokens, t, 1, 1)
        out, caches = model.forward(params, cfg, model.Inputs(token, position), caches=caches)
        return caches, out.logits[:, 0]

    caches, rest = jax.lax.scan(step, caches, jnp.arange(length, dtype=jnp.int32))
    return jnp.where((at < split)[..., None], first.logits, rest.swapaxes(0, 1)), caches


def every_split(params, cfg, store, tokens, capacity=None, **memory):
    """(logits [T,T,W], caches): row b of tokens[T,T] prefills b + 1 tokens, right padded, is settled as store.keep says
    and decodes the rest, so that ragged rows and all split points go through one program."""
    length = tokens.shape[1]
    caches = model.create_caches(cfg, store, length, capacity or length + 3)
    got, caches = _every_split(params, cfg, store, jnp.asarray(tokens), caches, memory)
    return np.asarray(got), caches


def repeated(row):
    """tokens [1,T] -> [T,T], one row a split point."""
    return np.repeat(row, row.shape[1], 0)


def chunked(params, cfg, store, tokens, chunk, pad):
    """Logits [2,T,W] of tokens[2,T] in chunks: row 0 padded by `pad` on the left, row 1 on the right."""
    length = tokens.shape[1]
    rows = np.concatenate([np.zeros((2, pad), np.int32), tokens], 1)
    at = np.concatenate([np.full((2, pad), -1), np.tile(np.arange(length), (2, 1))], 1).astype(np.int32)
    at[1], rows[1] = np.roll(at[1], -pad), np.roll(rows[1], -pad)
    caches, got = model.create_caches(cfg, store, 2, length), []
    for start in range(0, length + pad, chunk):
        part = slice(start, start + chunk)
        inputs = model.Inputs(jnp.asarray(rows[:, part]), jnp.asarray(at[:, part]), empty=start == 0)
        out, caches = forward(params, cfg, inputs, caches=caches)
        got.append(out.logits)
    got = np.concatenate(got, 1)
    return np.stack([got[0, pad:], got[1, :length]])
