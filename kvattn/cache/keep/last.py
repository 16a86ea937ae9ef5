"""Keep-policy `last`: the newest tokens of each head stay, the baseline that sees no content."""

import dataclasses

import jax
import jax.numpy as jnp

from kvattn.cache.keep.base import Observed, Policy, Site
from kvattn.config.check import need


@dataclasses.dataclass(frozen=True)
class KeepLast(Policy, tag="last"):
    """The last `tokens` tokens."""

    tokens: int = 256

    def check(self) -> None:
        """Raises UserError: no token to keep."""
        need(self.tokens >= 1, f"cache.keep.tokens is {self.tokens}; keep at least 1.")

    def budget(self, length: int, site: Site) -> int:
        """`tokens`."""
        return self.tokens

    def score(self, observed: Observed) -> jax.Array:
        """The position (exact in float32 up to 16 million)."""
        return jnp.broadcast_to(observed.positions.astype(jnp.float32), observed.keys.shape[:3])
