"""Axis E: what computes attention. Kernels are chosen by name; what one cannot serve raises, with the reason.

    model.kernel          a pass's own tokens (training, first prefill): KERNELS, see flash.py
    model.decode_kernel   a pass of at most STEP_TOKENS tokens over a cache: DECODERS, see step.py and pallas_kernels/

A longer chunk of a prefill, over a cache that holds tokens already, is computed by xla: the reference, in blocks.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvattn.attention import flash
from kvattn.attention.core import Partial, attend_partial, merge
from kvattn.attention.step import STEP_TOKENS, step
from kvattn.config import ModelConfig
from kvattn.errors import UserError
from kvattn.masks import Tokens
from kvattn.rematerialise import recompute
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
    """`supports(cfg)` -> None or why not, asked when a config is validated; run(cfg, layer, q, q_tokens, op) of the
    pass's own tokens -> [B,T,N,V], None for the reference."""

    supports: Callable[[ModelConfig], str | None]
    run: Callable[..., jax.Array] | None


def attention(cfg: ModelConfig, layer: int, q: jax.Array, q_tokens: Tokens, operands: list[Operand]) -> jax.Array:
    """Attention of one layer with the kernels that cfg names: [B,T,N,V] in q's dtype."""
    own = KERNELS[cfg.kernel].run
    if own is not None and not any(op.split for op in operands):
        return own(cfg, layer, q, q_tokens, *operands).astype(q.dtype)
    return _merged(cfg, layer, q, q_tokens, operands).astype(q.dtype)


def _merged(cfg: ModelConfig, layer: int, q: jax.Array, q_tokens: Tokens, operands: list[Operand]) -> jax.Array:
    """Each operand by the reference, or a cache by the decode kernel, joined. Under differentiation the reference's
    scores are recomputed, not kept: O(T) memory per head kept."""

    @recompute(lambda cotangent: cotangent.out[..., :1])
    def partial(q, kv, mask):
        return attend_partial(q, *kv, mask, scale=cfg.scale, cap=cfg.attn_soft_cap)

    kernel = cfg.decode_kernel != "xla" and q.shape[1] <= STEP_TOKENS
    parts = []
    for op in operands:
        if kernel and op.split:
            parts.append(step(cfg, layer, q, q_tokens.positions, op.kv))
        else:
            parts.append(_in_blocks(partial, q, op))
    together = merge(parts)
    if not any(op.split for op in operands):
        return together.out
    if len(operands) > 1 and whole("cache_length", 1) > 1:
        raise UserError(
            "a ring whose slots are split over chips takes one token at a time; prefill it in one pass, or "
            "use a full cache or a layout without by_seq."
        )
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


KERNELS: dict[str, Kernel] = {
    "xla": Kernel(lambda cfg: None, None),
    "cudnn": Kernel(flash.cudnn_supports, flash.cudnn),
    "splash": Kernel(flash.splash_supports, flash.splash),
    "tokamax": Kernel(flash.tokamax_supports, flash.tokamax),
}
