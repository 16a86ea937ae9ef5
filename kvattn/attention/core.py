"""Reference attention: the one softmax algebra that every store and kernel must reproduce.

`attend` returns normalised outputs; `attend_partial` returns (out, max, sum), and `merge` joins partial
results, so chunks, pages, sequence shards and shared prefixes all use the same three lines of algebra:
    m = max(m1, m2);  l = l1 e^(m1-m) + l2 e^(m2-m);  out = (out1 l1 e^(m1-m) + out2 l2 e^(m2-m)) / l
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvattn.layers import soft_cap

NEGATIVE = -1e30  # finite, so that a row with nothing visible has max NEGATIVE and sum 0, never NaN


class Partial(NamedTuple):
    """out[B,T,N,V] float32 (normalised by its own sum), max and sum [B,T,N] float32."""

    out: jax.Array
    max: jax.Array
    sum: jax.Array


def attend_partial(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, *, scale: float, cap: float = 0.0
) -> Partial:
    """Softmax attention with its statistics.

    q[B,T,N,H], k[B,K,S,H], v[B,M,S,V], mask bool[B,T,S]. K and M divide N; query head n reads key head
    n // (N/K) and value head n // (N/M), so K and M may differ (DiffQKV, arXiv 2501.13629). Nothing is repeated.
    Scores, softmax and sums are float32; the probabilities are cast to v's dtype for the second matmul.
    """
    batch, length, n, h = q.shape
    k_heads, slots = k.shape[1], k.shape[2]
    v_heads, v_dim = v.shape[1], v.shape[3]
    grouped = q.transpose(0, 2, 1, 3).reshape(batch, k_heads, n // k_heads * length, h)
    scores = jnp.einsum("bkgh,bksh->bkgs", grouped, k, preferred_element_type=jnp.float32) * scale
    scores = soft_cap(scores, cap).reshape(batch, n, length, slots)
    seen = mask[:, None, :, :]
    scores = jnp.where(seen, scores, NEGATIVE)
    top = jax.lax.stop_gradient(scores.max(-1))
    weights = jnp.where(seen, jnp.exp(scores - top[..., None]), 0.0)
    total = weights.sum(-1)
    rows = weights.astype(v.dtype).reshape(batch, v_heads, n // v_heads * length, slots)
    out = jnp.einsum("bmgs,bmsv->bmgv", rows, v, preferred_element_type=jnp.float32)
    out = out.reshape(batch, n, length, v_dim) / jnp.where(total == 0, 1.0, total)[..., None]
    return Partial(*(x.swapaxes(1, 2) for x in (out, top, total)))


def merge(parts: list[Partial]) -> Partial:
    """One Partial over the union of disjoint key sets."""
    if len(parts) == 1:
        return parts[0]
    top = jnp.max(jnp.stack([p.max for p in parts]), 0)
    weights = [p.sum * jnp.exp(p.max - top) for p in parts]
    total = sum(weights)
    safe = jnp.where(total == 0, 1.0, total)
    out = sum(p.out * (w / safe)[..., None] for p, w in zip(parts, weights, strict=True))
    return Partial(out, top, total)
