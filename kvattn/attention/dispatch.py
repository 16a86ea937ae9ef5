"""Axis E: what computes attention. A kernel is chosen by name; what it cannot serve raises, with the reason.

A kernel has `supports(cfg) -> reason or None`, checked when the config is validated, and
`run(q, segments, ...) -> [B,T,N,V]` over the (k, v, mask) segments of a view.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kvattn.attention.core import Partial, attend_partial, merge
from kvattn.config import ModelConfig
from kvattn.errors import UserError
from kvattn.masks import Tokens
from kvattn.recompute import recompute
from pallas_kernels import KV, Leaf
from sharding import merge_softmax, whole

SCORE_BYTES = 1 << 30  # scores that one chip holds at once; more are made block by block
UNROLLED_BLOCKS = 32


class Operand(NamedTuple):
    """One segment ready for a kernel: k[B,K,S,H], v[B,M,S,V] (arrays, or Leafs of a cache: codes, lanes), mask
    bool[B,T,S], the key tokens, whether S may be split over chips, and whether the keys are the queries' own tokens in
    order, so that none sees a later one. `kv`: a cache as decode kernels read it, pages not gathered; None for tokens
    that are in no cache, and where keys or values must be made from what is stored. k and v are then not computed
    unless they are used (under jit)."""

    k: jax.Array | Leaf
    v: jax.Array | Leaf
    mask: jax.Array
    tokens: Tokens
    split: bool = False
    own: bool = False
    kv: KV | None = None


@dataclasses.dataclass(frozen=True)
class Kernel:
    supports: Callable[[ModelConfig], str | None]
    run: Callable[..., jax.Array]


def attention(cfg: ModelConfig, layer: int, q: jax.Array, q_tokens: Tokens, operands: list[Operand]) -> jax.Array:
    """Attention of one layer with the kernel that cfg names: [B,T,N,V] in q's dtype."""
    return KERNELS[cfg.kernel].run(cfg, layer, q, q_tokens, operands).astype(q.dtype)


def _xla(cfg: ModelConfig, layer: int, q: jax.Array, q_tokens: Tokens, operands: list[Operand]) -> jax.Array:
    """The reference. Under differentiation the scores are recomputed, not kept: O(T) memory per head kept."""

    @recompute(lambda cotangent: cotangent.out[..., :1])
    def partial(q, kv, mask):
        return attend_partial(q, *kv, mask, scale=cfg.scale, cap=cfg.attn_soft_cap)

    together = merge([_in_blocks(partial, q, op) for op in operands])
    if not any(op.split for op in operands):
        return together.out
    if len(operands) > 1 and whole("cache_length", 1) > 1:
        raise UserError("a ring whose slots are split over chips takes one token at a time; prefill it in one pass, or "
                        "use a full cache or a layout without by_seq.")
    return merge_softmax(*together, "cache_length", _STATS, _OUT)


def _in_blocks(partial: Callable, q: jax.Array, op: Operand) -> Partial:
    """partial(q, (k, v), mask) in blocks of queries where its scores, f32 [B,N,T,S], would be large; with keys in the
    queries' own order, a block reads those up to its own end."""
    batch, length, heads = q.shape[:3]
    blocks = 1
    while 4 * batch * heads * length * op.mask.shape[2] > blocks * SCORE_BYTES and length % (2 * blocks) == 0:
        blocks *= 2
    if blocks == 1:
        return partial(q, (op.k, op.v), op.mask)
    size = length // blocks
    if op.own and blocks <= UNROLLED_BLOCKS:
        parts = []
        for start in range(0, length, size):
            end = start + size
            mine = partial(q[:, start:end], (op.k[:, :, :end], op.v[:, :, :end]), op.mask[:, start:end, :end])
            parts.append(mine)
        return Partial(*(jnp.concatenate(xs, axis=1) for xs in zip(*parts, strict=True)))

    def one(i):
        cut = [jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=1) for x in (q, op.mask)]
        return partial(cut[0], (op.k, op.v), cut[1])

    out = jax.lax.map(one, jnp.arange(blocks))
    return Partial(*(x.swapaxes(0, 1).reshape(x.shape[1], length, *x.shape[3:]) for x in out))


_STATS = ("attn_batch", "act_length", "attn_heads", "act_head_dim")
_OUT = ("attn_batch", "act_length", "attn_out_heads", "act_head_dim")


def _cudnn_supports(cfg: ModelConfig) -> str | None:
    if cfg.n_k_heads != cfg.n_v_heads or cfg.head_dim != cfg.v_head_dim:
        return "cuDNN needs K and V of equal heads and width"
    if cfg.attn_soft_cap:
        return "cuDNN has no attention soft cap"
    if any(mask.sinks for mask in cfg.masks):
        return "cuDNN has no attention sinks"
    if cfg.head_dim % 8 or cfg.head_dim > 256:
        return f"cuDNN needs head_dim divisible by 8 and at most 256, not {cfg.head_dim}"
    return None


def _cudnn(cfg: ModelConfig, layer: int, q: jax.Array, q_tokens: Tokens, operands: list[Operand]) -> jax.Array:
    """cuDNN flash attention: one segment, bf16 or f16, queries that either start at position 0 or are one token."""
    if jax.default_backend() != "gpu":
        raise UserError(f"model.kernel is 'cudnn' but the platform is {jax.default_backend()}; use xla.")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise UserError(f"model.kernel is 'cudnn' with {q.dtype} activations; use bfloat16 or kernel xla.")
    if len(operands) != 1 or q_tokens.segments is not None:
        raise UserError("model.kernel is 'cudnn', which has no packed segments and no chunked ring prefill; use xla.")
    op, length = operands[0], q.shape[1]
    if isinstance(op.k, Leaf) or isinstance(op.v, Leaf):
        raise UserError("model.kernel is 'cudnn', which reads rows of bfloat16; use cache.dtype bfloat16 with "
                        "cache.layout rows, or kernel xla.")
    k, v = op.k.swapaxes(1, 2), op.v.swapaxes(1, 2)  # cuDNN's layout is [B,S,K,H]
    if length == 1:
        bias_mask = op.mask[:, None, :, :]
        return jax.nn.dot_product_attention(q, k, v, mask=bias_mask, scale=cfg.scale, implementation="cudnn")
    if length != op.k.shape[2]:
        raise UserError("model.kernel is 'cudnn', which prefills from an empty cache only; use xla for chunks.")
    window = cfg.mask(layer).window
    lengths = (op.tokens.positions >= 0).sum(1, dtype=jnp.int32)
    return jax.nn.dot_product_attention(
        q, k, v, scale=cfg.scale, is_causal=True, key_value_seq_lengths=lengths, query_seq_lengths=lengths,
        local_window_size=(window - 1, 0) if window else None, implementation="cudnn",
    )


KERNELS: dict[str, Any] = {
    "xla": Kernel(lambda cfg: None, _xla),
    "cudnn": Kernel(_cudnn_supports, _cudnn),
}
