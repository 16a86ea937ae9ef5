"""Costs predicted before any compiler: a pass of a decoder over a torus of chips, and the layouts to choose from."""

from sharding.cost.prediction import (
    LINKS,
    OVERLAPS,
    PHASES,
    Prediction,
    cache_bytes,
    check_memory,
    head_shards,
    max_context,
    mfu,
    predict,
)
from sharding.cost.traffic import PURPOSES, Collective, Volume, crossovers, optimal_x, volume_elements
from sharding.cost.workload import KV_TYPES, RESIDUALS, WEIGHT_BYTES, Layer, Leaf, Weight, Workload, layer_of

__all__ = [
    "KV_TYPES",
    "LINKS",
    "OVERLAPS",
    "PHASES",
    "PURPOSES",
    "RESIDUALS",
    "WEIGHT_BYTES",
    "Collective",
    "Layer",
    "Leaf",
    "Prediction",
    "Volume",
    "Weight",
    "Workload",
    "cache_bytes",
    "check_memory",
    "crossovers",
    "head_shards",
    "layer_of",
    "max_context",
    "mfu",
    "optimal_x",
    "predict",
    "volume_elements",
]
