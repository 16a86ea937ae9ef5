"""Norms, MLPs, rotary embedding, embedding and unembedding: the parts of a block that are not attention.

Statistics (norms, softmax, logits) are float32; everything else has the parameters' dtype.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from kvattn.config import ModelConfig, RopeConfig
from kvattn.rematerialise import recompute
from kvattn.spec import ParamSpec
from kvattn.typed import shaped
from sharding import matmul, mean, once, reshard, take_rows

# Layouts of activations [B,T,D] and [B,T,F], by the logical axes of sharding/layout/ (rules.py, layouts.py).
RESIDUAL = ("res_batch", "act_length", "res_embed")  # between blocks
BLOCK = ("act_batch", "act_length", "act_embed")  # what a block's matmuls read
HIDDEN = ("act_batch", "act_length", "act_mlp")
LOGITS_IN = ("logit_batch", "act_length", "logit_embed")
LOGITS = ("logit_batch", "act_length", "act_vocab")

_ACTIVATIONS = {
    "swiglu": jax.nn.silu,
    "geglu": lambda x: jax.nn.gelu(x, approximate=False),
    "geglu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}
GATED = ("swiglu", "geglu", "geglu_tanh")


# --- norms ---------------------------------------------------------------------------------------------


def norm_specs(cfg: ModelConfig) -> dict[str, ParamSpec]:
    """Scale [D] (and bias [D] for layernorm) of one norm over the model width."""
    start = "zeros" if cfg.norm_offset else "ones"
    specs = {"scale": ParamSpec((cfg.d_model,), ("norm",), start)}
    if cfg.norm == "layernorm":
        specs["bias"] = ParamSpec((cfg.d_model,), ("norm",), "zeros")
    return specs


@shaped
def norm(params: dict[str, Any], cfg: ModelConfig, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """RMSNorm or LayerNorm of x[B,T,D] over D, in float32, returned in x's dtype."""
    scale, bias = (reshard(params[n], ("norm",), ("res_embed",)) if n in params else None for n in ("scale", "bias"))
    if cfg.norm == "rmsnorm":
        return rms_norm(x, scale, cfg.norm_eps, cfg.norm_offset, "res_embed")

    @recompute(lambda cotangent: cotangent)
    def layer_norm(x, weights, _):
        scale, bias = weights
        y = x.astype(jnp.float32)
        y = y - mean(y, (-1,), "res_embed")
        y = y * jax.lax.rsqrt(mean(jnp.square(y), (-1,), "res_embed") + cfg.norm_eps)
        return (y * _like(scale, y) + _like(bias, y)).astype(x.dtype)

    return layer_norm(x, (scale, bias), None)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, offset: float = 0.0, name: str | None = None) -> jax.Array:
    """x / rms(x) * (offset + scale), the mean square taken over the dims that `scale` has; `name`: the logical axis
    of the first of them, where it may be split."""
    axes = tuple(range(x.ndim - scale.ndim, x.ndim))

    @recompute(lambda cotangent: cotangent)
    def normalised(x, scale, _):
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(mean(jnp.square(y), axes, name) + eps)
        return (y * (offset + _like(scale, y))).astype(x.dtype)

    return normalised(x, scale, None)


def _like(scale: jax.Array, y: jax.Array) -> jax.Array:
    """A per-feature vector or matrix in y's dtype with leading ones up to y's rank."""
    return scale.astype(y.dtype).reshape((1,) * (y.ndim - scale.ndim) + scale.shape)


# --- dense ---------------------------------------------------------------------------------------------


def dense(
    x: jax.Array,
    w: Any,
    bias: jax.Array | None,
    axes: tuple[str, ...],
    have: tuple[str, ...],
    want: tuple[str, ...] | None,
) -> jax.Array:
    """x[B,T,*in] times w[*in,*out] plus bias[*out], as one [rows, in] x [in, out] matmul.

    `axes`: w's logical axes, `have`: x's, `want`: the result's; None leaves the sum over the chips that split w's
    first dim open (sharding.reduce ends it). w is an array or an int8 weight (kvattn.int8_weights).
    """
    y = matmul(x, w, axes, have, want)
    if bias is None:
        return y
    if want is None:
        return y + _like(once(reshard(bias, ("norm",), ("act_embed",)), axes[0]), y)
    return y + _like(reshard(bias, axes[len(have) - 2 :], want[2:]), y)


def mlp_specs(cfg: ModelConfig) -> dict[str, ParamSpec]:
    """up[D,F] (and gate[D,F] when gated), down[F,D], their biases with cfg.mlp_bias."""
    d, f = cfg.d_model, cfg.d_ff
    specs = {"up": ParamSpec((d, f), ("embed", "mlp"), fan_in=d), "down": ParamSpec((f, d), ("mlp", "embed"), fan_in=f)}
    if cfg.mlp in GATED:
        specs["gate"] = ParamSpec((d, f), ("embed", "mlp"), fan_in=d)
    if cfg.mlp_bias:
        specs["up_bias"] = ParamSpec((f,), ("mlp",), "zeros")
        specs["down_bias"] = ParamSpec((d,), ("norm",), "zeros")
        if cfg.mlp in GATED:
            specs["gate_bias"] = ParamSpec((f,), ("mlp",), "zeros")
    return specs


@shaped
def mlp(params: dict[str, Any], cfg: ModelConfig, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """act(x gate) * (x up) down, or act(x up) down when not gated; x[B,T,D] -> [B,T,D], its sum over the chips that
    split F still open.

    The backward pass keeps the two [B,T,F] products and recomputes what the activation makes of them.
    """
    into, act = ("embed", "mlp"), _ACTIVATIONS[cfg.mlp]
    hidden = [dense(x, params["up"], params.get("up_bias"), into, BLOCK, HIDDEN)]
    if cfg.mlp in GATED:
        hidden.append(dense(x, params["gate"], params.get("gate_bias"), into, BLOCK, HIDDEN))

    @recompute(lambda cotangent: cotangent[..., :1])
    def contract(hidden, weights, _):
        h = act(hidden[1]) * hidden[0] if len(hidden) == 2 else act(hidden[0])
        return dense(h, *weights, ("mlp", "embed"), HIDDEN, None)

    return contract(hidden, (params["down"], params.get("down_bias")), None)


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(x / cap); identity when cap is 0."""
    return cap * jnp.tanh(x / cap) if cap else x


# --- rotary position embedding -------------------------------------------------------------------------


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Angular frequencies [R/2] in radians per position (float64), and the factor on cos and sin.

    llama3: Llama 3.1's piecewise interpolation; yarn: arXiv 2309.00071, NTK-by-parts with its
    attention factor.
    """
    dim = rope.dim or head_dim
    freq = rope.theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if rope.scaling == "linear":
        return freq / rope.factor, 1.0
    if rope.scaling == "llama3":
        wavelength = 2 * np.pi / freq
        low, high = rope.original_length / rope.low_freq_factor, rope.original_length / rope.high_freq_factor
        blend = (rope.original_length / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        middle = (1 - blend) * freq / rope.factor + blend * freq
        return np.where(wavelength > low, freq / rope.factor, np.where(wavelength < high, freq, middle)), 1.0
    if rope.scaling == "yarn":

        def dim_of(rotations: float) -> float:
            return dim * math.log(rope.original_length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

        low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)
        factor = rope.attention_factor or (0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0)
        return freq / rope.factor * ramp + freq * (1 - ramp), factor
    return freq, 1.0


def rope_table(rope: RopeConfig | None, head_dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array] | None:
    """cos, sin [...,R/2] float32 at absolute positions[...]; None for no rotation."""
    if rope is None:
        return None
    freq, factor = rope_frequencies(rope, head_dim)
    lead = (1,) * positions.ndim
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(freq, jnp.float32).reshape(*lead, -1)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array] | None, head_axis: int | None = 2) -> jax.Array:
    """Rotates the first R dims of x (heads at `head_axis`, dims last), pairing dim i with i + R/2. head_axis None: the
    table has a dim for x's heads already."""
    if table is None:
        return x
    cos, sin = table if head_axis is None else (jnp.expand_dims(t, head_axis) for t in table)
    half = cos.shape[-1]
    y = x.astype(jnp.float32)
    a, b, rest = y[..., :half], y[..., half : 2 * half], y[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1).astype(x.dtype)


# --- ends ----------------------------------------------------------------------------------------------


@shaped
def embed(params: dict[str, Any], cfg: ModelConfig, tokens: Int32[Array, "B T"]) -> Float[Array, "B T D"]:
    """tokens[B,T] int32 -> [B,T,D] in the table's dtype, times cfg.embed_scale."""
    x = take_rows(params["embed"]["table"], tokens, RESIDUAL)
    return x * jnp.asarray(cfg.embed_scale, x.dtype) if cfg.embed_scale != 1.0 else x


@shaped
def unembed(params: dict[str, Any], cfg: ModelConfig, x: Float[Array, "B T D"]) -> Float32[Array, "B T W"]:
    """x[B,T,D] -> logits[B,T,W] float32, soft-capped by cfg.logit_soft_cap."""
    x = reshard(x, RESIDUAL, LOGITS_IN)
    tied = cfg.tied_embeddings
    w = params["embed" if tied else "unembed"]["table"]
    logits = matmul(x, w, ("embed", "vocab"), LOGITS_IN, LOGITS, jnp.float32, transposed=tied)
    return soft_cap(logits, cfg.logit_soft_cap)
