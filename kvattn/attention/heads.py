"""Axis A, value `heads`: plain multi-head projections with free head counts.

MHA (N = K = M), GQA (K = M < N, arXiv 2305.13245), MQA (K = M = 1, arXiv 1911.02150), SQA (fewer query heads,
arXiv 2510.01817), different numbers and widths of K and V heads (DiffQKV, arXiv 2501.13629) and tied K = V are
values of one parametrisation: q[D,N,H] k[D,K,H] v[D,M,V] o[N,V,D].
"""

from typing import Any

import jax
import jax.numpy as jnp

from kvattn.cache.base import Cache, kv
from kvattn.cache.quantized import cast, decode
from kvattn.config import ModelConfig
from kvattn.layers import BLOCK, dense, rms_norm, rope_table, rotate
from kvattn.spec import ParamSpec
from pallas_kernels import KV
from sharding import reshard


def param_specs(cfg: ModelConfig, layer: int) -> dict[str, Any]:
    """Parameters of one layer; k, v and their norms and biases exist in owner layers only."""
    d, n, k, m, h, v = cfg.d_model, cfg.n_heads, cfg.n_k_heads, cfg.n_v_heads, cfg.head_dim, cfg.v_head_dim
    owner, qk = cfg.sources[layer] == layer, cfg.qk_norm
    start = "zeros" if cfg.norm_offset else "ones"

    def norm(heads: int, axis: str) -> dict[str, ParamSpec]:
        if qk == "head":
            return {"scale": ParamSpec((h,), ("head_dim",), start)}
        return {"scale": ParamSpec((heads, h), (axis, "head_dim"), start)}

    specs: dict[str, Any] = {
        "q": ParamSpec((d, n, h), ("embed", "q_heads", "head_dim"), fan_in=d),
        "o": ParamSpec((n, v, d), ("q_heads", "value_dim", "embed"), fan_in=n * v),
    }
    if cfg.qkv_bias:
        specs["q_bias"] = ParamSpec((n, h), ("q_heads", "head_dim"), "zeros")
    if cfg.o_bias:
        specs["o_bias"] = ParamSpec((d,), ("norm",), "zeros")
    if qk != "none":
        specs["q_norm"] = norm(n, "q_heads")
    if owner:
        specs["k"] = ParamSpec((d, k, h), ("embed", "k_heads", "head_dim"), fan_in=d)
        if cfg.qkv_bias:
            specs["k_bias"] = ParamSpec((k, h), ("k_heads", "head_dim"), "zeros")
        if qk != "none":
            specs["k_norm"] = norm(k, "k_heads")
    if owner and not cfg.tied_kv:
        specs["v"] = ParamSpec((d, m, v), ("embed", "v_heads", "value_dim"), fan_in=d)
        if cfg.qkv_bias:
            specs["v_bias"] = ParamSpec((m, v), ("v_heads", "value_dim"), "zeros")
    return specs


def kv_spec(cfg: ModelConfig) -> dict[str, tuple[int, int]]:
    """Leaf name -> (heads, dim) of what one token leaves in an owner's cache."""
    if cfg.tied_kv:
        return {"k": (cfg.n_k_heads, cfg.head_dim)}  # kept before rotation: it is also the value
    return {"k": (cfg.n_k_heads, cfg.head_dim), "v": (cfg.n_v_heads, cfg.v_head_dim)}


_Q = ("act_batch", "act_length", "act_q_heads", "act_head_dim")
_K = ("k_batch", "act_length", "act_k_heads", "act_head_dim")
_V = ("v_batch", "act_length", "act_v_heads", "act_head_dim")


def kv_axes(cfg: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Leaf name -> logical axes of what `entries` returns."""
    swap = {name: (axes[0], axes[2], axes[1], axes[3]) for name, axes in (("k", _K), ("v", _V))}
    return {name: swap[name] for name in kv_spec(cfg)}


def queries(params: dict[str, Any], cfg: ModelConfig, x: jax.Array, table: Any) -> jax.Array:
    """x[B,T,D] -> q[B,T,N,H], normalised and rotated."""
    q = dense(x, params["q"], params.get("q_bias"), ("embed", "q_heads", "head_dim"), BLOCK, _Q)
    return rotate(_norm(q, params.get("q_norm"), cfg, "q_heads", "act_q_heads"), table)


def _norm(x: jax.Array, params: Any, cfg: ModelConfig, stored: str, name: str) -> jax.Array:
    """The q/k norm: over H of each head, or over all heads x H."""
    if params is None:
        return x
    if cfg.qk_norm == "head":
        return rms_norm(x, params["scale"], cfg.norm_eps, cfg.norm_offset)
    scale = reshard(params["scale"], (stored, "head_dim"), (name, "head_dim"))
    return rms_norm(x, scale, cfg.norm_eps, cfg.norm_offset, name)


def entries(params: dict[str, Any], cfg: ModelConfig, x: jax.Array, table: Any) -> dict[str, jax.Array]:
    """x[B,T,D] -> what is cached: {k: [B,K,T,H] (rotated, unless tied), v: [B,M,T,V]}."""
    k = dense(x, params["k"], params.get("k_bias"), ("embed", "k_heads", "head_dim"), BLOCK, _K)
    k = _norm(k, params.get("k_norm"), cfg, "k_heads", "act_k_heads")
    if cfg.tied_kv:
        return {"k": k.swapaxes(1, 2)}
    v = dense(x, params["v"], params.get("v_bias"), ("embed", "v_heads", "value_dim"), BLOCK, _V)
    return {"k": rotate(k, table).swapaxes(1, 2), "v": v.swapaxes(1, 2)}


def expand(cfg: ModelConfig, layer: int, stored: dict[str, Any], positions: jax.Array, dtype: Any):
    """Stored entries [B,heads,S,dim] at positions[B,S] -> k[B,K,S,H], v[B,M,S,V] in `dtype`; Leafs stay Leafs, their
    codes cast. Tied keys are dequantised: they are rotated here."""
    if not cfg.tied_kv:
        return cast(stored["k"], dtype), cast(stored["v"], dtype)
    k = decode(stored["k"], dtype)
    table = rope_table(cfg.rope(layer), cfg.head_dim, jnp.maximum(positions, 0))
    return rotate(k, table, head_axis=1), k


def kernel_kv(cfg: ModelConfig, cache: Cache) -> KV | None:
    """The cache as a decode kernel reads it; None where entries are not yet keys and values (tied: not yet rotated)."""
    return None if cfg.tied_kv else kv(cache)


def output(params: dict[str, Any], cfg: ModelConfig, context: jax.Array) -> jax.Array:
    """Attention result [B,T,N,V] -> [B,T,D], its sum over the chips that split N still open."""
    return dense(context, params["o"], params.get("o_bias"), ("q_heads", "value_dim", "embed"), _Q, None)
