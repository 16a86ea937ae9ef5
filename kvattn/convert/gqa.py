"""Fewer key and/or value heads: Ainslie et al., "GQA", arXiv 2305.13245, section 2.1.

Head g of the result stands for the contiguous heads g*s .. g*s+s-1 of the checkpoint, s = K/K'. Query head
i read head floor(i K / N) before and reads floor(i K' / N) after, the group its old head went into, so q
and o stay as they are. K and V are pooled apart and may end with different numbers of heads (DiffQKV).

    >>> convert(params, cfg, ConvertConfig(kind="gqa", k_heads=1))         # GQA -> MQA by the mean
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kvattn import model, spec
from kvattn.config import ConvertConfig, ModelConfig
from kvattn.convert.base import Converted, replace_layers
from kvattn.errors import UserError


def plan(cfg: ModelConfig, step: ConvertConfig) -> ModelConfig:
    """The config with K -> `step.k_heads` key heads and M -> `step.v_heads` value heads (0 = k_heads).

    Raises UserError: head counts that do not divide the present ones; K' != M' on a model with tied K=V.
    """
    k_heads, v_heads = step.k_heads, step.v_heads or step.k_heads
    if k_heads < 1:
        raise UserError(f"convert.k_heads={k_heads} is no head count; give one that divides {cfg.n_k_heads}.")
    for name, new, old in (("k_heads", k_heads, cfg.n_k_heads), ("v_heads", v_heads, cfg.n_v_heads)):
        if new < 1 or old % new:
            divisors = ", ".join(str(d) for d in range(1, old + 1) if old % d == 0)
            raise UserError(f"convert.{name}={new} does not divide the model's {old} heads; use one of {divisors}.")
    if cfg.tied_kv and k_heads != v_heads:
        raise UserError(f"convert.v_heads={v_heads} differs from k_heads={k_heads} on a model with tied_kv; give one.")
    return dataclasses.replace(cfg, n_k_heads=k_heads, n_v_heads=v_heads)


def convert(params: Any, cfg: ModelConfig, step: ConvertConfig, rng: jax.Array | None) -> Converted:
    """The weights of `plan(cfg, step)`.

    `mean` averages each group's weights (biases and a per-head k_norm scale too), `first` keeps the first
    head of each group, `random` draws new weights from `rng` as the model's initialisation does. Exact when
    the heads of every group have the same weights (`random`: when no head is removed).

    Raises UserError: what `plan` raises; `random` without an `rng`.
    """
    new = plan(cfg, step)
    if step.method == "random":
        if rng is None:
            raise UserError("convert.method='random' draws weights and got rng=None; pass rng=jax.random.key(seed).")
        params = _redraw(params, cfg, new, rng)
        exact = new == cfg
    else:
        changes, exact = {}, True
        for owner in cfg.owners:
            changes[owner], equal = _pool_layer(params["layers"][owner], cfg, new, step.method)
            exact = exact and equal
        params = replace_layers(params, changes)
    note = (
        f"{cfg.n_k_heads} key and {cfg.n_v_heads} value heads -> {new.n_k_heads} and {new.n_v_heads} by "
        f"{step.method} of each contiguous group"
    )
    return Converted(new, params, exact, note)


def _pool_layer(layer: Any, cfg: ModelConfig, new: ModelConfig, method: str) -> tuple[Any, bool]:
    """The layer with pooled K/V leaves, and whether each pooled group was one head repeated."""
    attn, exact = dict(layer["attn"]), True
    axes = {"k": 1, "k_bias": 0, "v": 1, "v_bias": 0}  # the head axis: k[D,K,H], k_bias[K,H], ...
    for leaf, axis in axes.items():
        if leaf in attn:
            heads = new.n_k_heads if leaf.startswith("k") else new.n_v_heads
            attn[leaf], equal = pool(attn[leaf], heads, axis, method)
            exact = exact and equal
    if cfg.qk_norm == "full":  # k_norm scale[K,H]; "head" has scale[H], shared by all heads
        scale, equal = pool(attn["k_norm"]["scale"], new.n_k_heads, 0, method)
        attn["k_norm"], exact = {**attn["k_norm"], "scale": scale}, exact and equal
    return {**layer, "attn": attn}, exact


def pool(x: jax.Array, heads: int, axis: int, method: str) -> tuple[jax.Array, bool]:
    """x[.., K, ..] -> [.., heads, ..] by the mean (in float32) or the first of each contiguous group.

    Returns the pooled array, in x's dtype, and whether the members of each group were equal.
    """
    group = x.shape[axis] // heads
    if group == 1:
        return x, True
    grouped = x.reshape(*x.shape[:axis], heads, group, *x.shape[axis + 1 :])
    first = jax.lax.slice_in_dim(grouped, 0, 1, axis=axis + 1)
    equal = bool(jnp.all(grouped == jnp.broadcast_to(first, grouped.shape)))
    if method == "first":
        return first.squeeze(axis + 1), equal
    return jnp.mean(grouped, axis + 1, dtype=jnp.float32).astype(x.dtype), equal


def _redraw(params: Any, cfg: ModelConfig, new: ModelConfig, rng: jax.Array) -> Any:
    """Fresh K and/or V weights wherever a head count changes; paths, hence draws, as in model.init."""
    leaves = (("k", "k_bias") if cfg.n_k_heads != new.n_k_heads else ()) + (
        ("v", "v_bias") if cfg.n_v_heads != new.n_v_heads else ()
    )
    if cfg.n_k_heads != new.n_k_heads and cfg.qk_norm == "full":
        leaves += ("k_norm",)
    specs = tuple(
        {"attn": {name: s for name, s in layer["attn"].items() if name in leaves}}
        for layer in model.param_specs(new)["layers"]
    )
    dtype = params["layers"][cfg.owners[0]]["attn"]["k"].dtype
    drawn = spec.init(rng, {"layers": specs}, dtype)["layers"]
    changes = {}
    for owner in cfg.owners:
        layer = params["layers"][owner]
        changes[owner] = {**layer, "attn": {**layer["attn"], **drawn[owner]["attn"]}}
    return replace_layers(params, changes)
