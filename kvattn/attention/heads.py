"""Axis A, value `heads`: plain multi-head projections with free head counts.

MHA (N = K = M), GQA (K = M < N, arXiv 2305.13245), MQA (K = M = 1, arXiv 1911.02150), SQA (fewer query heads,
arXiv 2510.01817), different numbers and widths of K and V heads (DiffQKV, arXiv 2501.13629) and tied K = V are
values of one parametrisation: q[D,N,H] k[D,K,H] v[D,M,V] o[N,V,D].
"""

from typing import Any

import jax
import jax.numpy as jnp

from kvattn.config import ModelConfig
from kvattn.layers import dense, rms_norm, rope_table, rotate
from kvattn.spec import ParamSpec


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


def queries(params: dict[str, Any], cfg: ModelConfig, x: jax.Array, table: Any) -> jax.Array:
    """x[B,T,D] -> q[B,T,N,H], normalised and rotated."""
    q = dense(x, params["q"], params.get("q_bias"))
    if cfg.qk_norm != "none":
        q = rms_norm(q, params["q_norm"]["scale"], cfg.norm_eps, cfg.norm_offset)
    return rotate(q, table)


def entries(params: dict[str, Any], cfg: ModelConfig, x: jax.Array, table: Any) -> dict[str, jax.Array]:
    """x[B,T,D] -> what is cached: {k: [B,K,T,H] (rotated, unless tied), v: [B,M,T,V]}."""
    k = dense(x, params["k"], params.get("k_bias"))
    if cfg.qk_norm != "none":
        k = rms_norm(k, params["k_norm"]["scale"], cfg.norm_eps, cfg.norm_offset)
    if cfg.tied_kv:
        return {"k": k.swapaxes(1, 2)}
    v = dense(x, params["v"], params.get("v_bias"))
    return {"k": rotate(k, table).swapaxes(1, 2), "v": v.swapaxes(1, 2)}


def expand(cfg: ModelConfig, layer: int, stored: dict[str, jax.Array], positions: jax.Array, dtype: Any):
    """Stored entries [B,heads,S,dim] at positions[B,S] -> k[B,K,S,H], v[B,M,S,V] in `dtype`."""
    k = stored["k"].astype(dtype)
    if not cfg.tied_kv:
        return k, stored["v"].astype(dtype)
    table = rope_table(cfg.rope(layer), cfg.head_dim, jnp.maximum(positions, 0))
    return rotate(k, table, head_axis=1), k


def output(params: dict[str, Any], cfg: ModelConfig, context: jax.Array) -> jax.Array:
    """Attention result [B,T,N,V] -> [B,T,D]."""
    return dense(context, params["o"], params.get("o_bias"), contract=2)
