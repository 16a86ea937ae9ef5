"""Training losses: next-token cross-entropy, z-loss, and distillation, without the [B,T,W] logits.

At W = 49152 the logits of 1024 tokens are 200 MB in float32, and plain automatic differentiation keeps
several copies. Here the head runs over chunks of T: each chunk's logits, loss and gradient (with respect
to the hidden states and the unembedding) are made in one go and the logits dropped, so the backward pass
recomputes nothing. The teacher's logits live and die in the same chunk.

All sums are divided by one number, the count of unmasked tokens of the whole optimizer step (every
micro-batch, every device), so neither accumulation nor sharding changes the loss.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kvattn import model
from kvattn.config import DistillConfig, ModelConfig, TrainConfig

# float32 logits held at once, per shard of the batch: 64 MiB where memory is slow, 512 MiB elsewhere.
LOGITS_CPU = 1 << 24
LOGITS_ACCELERATOR = 1 << 27


class Teacher(NamedTuple):
    """A frozen model to distil from: its config (static) and parameters."""

    model: ModelConfig
    params: Any


def cast(params: Any, dtype: Any) -> Any:
    """Floating leaves in `dtype`; the gradient of a cast is cast back, so masters keep float32 gradients."""
    return jax.tree.map(lambda p: p.astype(dtype) if jnp.issubdtype(p.dtype, jnp.floating) else p, params)


def loss_and_metrics(
    params: Any,
    cfg: ModelConfig,
    train: TrainConfig,
    batch: dict[str, jax.Array],
    count: jax.Array,
    *,
    teacher: Teacher | None = None,
    shards: int = 1,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(loss, parts) of one micro-batch, float32 scalars; micro-batches add up.

    `params` are float32 masters, computed with in train.compute_dtype. `batch`: tokens, targets,
    segment_ids, positions int32 [B,T], loss_mask float32 [B,T]. `count` is the number of unmasked tokens
    of the optimizer step; `shards` the number of devices the batch is split over.

    loss = lm_weight * CE + z_loss * mean(lse^2) + logit_kl * KL + attention_mse * MSE; parts holds those of
    `ce`, `z`, `kl`, `attention_mse` that are on, unweighted.
    """
    distil, dtype = train.distill, jnp.dtype(train.compute_dtype)
    inputs = model.Inputs(batch["tokens"], batch["positions"], batch["segment_ids"])
    collect = ("attention",) if teacher is not None and distil.attention_mse else ()
    h, _, collected = model.hidden(cast(params, dtype), cfg, inputs, collect=collect)
    h_teacher, taught = None, {}
    if teacher is not None:
        h_teacher, _, taught = model.hidden(teacher.params, teacher.model, inputs, collect=collect)
        h_teacher = jax.lax.stop_gradient(h_teacher)
    limit = LOGITS_CPU if jax.default_backend() == "cpu" else LOGITS_ACCELERATOR
    rows = max(h.shape[0] // shards, 1)
    head = functools.partial(_head, cfg, train, teacher.model if teacher else None, dtype)
    parts = over_chunks(
        head,
        _chunk_length(h.shape[1], limit // (rows * cfg.vocab_size)),
        ends(params),
        h,
        (batch["targets"], batch["loss_mask"], h_teacher),
        (count, ends(teacher.params) if teacher else None),
    )
    loss = parts.pop("loss")
    if collect:
        mse = attention_mse(collected["attention"], taught["attention"], batch["loss_mask"], count)
        parts["attention_mse"] = mse
        loss = loss + distil.attention_mse * mse
    return loss, parts


def ends(params: Any) -> dict[str, Any]:
    """The parameters that `model.unembed` reads."""
    return {name: params[name] for name in ("embed", "unembed") if name in params}


def attention_mse(
    student: tuple[jax.Array, ...], teacher: tuple[jax.Array, ...], mask: jax.Array, count: jax.Array
) -> jax.Array:
    """Mean over layers, unmasked tokens and D of the squared difference of attention outputs [B,T,D]."""
    total = jnp.zeros((), jnp.float32)
    for ours, theirs in zip(student, teacher, strict=True):
        gap = ours.astype(jnp.float32) - jax.lax.stop_gradient(theirs).astype(jnp.float32)
        total += jnp.sum(jnp.square(gap).mean(-1) * mask)
    return total / (len(student) * count)


def _head(cfg, train, teacher_cfg, dtype, params, h, per_token, shared):
    """(loss, parts) of h[B,C,D], one chunk of positions."""
    targets, mask, h_teacher = per_token
    count, teacher_params = shared
    logits = model.unembed(cast(params, dtype), cfg, h)
    lse = jax.nn.logsumexp(logits, axis=-1)
    ce = jnp.sum((lse - _pick(logits, targets)) * mask) / count
    parts = {"ce": ce}
    loss = train.distill.lm_weight * ce
    if train.z_loss:
        parts["z"] = jnp.sum(jnp.square(lse) * mask) / count
        loss += train.z_loss * parts["z"]
    if teacher_params is not None and train.distill.logit_kl:
        theirs = model.unembed(teacher_params, teacher_cfg, h_teacher)
        kl = teacher_kl(jax.lax.stop_gradient(theirs), logits, train.distill)
        parts["kl"] = jnp.sum(kl * mask) / count
        loss += train.distill.logit_kl * parts["kl"]
    return loss, parts


def teacher_kl(theirs: jax.Array, ours: jax.Array, distil: DistillConfig) -> jax.Array:
    """KL(teacher || student) [B,T] of logits [B,T,W] softened by the temperature t, times t^2 so that its
    gradient does not shrink with t (Hinton et al. 2015, arXiv:1503.02531, section 2)."""
    t = distil.temperature
    log_p = jax.nn.log_softmax(theirs / t, axis=-1)
    log_q = jax.nn.log_softmax(ours / t, axis=-1)
    return t * t * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _pick(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """logits[b,t,targets[b,t]] as a masked sum: its gradient is no scatter, and W may be sharded."""
    ids = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    return jnp.sum(jnp.where(ids == targets[..., None], logits, 0.0), axis=-1)


# --- chunks over positions -----------------------------------------------------------------------------


def _chunk_length(length: int, most: int) -> int:
    """The number of positions per chunk: as equal as can be, at most `most` (at least 1)."""
    chunks = math.ceil(length / max(min(most, length), 1))
    return math.ceil(length / chunks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def over_chunks(f, size: int, params: Any, h: jax.Array, per_token: Any, shared: Any) -> dict[str, jax.Array]:
    """Sum over chunks of T of f(params, h[B,C,D], per_token[B,C,...], shared) -> (loss, parts), as
    {"loss": loss, **parts}. Differentiable in `params` and `h` through "loss" alone; the gradient is made in
    the forward pass, chunk by chunk. The tail is padded with zeros, so f must weigh tokens by a mask."""
    return _sum_chunks(f, size, params, h, per_token, shared, gradient=False)[0]


def _sum_chunks(f, size, params, h, per_token, shared, gradient):
    length = h.shape[1]
    chunks = math.ceil(length / size)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, chunks * size - length)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, size, *x.shape[2:]), 1, 0)

    def one(h_chunk, tokens_chunk):
        if not gradient:
            loss, parts = f(params, h_chunk, tokens_chunk, shared)
            return ({"loss": loss, **parts}, None), None
        (loss, parts), (d_params, d_h) = jax.value_and_grad(f, (0, 1), has_aux=True)(
            params, h_chunk, tokens_chunk, shared
        )
        return ({"loss": loss, **parts}, d_params), d_h

    if chunks == 1:
        (parts, d_params), d_h = one(h, per_token)
        return parts, d_params, d_h
    pieces = (split(h), jax.tree.map(split, per_token))
    shapes = jax.eval_shape(one, *jax.tree.map(lambda x: x[0], pieces))[0]
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def body(carry, piece):
        sums, d_h = one(*piece)
        return jax.tree.map(jnp.add, carry, sums), d_h

    (parts, d_params), d_h = jax.lax.scan(body, zeros, pieces)
    if gradient:
        d_h = jnp.moveaxis(d_h, 0, 1).reshape(h.shape[0], chunks * size, *h.shape[2:])[:, :length]
    return parts, d_params, d_h


def _forward(f, size, params, h, per_token, shared):
    parts, d_params, d_h = _sum_chunks(f, size, params, h, per_token, shared, gradient=True)
    return parts, (d_params, d_h)


def _backward(f, size, residuals, cotangent):
    d_params, d_h = residuals
    scale = cotangent["loss"]
    scaled = jax.tree.map(lambda g: g * scale.astype(g.dtype), (d_params, d_h))
    return (*scaled, None, None)


over_chunks.defvjp(_forward, _backward)
