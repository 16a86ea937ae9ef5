"""Layers and caches as a scan over layers takes them: one entry per position in the pattern's period, stacked.

layers[i]   layers i, i + period, ... of the loop, every leaf [L/period, ...]
"""

from typing import Any

import jax
import jax.numpy as jnp

from kvattn.config import ModelConfig, period


def stack_layers(params: dict[str, Any], cfg: ModelConfig) -> dict[str, Any]:
    """Loop layout -> scan layout: layers[i] holds layers i, i+period, ... stacked."""
    size = period(cfg)
    stacked = tuple(jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["layers"][i::size]) for i in range(size))
    return {**params, "layers": stacked}


def unstack_layers(params: dict[str, Any], cfg: ModelConfig) -> dict[str, Any]:
    """Scan layout -> loop layout; the inverse of `stack_layers`."""
    size = period(cfg)
    return {
        **params,
        "layers": tuple(
            jax.tree.map(lambda leaf, n=layer // size: leaf[n], params["layers"][layer % size])
            for layer in range(cfg.n_layers)
        ),
    }


def stack_caches(caches: Any, cfg: ModelConfig) -> Any:
    """Caches by layer -> as a scan takes them: one entry per position in the period, leaves [L/period, ...]."""
    size = period(cfg)
    return tuple(jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches[i::size]) for i in range(size))


def unstack_caches(caches: Any, cfg: ModelConfig) -> Any:
    """The inverse of `stack_caches`."""
    size = period(cfg)
    return tuple(
        jax.tree.map(lambda leaf, n=layer // size: leaf[n], caches[layer % size]) for layer in range(cfg.n_layers)
    )
