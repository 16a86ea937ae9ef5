"""The planner for a config: which layout should this model and cache have on these chips, and what will a pass cost?

    cfg, cache = size("palm-540b"), CacheConfig(dtype="bfloat16")
    p = plan(cfg, cache, chip="v4", chips=64, batch=64, context=2048, phase="decode", weights="int8")
    p.best.layout.name, p.best.mesh, p.best.seconds
    print(p.table())

The search is `sharding.cost.planner`; here a config becomes the cost model's `Workload`.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from kvattn import cache as caches
from kvattn import model, spec
from kvattn.config import CacheConfig, ModelConfig
from kvattn.errors import UserError
from sharding import ShardingError, cost
from sharding.cost import planner
from sharding.cost.plan_report import Candidate, Plan, Request
from sharding.cost.planner import all_layouts
from sharding.cost.slices import DEFAULT_MESHES, default_mesh, factorisations
from sharding.layout.torus_layouts import Layout, parse

__all__ = [
    "DEFAULT_MESHES",
    "Candidate",
    "Plan",
    "Request",
    "all_layouts",
    "default_mesh",
    "factorisations",
    "parse_layouts",
    "parse_mesh",
    "plan",
    "workload",
]

# GPT-NeoX blocks are parallel in form but norm the stream twice, so it is gathered, and summed into, twice.
_RESIDUALS = {"serial": "serial", "parallel_palm": "parallel", "parallel_neox": "serial", "ladder": "ladder"}


def plan(cfg: ModelConfig, cache: CacheConfig, *, weights: str = "bfloat16", kv: str = "", **request: Any) -> Plan:
    """`sharding.cost.planner.plan` for a model and its cache; `request` is what that takes (chip, chips, batch,
    context, phase, ...).

    Raises UserError: what the planner refuses, a store that does not fit the model.
    """

    counts = {s.heads for s in (cfg.attention(layer).softmax(cfg) for layer in range(cfg.n_layers)) if s}
    own = math.gcd(*counts)

    def padded(n_heads: int) -> cost.Workload:
        if n_heads == own:
            return workload(cfg, cache)
        if len(counts) > 1 or not all(hasattr(layer.attention, "n_heads") for layer in cfg.layers):
            raise ShardingError(
                f"query heads differ from layer to layer ({', '.join(map(str, sorted(counts)))}) and cannot be "
                "padded to "
                f"{n_heads}; take a mesh that divides {own}."
            )
        return workload(cfg.replace(n_heads=n_heads), cache)

    try:
        return planner.plan(padded, own, weights=weights, kv=kv, **request)
    except ShardingError as error:
        raise UserError(str(error)) from None


def workload(cfg: ModelConfig, cache: CacheConfig, *, weights: str = "bfloat16", kv: str = "") -> cost.Workload:
    """The cost model's input. `weights`: bfloat16 | int8; `kv`: a key of cost.KV_TYPES, the cache's dtype with its own
    scales when empty.

    Raises UserError: unknown type, a store that does not fit the model. Raises ShardingError: a weight or leaf that the
    cost model cannot place.
    """
    cfg = dataclasses.replace(cfg, scan_layers=False)
    stored, kv = not kv, kv or {"float8_e4m3fn": "fp8"}.get(cache.dtype, cache.dtype)
    for name, value, valid in (("weights", weights, cost.WEIGHT_BYTES), ("kv", kv, cost.KV_TYPES)):
        if value not in valid:
            raise UserError(f"{name} is {value!r}; choose one of {', '.join(valid)}.")
    caches.specs(cfg, cache, 1, 1)  # raises where the store does not fit the model
    count: dict[cost.Layer, int] = {}
    for layer in range(cfg.n_layers):
        one = _layer(cfg, cache, layer)
        count[one] = count.get(one, 0) + 1
    bits, scale = cost.KV_TYPES[kv]
    return cost.Workload(
        d_model=cfg.d_model,
        vocab=cfg.vocab_size,
        layers=tuple(dataclasses.replace(one, count=n) for one, n in count.items()),
        tied=cfg.tied_embeddings,
        residual=_RESIDUALS[cfg.residual],
        extra=spec.count(model.param_specs(cfg)["final_norm"]),
        weight_bytes=cost.WEIGHT_BYTES[weights],
        kv_bits=bits,
        kv_scale_bytes=4 if stored and scale else scale,  # codes as they are held here have float32 scales
        norm_means=1 if cfg.norm == "rmsnorm" else 2,
    )


def _layer(cfg: ModelConfig, cache: CacheConfig, layer: int) -> cost.Layer:
    specs, owner, mask, family = (
        model.layer_specs(cfg, layer),
        cfg.sources[layer],
        cfg.mask(layer),
        cfg.attention(layer),
    )
    leaves, shape = cfg.attention(owner).leaves(cfg), family.softmax(cfg)
    ring = caches.layout(cfg, cache, owner, 1 << 40)
    return cost.layer_of(
        specs,
        leaves,
        owner=owner == layer,
        n_heads=shape.heads if shape else 0,
        score_dim=shape.key_dim if shape else 0,
        value_dim=shape.value_dim if shape else 0,
        token_flops=family.flops(cfg, 0),
        visible=mask.window + mask.sinks,
        slots=ring[0] if ring[1] else 0,
        norms=sum(name.endswith("_norm") for name in specs),
        kv_norm="kv_norm" in specs,
    )


# --- what a command is given ---------------------------------------------------------------------------


def parse_mesh(text: str) -> tuple[tuple[int, int, int], ...] | None:
    """`4x4x4` -> ((4, 4, 4),); None for an empty text. Raises UserError for anything else."""
    sides = text.split("x")
    if not text:
        return None
    if len(sides) != 3 or not all(side.isdecimal() and int(side) for side in sides):
        raise UserError(f"mesh is {text!r}; write it as XxYxZ, for example 4x4x4, with 1 for an unused axis.")
    x, y, z = map(int, sides)
    return ((x, y, z),)


def parse_layouts(texts: Iterable[str]) -> tuple[Layout, ...] | None:
    """Layouts by name; None for none. Raises ShardingError."""
    return tuple(parse(text) for text in texts) or None
