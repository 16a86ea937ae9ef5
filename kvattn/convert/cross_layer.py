"""Fewer K/V layers: owners write keys and values, the layers above read them.

- `cla`: groups of `factor` consecutive layers (Brandon et al., "Cross-Layer Attention", arXiv 2405.12981,
  section 3). Where factor does not divide L the short group comes first:
  L=10, factor=3 has owners 0, 1, 4, 7.
- `mlkv`: `owners` = m equal blocks, first layers {0} + {int((i+1) L / m) : i < m-1} (Zuhri et al., "MLKV",
  arXiv 2406.09297, section 3), with fewer heads inside each owner if `k_heads` is given.
- `first_half`: every layer of the second half reads the last layer of the first (YOCO-like).

The owner's weights come from its group by `mean` (all members weigh the same), `running` (MLKV's published
w <- (w + w_next)/2 in layer order, so three layers weigh 1/4, 1/4, 1/2) or `first` (the owner keeps its own).
Consumers lose their K/V weights and keep q and o.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kvattn.config import ConvertConfig, ModelConfig, validate
from kvattn.convert import gqa
from kvattn.convert.base import Converted, replace_layers, same
from kvattn.errors import UserError

_ATTN_LEAVES = ("k", "v", "k_bias", "v_bias", "k_norm")


def cla_sources(n_layers: int, factor: int) -> tuple[int, ...]:
    """kv_source of CLA: ceil(L / factor) owners, the short group (L mod factor layers) first."""
    short = n_layers % factor
    return tuple(0 if layer < short else short + factor * ((layer - short) // factor) for layer in range(n_layers))


def mlkv_sources(n_layers: int, owners: int) -> tuple[int, ...]:
    """kv_source of MLKV: `owners` blocks, each read from its first layer."""
    firsts = [0] + [(i + 1) * n_layers // owners for i in range(owners - 1)]
    return tuple(max(first for first in firsts if first <= layer) for layer in range(n_layers))


def first_half_sources(n_layers: int) -> tuple[int, ...]:
    """kv_source of first-half sharing: layers ceil(L/2) .. L-1 read layer ceil(L/2) - 1."""
    last = (n_layers + 1) // 2 - 1
    return tuple(min(layer, last) for layer in range(n_layers))


def cla_plan(cfg: ModelConfig, step: ConvertConfig) -> ModelConfig:
    """The config with groups of `step.factor` layers. Raises UserError: a factor outside 1..L, a model that
    shares K/V already, layers of one group with different RoPE."""
    if not 1 <= step.factor <= cfg.n_layers:
        raise UserError(f"convert.factor={step.factor} is outside 1..{cfg.n_layers}, the model's layers.")
    return _shared(cfg, cla_sources(cfg.n_layers, step.factor))


def cla(params: Any, cfg: ModelConfig, step: ConvertConfig, rng: jax.Array | None) -> Converted:
    """Cross-layer attention: the weights of `cla_plan(cfg, step)`; raises what it raises."""
    result = _share(params, cfg, cla_plan(cfg, step), step.method)
    if cfg.kv_norm or step.factor == 1:
        return result
    note = f"{result.note}; owners feed q, k and v from one norm (the paper trains with model.kv_norm=True)"
    return dataclasses.replace(result, note=note)


def mlkv_plan(cfg: ModelConfig, step: ConvertConfig) -> ModelConfig:
    """The config with `step.owners` blocks and, where given, `k_heads`/`v_heads` heads. Raises UserError: an
    owner count outside 1..L, and what `cla_plan` and `gqa.plan` raise."""
    if not 1 <= step.owners <= cfg.n_layers:
        raise UserError(f"convert.owners={step.owners} is outside 1..{cfg.n_layers}, the model's layers.")
    if step.v_heads and not step.k_heads:
        raise UserError(f"convert.v_heads={step.v_heads} needs k_heads too (now 0, which keeps all heads).")
    pooled = gqa.plan(cfg, step) if step.k_heads else cfg
    return _shared(pooled, mlkv_sources(cfg.n_layers, step.owners))


def mlkv(params: Any, cfg: ModelConfig, step: ConvertConfig, rng: jax.Array | None) -> Converted:
    """Multi-layer K/V heads: the weights of `mlkv_plan(cfg, step)`. Heads are pooled inside each layer first
    (by the first of a group for method `first`, otherwise by the mean), then across the block."""
    new = mlkv_plan(cfg, step)
    if not step.k_heads:
        return _share(params, cfg, new, step.method)
    method = "first" if step.method == "first" else "mean"
    heads = gqa.convert(params, cfg, dataclasses.replace(step, method=method), rng)
    result = _share(heads.params, heads.model, new, step.method)
    return dataclasses.replace(result, exact=heads.exact and result.exact, note=f"{heads.note}; {result.note}")


def first_half_plan(cfg: ModelConfig, step: ConvertConfig) -> ModelConfig:
    """The config whose second half reads layer ceil(L/2) - 1. Raises UserError as `cla_plan` does."""
    return _shared(cfg, first_half_sources(cfg.n_layers))


def first_half(params: Any, cfg: ModelConfig, step: ConvertConfig, rng: jax.Array | None) -> Converted:
    """First-half sharing: the weights of `first_half_plan(cfg, step)`; raises what it raises."""
    return _share(params, cfg, first_half_plan(cfg, step), step.method)


def _shared(cfg: ModelConfig, sources: tuple[int, ...]) -> ModelConfig:
    if cfg.owners != tuple(range(cfg.n_layers)):
        raise UserError(f"model.kv_source={cfg.kv_source} shares K/V already; convert a model whose layers own theirs.")
    new = dataclasses.replace(cfg, kv_source=sources)
    validate(new)  # before any weight is pooled: groups must have one RoPE
    return new


def _share(params: Any, cfg: ModelConfig, new: ModelConfig, method: str) -> Converted:
    changes, exact = {}, True
    for owner in new.owners:
        members = [params["layers"][layer] for layer in new.readers(owner)]
        changes[owner] = _owner_layer(members, method)
        exact = exact and _group_is_exact(members)
        changes.update({layer: _consumer_layer(params["layers"][layer]) for layer in new.readers(owner)[1:]})
    note = f"{len(new.owners)} of {cfg.n_layers} layers own K/V (owners' weights: {method} of the group)"
    return Converted(new, replace_layers(params, changes), exact, note)


def _kv_path(layer: Any) -> dict[str, Any]:
    """Everything between a layer's input and its K and V, except the norm it shares with q."""
    path = {name: layer["attn"][name] for name in _ATTN_LEAVES if name in layer["attn"]}
    return {"attn": path, **({"kv_norm": layer["kv_norm"]} if "kv_norm" in layer else {})}


def _owner_layer(members: list[Any], method: str) -> Any:
    paths = [_kv_path(member) for member in members]
    if len(paths) > 1 and method != "first":
        combine = _mean if method == "mean" else _running_mean
        path = jax.tree.map(combine, *paths)
    else:
        path = paths[0]
    return {**members[0], **path, "attn": {**members[0]["attn"], **path["attn"]}}


def _consumer_layer(layer: Any) -> Any:
    attn = {name: value for name, value in layer["attn"].items() if name not in _ATTN_LEAVES}
    return {**{name: value for name, value in layer.items() if name != "kv_norm"}, "attn": attn}


def _mean(*xs: jax.Array) -> jax.Array:
    total = sum((x.astype(jnp.float32) for x in xs[1:]), xs[0].astype(jnp.float32))
    return (total / len(xs)).astype(xs[0].dtype)


def _running_mean(*xs: jax.Array) -> jax.Array:
    total = xs[0].astype(jnp.float32)
    for x in xs[1:]:
        total = (total + x.astype(jnp.float32)) / 2
    return total.astype(xs[0].dtype)


def _group_is_exact(members: list[Any]) -> bool:
    """Whether the weights prove that all members have the owner's K and V: the same K/V path and norm, and no
    member but the last adds anything to the residual stream (zero output projections), so that all see the
    same input."""
    paths = [(_kv_path(member), member.get("attn_norm")) for member in members]
    return all(same(paths[0], path) for path in paths[1:]) and all(_adds_nothing(m) for m in members[:-1])


def _adds_nothing(layer: Any) -> bool:
    writes = [layer["attn"]["o"], layer["mlp"]["down"]]
    writes += [b for b in (layer["attn"].get("o_bias"), layer["mlp"].get("down_bias")) if b is not None]
    posts = (layer.get("attn_post_norm", {}), layer.get("mlp_post_norm", {}))
    writes += [norm["bias"] for norm in posts if "bias" in norm]  # a norm maps 0 to its bias
    return not any(bool(jnp.any(w)) for w in writes)
