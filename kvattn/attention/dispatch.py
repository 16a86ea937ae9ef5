"""Axis E: what computes attention. Kernels are chosen by name; what one cannot serve raises, with the reason.

    model.kernel          a pass's own tokens (training, first prefill): KERNELS, see flash.py
    model.decode_kernel   a pass of at most STEP_TOKENS tokens over a cache: DECODERS, see step.py and pallas_kernels/

A longer chunk of a prefill, over a cache that holds tokens already, is computed by xla: the reference, in blocks.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kvattn import cache as caches
from kvattn.attention import flash, layouts
from kvattn.attention.core import attend_partial, merge
from kvattn.attention.operand import Operand, SoftmaxShape
from kvattn.attention.step import DECODERS, STEP_TOKENS, reason_against, step
from kvattn.config import CacheConfig, MaskConfig, ModelConfig
from kvattn.config.check import choice, need
from kvattn.errors import UserError
from kvattn.masks import Tokens
from kvattn.rematerialise import recompute
from pallas_kernels import Leaf, Partial
from sharding import merge_softmax, whole

SCORE_BYTES = 1 << 30  # scores that one chip holds at once; more are made block by block
UNROLLED_BLOCKS = 32


@dataclasses.dataclass(frozen=True)
class Kernel:
    """`supports(shape, mask)` -> None or why not, asked by `gate`; run(q_tokens, op, mask) of the pass's own tokens ->
    [B,T,N,V], None for the reference."""

    supports: Callable[[SoftmaxShape, MaskConfig], str | None]
    run: Callable[[Tokens, Operand, MaskConfig], jax.Array] | None


KERNELS: dict[str, Kernel] = {
    "xla": Kernel(lambda shape, mask: None, None),
    "cudnn": Kernel(flash.cudnn_supports, flash.cudnn),
    "splash": Kernel(flash.splash_supports, flash.splash),
    "tokamax": Kernel(flash.tokamax_supports, flash.tokamax),
}


def gate(cfg: ModelConfig, store: CacheConfig | None = None, capacity: int = 0) -> None:
    """The second gate, before anything is allocated: can the kernels that cfg names serve its layers and, where a store
    is given, its caches of `capacity` tokens (0: not known)? Raises UserError with the reason."""
    choice(cfg.kernel, KERNELS, "model.kernel")
    choice(cfg.decode_kernel, DECODERS, "model.decode_kernel")
    for layer in range(cfg.n_layers) if cfg.layers else ():
        shape, groups = cfg.attention(layer).softmax(cfg), cfg.layer(layer).groups
        for mask in [group.mask for group in groups] or [cfg.mask(layer)]:
            reason = None if shape is None else KERNELS[cfg.kernel].supports(shape, mask)
            need(reason is None, f"model.kernel is {cfg.kernel!r}, which cannot serve this model: {reason}; use xla.")
    if store is None:
        return
    caches.check_store(cfg, store)
    reason = reason_against(cfg, store, max(capacity, 0))
    need(
        reason is None,
        f"model.decode_kernel is {cfg.decode_kernel!r}, which cannot read this cache ({(reason or '').rstrip('.')}); "
        "cache.multiple, page_size, dtype and layout decide.",
    )


def attention(
    cfg: ModelConfig, mask: MaskConfig, q_tokens: Tokens, operands: list[Operand], ordered: bool = False
) -> jax.Array:
    """Attention over the segments of one head group with the kernels that cfg names: [B,T,N,V] in q's dtype. `ordered`:
    own tokens are in order of position, so that none sees a later one."""
    own = KERNELS[cfg.kernel].run
    if own is not None and all(op.own for op in operands):
        (op,) = operands
        out = own(q_tokens, op, mask)
        return (out if op.finish is None else op.finish(out)).astype(op.q.dtype)
    return _merged(cfg, mask, q_tokens, operands, ordered).astype(operands[0].q.dtype)


def _merged(cfg: ModelConfig, mask: MaskConfig, q_tokens: Tokens, operands: list[Operand], ordered: bool) -> jax.Array:
    """Each operand by the reference, or a cache by the decode kernel, joined. Under differentiation the reference's
    scores are recomputed, not kept: O(T) memory per head kept."""
    parts = []
    for op in operands:
        if not op.own and cfg.decode_kernel != "xla" and op.q.shape[1] <= STEP_TOKENS:
            part = step(cfg.decode_kernel, op, q_tokens.positions, mask)
        else:
            part = _in_blocks(_reference(op.scale, op.cap), op, ordered)
        parts.append(part if op.finish is None else Partial(op.finish(part.out), part.max, part.sum))
    joined = merge(parts)
    if all(op.own for op in operands):
        return joined.out
    if len(operands) > 1 and whole("cache_length", 1) > 1:
        raise UserError(
            "a ring whose slots are split over chips takes one token at a time; prefill it in one pass, or "
            "use a full cache or a layout without by_seq."
        )
    return merge_softmax(*joined, "cache_length", layouts.CACHED, layouts.CACHED_OUT)


def _reference(scale: float, cap: float) -> Callable:
    @recompute(lambda cotangent: cotangent.out[..., :1])
    def partial(q, kv, mask):
        return attend_partial(q, *kv, mask, scale=scale, cap=cap)

    return partial


def _in_blocks(partial: Callable, op: Operand, ordered: bool) -> Partial:
    """partial(q, (k, v), mask) in blocks of queries where its scores, f32 [B,N,T,S], would be large; where keys are the
    queries' own tokens in order, a block reads the keys up to its own end."""
    q, k, v = op.q, op.k, op.v
    batch, length, heads = q.shape[:3]
    blocks = 1
    while 4 * batch * heads * length * op.mask.shape[3] > blocks * SCORE_BYTES and length % (2 * blocks) == 0:
        blocks *= 2
    if blocks == 1:
        return partial(q, (k, v), op.mask)
    size = length // blocks
    if ordered and op.own and blocks <= UNROLLED_BLOCKS:
        parts = []
        for start in range(0, length, size):
            end = start + size
            until = tuple(Leaf(x.values[:, :, :end]) for x in (k, v))
            parts.append(partial(q[:, start:end], until, op.mask[:, :, start:end, :end]))
        return Partial(*(jnp.concatenate(xs, axis=1) for xs in zip(*parts, strict=True)))

    def one(i):
        mine = jax.lax.dynamic_slice_in_dim(q, i * size, size, axis=1)
        return partial(mine, (k, v), jax.lax.dynamic_slice_in_dim(op.mask, i * size, size, axis=2))

    out = jax.lax.map(one, jnp.arange(blocks))
    return Partial(*(x.swapaxes(0, 1).reshape(x.shape[1], length, *x.shape[3:]) for x in out))
