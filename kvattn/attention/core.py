"""Reference attention: the one softmax algebra that every store and kernel must reproduce.

`attend` returns normalised outputs; `attend_partial` returns (out, max, sum), and `merge` joins partial
results, so chunks, pages, sequence shards and shared prefixes all use the same three lines of algebra:
    m = max(m1, m2);  l = l1 e^(m1-m) + l2 e^(m2-m);  out = (out1 l1 e^(m1-m) + out2 l2 e^(m2-m)) / l
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kvattn.layers import soft_cap
from kvattn.typed import shaped
from pallas_kernels import Leaf, Partial
from pallas_kernels.contract import NEGATIVE


@shaped
def attend_partial(
    q: Float[Array, "B T N H"],
    k: jax.Array | Leaf,
    v: jax.Array | Leaf,
    mask: Bool[Array, "B K1 T S"],
    *,
    scale: float,
    cap: float = 0.0,
) -> Partial:
    """Softmax attention with its statistics.

    q[B,T,N,H], k[B,K,S,H], v[B,M,S,V], mask bool[B, 1 | K,T,S]. K and M divide N; query head n reads key head
    n // (N/K) and value head n // (N/M), so K and M may differ (DiffQKV, arXiv 2501.13629). Nothing is repeated.
    Scores, softmax and sums are float32; the probabilities are cast to v's dtype for the second matmul.

    k and v may be Leafs: along lanes [B,K,H,S], or codes in q's dtype with float32 scales, which are folded into the
    scores, (q . code_k) s_k, or a channel's into q, and into the probabilities, sum_j (p_j s_v[j]) code_v[j], so that
    no dequantised copy is made.
    """
    k, v = (x if isinstance(x, Leaf) else Leaf(x) for x in (k, v))
    batch, length, n, h = q.shape
    grouped = q.transpose(0, 2, 1, 3).reshape(batch, k.heads, n // k.heads * length, h)
    if k.channel:
        grouped = (grouped.astype(jnp.float32) * k.scale).astype(q.dtype)
    product = "bkgh,bkhs->bkgs" if k.lanes else "bkgh,bksh->bkgs"
    scores = jnp.einsum(product, grouped, k.values, preferred_element_type=jnp.float32) * scale
    if k.scale is not None and not k.channel:
        scores = scores * k.scale[:, :, None, :]
    scores = soft_cap(scores, cap).reshape(batch, n, length, k.slots)
    seen = mask if mask.shape[1] == 1 else jnp.repeat(mask, n // mask.shape[1], axis=1)
    scores = jnp.where(seen, scores, NEGATIVE)
    top = jax.lax.stop_gradient(scores.max(-1))
    weights = jnp.where(seen, jnp.exp(scores - top[..., None]), 0.0)
    total = weights.sum(-1)
    rows = weights.reshape(batch, v.heads, n // v.heads * length, v.slots)
    if v.scale is not None:
        rows = rows * v.scale[:, :, None, :]
    product = "bmgs,bmvs->bmgv" if v.lanes else "bmgs,bmsv->bmgv"
    out = jnp.einsum(product, rows.astype(v.dtype), v.values, preferred_element_type=jnp.float32)
    out = out.reshape(batch, n, length, v.dim) / jnp.where(total == 0, 1.0, total)[..., None]
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
