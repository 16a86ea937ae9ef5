"""Fewer heads in each layer: K/V heads pooled by the mean or the first of each contiguous group, or drawn anew.

Head g of the result stands for the contiguous heads g*s .. g*s+s-1 of the checkpoint, s = K/K'. Query head
i read head floor(i K / N) before and reads floor(i K' / N) after, the group its old head went into, so q
and o stay as they are. K and V are pooled apart and may end with different numbers of heads (DiffQKV).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kvattn import model, spec
from kvattn.attention import Heads
from kvattn.config import ModelConfig, shortest
from kvattn.config.check import need
from kvattn.convert.base import replace_layers
from kvattn.errors import UserError

_HEAD_AXIS = {"k": 1, "k_bias": 0, "v": 1, "v_bias": 0}  # k[D,K,H], k_bias[K,H], ...


def pooled(cfg: ModelConfig, k_heads: int, v_heads: int, kind: str) -> ModelConfig:
    """The config with K -> k_heads key heads and M -> v_heads value heads (0 = k_heads) in every layer; one that
    leaves nothing in a cache stays.

    Raises UserError naming the layer: a family without heads to pool, counts that do not divide its own, K' != M' on
    tied K=V.
    """
    layers = tuple(
        dataclasses.replace(layer, attention=_pooled(layer.attention, cfg, k_heads, v_heads or k_heads, kind, index))
        for index, layer in enumerate(cfg.every)
    )
    return dataclasses.replace(cfg, layers=shortest(layers))


def _pooled(family: Any, cfg: ModelConfig, k_heads: int, v_heads: int, kind: str, layer: int) -> Any:
    if not family.leaves(cfg):
        return family
    if type(family) is not Heads:
        raise UserError(
            f"convert.kind {kind!r} pools plain heads and layer {layer} is {family.tag!r}; convert a model of plain "
            "heads."
        )
    for name, new, old in (("k_heads", k_heads, family.n_k_heads), ("v_heads", v_heads, family.n_v_heads)):
        divisors = ", ".join(str(d) for d in range(1, old + 1) if old % d == 0)
        need(
            old % new == 0,
            f"convert.{name} is {new}, which does not divide the {old} heads of layer {layer} ({family.tag!r}); use "
            f"one of {divisors}.",
        )
    need(
        not family.tied_kv or k_heads == v_heads,
        f"convert.v_heads is {v_heads}, k_heads {k_heads} and layer {layer} ({family.tag!r}) has tied_kv; give one.",
    )
    return dataclasses.replace(family, n_k_heads=k_heads, n_v_heads=v_heads)


def pool_heads(params: Any, cfg: ModelConfig, new: ModelConfig, method: str) -> tuple[Any, bool]:
    """The weights of `new` (of `pooled`) by `method` mean or first of each group, biases and a norm's scales a head
    too; and whether every pooled group was one head repeated."""
    changes, exact = {}, True
    for owner in cfg.owners:
        changes[owner], equal = _pool_layer(params["layers"][owner], new.attention(owner), method)
        exact = exact and equal
    return replace_layers(params, changes), exact


def _pool_layer(layer: Any, family: Heads, method: str) -> tuple[Any, bool]:
    attn, exact = dict(layer["attn"]), True
    for leaf, axis in _HEAD_AXIS.items():
        if leaf in attn:
            heads = family.n_k_heads if leaf.startswith("k") else family.n_v_heads
            attn[leaf], equal = pool(attn[leaf], heads, axis, method)
            exact = exact and equal
    if family.qk_norm == "full":  # k_norm scale[K,H]; "head" has scale[H], shared by all heads
        scale, equal = pool(attn["k_norm"]["scale"], family.n_k_heads, 0, method)
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


def redraw_heads(params: Any, cfg: ModelConfig, new: ModelConfig, rng: jax.Array) -> Any:
    """Fresh K and/or V weights wherever a layer's head count changes; paths, hence draws, as in model.init."""
    changes = {}
    for owner in cfg.owners:
        layer = params["layers"][owner]
        leaves = _changed_leaves(cfg.attention(owner), new.attention(owner))
        specs = {name: s for name, s in model.layer_specs(new, owner)["attn"].items() if name in leaves}
        above = tuple({"attn": specs} if index == owner else {} for index in range(cfg.n_layers))
        drawn = spec.init(rng, {"layers": above}, layer["attn"]["k"].dtype)["layers"][owner]["attn"]
        changes[owner] = {**layer, "attn": {**layer["attn"], **drawn}}
    return replace_layers(params, changes)


def _changed_leaves(old: Heads, new: Heads) -> tuple[str, ...]:
    leaves = ("k", "k_bias") if old.n_k_heads != new.n_k_heads else ()
    if leaves and old.qk_norm == "full":
        leaves += ("k_norm",)
    return leaves + (("v", "v_bias") if old.n_v_heads != new.n_v_heads else ())


def describe(cfg: ModelConfig, new: ModelConfig) -> str:
    """`3 key and 3 value heads -> 1 and 1`; where layers differ, 3/6 for 3 in some and 6 in others."""

    def counts(cfg, name):
        return "/".join(str(n) for n in sorted({getattr(cfg.attention(owner), name) for owner in cfg.owners}))

    before, after = ([counts(m, name) for name in ("n_k_heads", "n_v_heads")] for m in (cfg, new))
    return f"{before[0]} key and {before[1]} value heads -> {after[0]} and {after[1]}"
