"""Keep-policy `all`: every token stays, with a position a slot and head. What every other policy is held against."""

import dataclasses

import jax
import jax.numpy as jnp

from kvattn.cache.keep.base import Observed, Policy, Site


@dataclasses.dataclass(frozen=True)
class KeepAll(Policy, tag="all"):
    """No fields."""

    def budget(self, length: int, site: Site) -> int:
        """The prompt's length."""
        return length

    def score(self, observed: Observed) -> jax.Array:
        """Zeros."""
        return jnp.zeros(observed.keys.shape[:3], jnp.float32)
