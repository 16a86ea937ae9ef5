"""Fewer K/V layers: owners write keys and values, the layers above read them. What CLA, MLKV and first-half sharing
have in common: who reads whom is their own, how an owner's weights are made is here.

The owner's weights come from its group by `mean` (all members weigh the same), `running` (MLKV's published
w <- (w + w_next)/2 in layer order, so three layers weigh 1/4, 1/4, 1/2) or `first` (the owner keeps its own).
Consumers lose their K/V weights and keep q and o. An owner's K/V weights are those parameters of its family that a
reader does not have, whatever their names: layers of any family share, if all of a group can read the owner.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kvattn.attention import Heads
from kvattn.config import ModelConfig
from kvattn.config.check import choice
from kvattn.convert.base import Converted, replace_layers, same
from kvattn.errors import UserError

METHODS = ("mean", "running", "first")


def check_method(method: str) -> None:
    """Raises UserError for an unknown way to make an owner's weights."""
    choice(method, METHODS, "convert.method")


def shared(cfg: ModelConfig, sources: tuple[int, ...], kind: str) -> ModelConfig:
    """The config whose layer l reads layer sources[l]. Raises UserError naming the layer and its family: K/V shared
    already, a layer that cannot read its owner, layers of one group with different RoPE."""
    if cfg.sources != tuple(range(cfg.n_layers)):
        raise UserError(
            f"model.kv_source is {cfg.kv_source}: it shares K/V already; convert a model whose layers own theirs."
        )
    new = dataclasses.replace(cfg, kv_source=sources)
    for layer, owner in enumerate(sources):
        if layer == owner:
            continue
        mine, theirs = cfg.attention(layer), cfg.attention(owner)
        empty = next((l for l in (owner, layer) if not cfg.attention(l).leaves(cfg)), None)
        reason = f"layer {empty} leaves nothing in a cache" if empty is not None else mine.cannot_read(new, theirs)
        if reason:
            raise UserError(
                f"convert.kind {kind!r} makes layer {layer} ({mine.tag!r}) read layer {owner} ({theirs.tag!r}), but "
                f"{reason}."
            )
    new.check()  # before any weight is pooled: groups must have one RoPE
    return new


def share(params: Any, cfg: ModelConfig, new: ModelConfig, method: str) -> Converted:
    """The weights of `new` (of `shared`); exact where they prove that all members of a group had the owner's K/V."""
    changes, exact = {}, True
    for owner in new.owners:
        group = new.readers(owner)
        members = [params["layers"][layer] for layer in group]
        names = _kv_names(cfg, owner)
        changes[owner] = _owner_layer(members, names, method)
        exact = exact and _group_is_exact([cfg.attention(layer) for layer in group], members, names)
        changes.update({layer: _consumer_layer(params["layers"][layer], names) for layer in group[1:]})
    note = f"{len(new.owners)} of {cfg.n_layers} layers own K/V (owners' weights: {method} of the group)"
    return Converted(new, replace_layers(params, changes), exact, note)


def _kv_names(cfg: ModelConfig, layer: int) -> tuple[str, ...]:
    """Names of the attention parameters that an owner has and a reader has not."""
    family = cfg.attention(layer)
    reader = family.param_specs(cfg, False)
    return tuple(name for name in family.param_specs(cfg, True) if name not in reader)


def _kv_path(layer: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Everything between a layer's input and its K and V, except the norm it shares with q."""
    path = {name: layer["attn"][name] for name in names}
    return {"attn": path, **({"kv_norm": layer["kv_norm"]} if "kv_norm" in layer else {})}


def _owner_layer(members: list[Any], names: tuple[str, ...], method: str) -> Any:
    paths = [_kv_path(member, names) for member in members]
    if len(paths) > 1 and method != "first":
        path = jax.tree.map(_mean if method == "mean" else _running_mean, *paths)
    else:
        path = paths[0]
    return {**members[0], **path, "attn": {**members[0]["attn"], **path["attn"]}}


def _consumer_layer(layer: Any, names: tuple[str, ...]) -> Any:
    attn = {name: value for name, value in layer["attn"].items() if name not in names}
    return {**{name: value for name, value in layer.items() if name != "kv_norm"}, "attn": attn}


def _mean(*xs: jax.Array) -> jax.Array:
    total = sum((x.astype(jnp.float32) for x in xs[1:]), xs[0].astype(jnp.float32))
    return (total / len(xs)).astype(xs[0].dtype)


def _running_mean(*xs: jax.Array) -> jax.Array:
    total = xs[0].astype(jnp.float32)
    for x in xs[1:]:
        total = (total + x.astype(jnp.float32)) / 2
    return total.astype(xs[0].dtype)


def _group_is_exact(families: list[Any], members: list[Any], names: tuple[str, ...]) -> bool:
    """Whether the weights prove that all members have the owner's K and V: the same K/V path and norm, and no
    member but the last adds anything to the residual stream (zero output projections), so that all see the
    same input."""
    paths = [(_kv_path(member, names), member.get("attn_norm")) for member in members]
    silent = all(_adds_nothing(*pair) for pair in zip(families[:-1], members[:-1], strict=True))
    return silent and all(same(paths[0], path) for path in paths[1:])


def _adds_nothing(family: Any, layer: Any) -> bool:
    """Whether a block of plain heads writes zeros; of another family nothing is proved."""
    if type(family) is not Heads:
        return False
    writes = [layer["attn"]["o"], layer["mlp"]["down"]]
    writes += [b for b in (layer["attn"].get("o_bias"), layer["mlp"].get("down_bias")) if b is not None]
    posts = (layer.get("attn_post_norm", {}), layer.get("mlp_post_norm", {}))
    writes += [norm["bias"] for norm in posts if "bias" in norm]  # a norm maps 0 to its bias
    return not any(bool(jnp.any(w)) for w in writes)
