"""Attention of a pass's own tokens (training, first prefill) by kernels of other people's making.

    cudnn     NVIDIA's flash attention through jax.nn: causal or windowed, bf16 or f16
    splash    jax's TPU kernel: causal or windowed, soft cap, packed segments, its own backward pass
    tokamax   the op of that package (Mosaic GPU, splash, ...), where it is installed

Each has `..._supports(shape, mask) -> None or why not`, asked of every layer; what only shows with the arrays raises
UserError as they are traced. A pass over a cache is the decode kernels' work (pallas_kernels/). `op` is the one Operand
of the pass, its K and V whole arrays.
"""

import functools

import jax
import jax.numpy as jnp

from kvattn.attention import target
from kvattn.attention.operand import Operand, SoftmaxShape
from kvattn.config import MaskConfig
from kvattn.errors import UserError
from kvattn.masks import Tokens
from pallas_kernels.tpu.tuning import LANES
from sharding import per_chip

SPLASH_BLOCK = 1024  # queries and keys of a block: above, a v5e's 16 MiB of scoped VMEM do not hold them
SPLASH_COMPUTE = 512

_Q = ("own_batch", "act_length", "own_heads", "act_head_dim")
_IDS = ("own_batch", "act_length")


def _axes(op: Operand, *last: tuple) -> tuple:
    """Logical axes of (q, k, v, last): a chip holds the K/V heads of its query heads, or the only one."""
    split = ["own_heads" if x.heads > 1 else None for x in (op.k, op.v)]
    kv = [("own_batch", heads, "act_length", "act_head_dim") for heads in split]
    return (_Q, *kv, *last)


def _segment_ids(tokens: Tokens) -> jax.Array:
    """ids[B,T] int32 >= 1 of real tokens, 0 of padding: attention stays within one id."""
    ids = 1 if tokens.segments is None else tokens.segments + 1
    return jnp.where(tokens.positions >= 0, ids, 0).astype(jnp.int32)


# --- cuDNN ----------------------------------------------------------------------------------------------


def cudnn_supports(shape: SoftmaxShape, mask: MaskConfig) -> str | None:
    if shape.k_heads != shape.v_heads or shape.key_dim != shape.value_dim:
        return "cuDNN needs K and V of equal heads and width"
    if shape.cap:
        return "cuDNN has no attention soft cap"
    if mask.sinks:
        return "cuDNN has no attention sinks"
    if shape.key_dim % 8 or shape.key_dim > 256:
        return f"cuDNN needs head_dim divisible by 8 and at most 256, not {shape.key_dim}"
    return _causal("cuDNN", mask)


def _causal(name: str, mask: MaskConfig) -> str | None:
    return None if mask.kind == "causal" else f"{name} is called for causal masks, not {mask.kind!r}"


def cudnn(q_tokens: Tokens, op: Operand, mask: MaskConfig) -> jax.Array:
    """q[B,T,N,H] -> [B,T,N,H]. Rows may be padded on either side: they are turned so that padding comes last, as cuDNN
    takes a length a row. Raises UserError off the GPU, for float32, and for packed segments."""
    target.need("model.kernel", "cudnn", "gpu")
    q, window = op.q, mask.window
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise UserError(f"model.kernel is 'cudnn' with {q.dtype} activations; use bfloat16 or kernel xla.")
    if q_tokens.segments is not None:
        raise UserError("model.kernel is 'cudnn', which has no packed segments; use xla, splash or tokamax.")

    def run(q, k, v, positions):
        live = positions >= 0
        lengths = live.sum(1, dtype=jnp.int32)
        at = jnp.arange(q.shape[1], dtype=jnp.int32)[None, :] + jnp.argmax(live, axis=1).astype(jnp.int32)[:, None]
        turn = functools.partial(_take, index=at % q.shape[1])
        q, k, v = turn(q), turn(k.swapaxes(1, 2)), turn(v.swapaxes(1, 2))
        out = jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=op.scale,
            is_causal=True,
            key_value_seq_lengths=lengths,
            query_seq_lengths=lengths,
            local_window_size=(window - 1, 0) if window else None,
            implementation="cudnn",
        )
        return _take(out, jnp.argsort(at % q.shape[1], axis=1))

    return per_chip(run, _axes(op, _IDS), _Q)(q, op.k.values, op.v.values, q_tokens.positions)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """x[B,T,...] with row b's tokens in the order index[b]."""
    return jnp.take_along_axis(x, index[:, :, None, None], axis=1)


# --- splash ---------------------------------------------------------------------------------------------


def splash_supports(shape: SoftmaxShape, mask: MaskConfig) -> str | None:
    if shape.k_heads != shape.v_heads:
        return "splash needs K and V of equal heads"
    if mask.sinks:
        return "splash sees indices, not positions, so it has no attention-sink tokens"
    return _causal("splash", mask)


def splash(q_tokens: Tokens, op: Operand, mask: MaskConfig) -> jax.Array:
    """q[B,T,N,H] -> [B,T,N,V]; T is padded to a multiple of 128. Raises UserError off the TPU."""
    target.need("model.kernel", "splash", "tpu")
    static = {"scale": op.scale, "window": mask.window, "cap": op.cap, "interpret": bool(target.interpret())}
    kernel = functools.partial(_splash_rows, **static)
    return per_chip(kernel, _axes(op, _IDS), _Q)(op.q, op.k.values, op.v.values, _segment_ids(q_tokens))


def _splash_rows(q, k, v, ids, *, scale: float, window: int, cap: float, interpret: bool) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as lib

    length = q.shape[1]
    padded = -(-length // LANES) * LANES
    block = max(b for b in range(LANES, SPLASH_BLOCK + 1, LANES) if padded % b == 0)
    inner = block if block <= SPLASH_COMPUTE or block % SPLASH_COMPUTE else SPLASH_COMPUTE
    sizes = lib.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=inner,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=inner,
        use_fused_bwd_kernel=True,
    )
    shape = (padded, padded)
    seen = lib.LocalMask(shape, (window - 1, 0), 0) if window else lib.CausalMask(shape)
    op = lib.make_splash_mha(
        lib.MultiHeadMask([seen] * q.shape[2]),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=sizes,
        attn_logits_soft_cap=cap or None,
        interpret=interpret,
    )
    q = (q.astype(jnp.float32) * scale).astype(q.dtype).swapaxes(1, 2)
    wide = ((0, 0), (0, 0), (0, padded - length), (0, 0))
    q, k, v = (jnp.pad(x, wide) for x in (q, k, v))
    ids = jnp.pad(ids, ((0, 0), (0, padded - length)))
    out = jax.vmap(lambda q, k, v, i: op(q, k, v, segment_ids=lib.SegmentIds(i, i)))(q, k, v, ids)
    return out[:, :, :length].swapaxes(1, 2)


# --- tokamax --------------------------------------------------------------------------------------------


def tokamax_supports(shape: SoftmaxShape, mask: MaskConfig) -> str | None:
    if shape.k_heads != shape.v_heads:
        return "tokamax needs K and V of equal heads"
    return _causal("tokamax", mask)


def tokamax(q_tokens: Tokens, op: Operand, mask: MaskConfig) -> jax.Array:
    """q[B,T,N,H] -> [B,T,N,V] with the implementation tokamax prefers on the platform. Raises UserError where the
    package is not installed."""
    try:
        import tokamax as lib
    except ImportError as error:
        raise UserError("model.kernel is 'tokamax', which is not installed; pip install it, or use xla.") from error

    def run(q, k, v, seen):
        return lib.dot_product_attention(
            q,
            k.swapaxes(1, 2),
            v.swapaxes(1, 2),
            mask=seen,
            scale=op.scale,
            is_causal=True,
            logits_soft_cap=op.cap or None,
        )

    axes = _axes(op, (_IDS[0], None, _IDS[1], None))
    return per_chip(run, axes, _Q)(op.q, op.k.values, op.v.values, op.mask)
