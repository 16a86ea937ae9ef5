"""Axis A, value `none`: a layer without attention: no parameters, no leaves, nothing added to the stream.

What LLM-Drop (arXiv 2406.15786) and FinerCut (arXiv 2405.18218) leave of a layer whose attention they cut.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kvattn.attention.family import Family
from kvattn.attention.segments import Made


@dataclasses.dataclass(frozen=True)
class NoAttention(Family, tag="none"):
    """No fields. The block has no norm in front of it either."""

    def param_specs(self, cfg, owner):
        return {}

    def leaves(self, cfg):
        return {}

    def cannot_read(self, cfg, owner):
        return "this layer attends to nothing; let it own itself"

    def entries(self, params, cfg, layer, x, where, state):
        return Made({})

    def attend(self, params, cfg, layer, x, where, view) -> jax.Array:
        """Zeros [B,T,D]."""
        return jnp.zeros_like(x)
