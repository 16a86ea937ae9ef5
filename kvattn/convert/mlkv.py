"""Multi-layer K/V heads: equal blocks of layers share one K/V, with fewer heads inside it (Zuhri et al., arXiv
2406.09297, section 3)."""

import dataclasses
from typing import Any

from kvattn.config import ModelConfig
from kvattn.config.check import need
from kvattn.convert import pooling, sharing
from kvattn.convert.base import Context, Converted, Method


def mlkv_sources(n_layers: int, owners: int) -> tuple[int, ...]:
    """kv_source of MLKV: `owners` = m blocks, each read from its first layer, {0} + {int((i+1) L / m) : i < m-1}."""
    firsts = [0] + [(i + 1) * n_layers // owners for i in range(owners - 1)]
    return tuple(max(first for first in firsts if first <= layer) for layer in range(n_layers))


@dataclasses.dataclass(frozen=True)
class Mlkv(Method, tag="mlkv"):
    """`owners` blocks and, where given, `k_heads`/`v_heads` heads in each owner. Heads are pooled inside each layer
    first (by the first of a group for method `first`, otherwise by the mean), then across the block by `method`."""

    owners: int = 0
    k_heads: int = 0
    v_heads: int = 0
    method: str = "mean"

    def check(self) -> None:
        """Raises UserError: owners below 1, v_heads alone, an unknown method."""
        need(self.owners >= 1, f"convert.owners is {self.owners}; give the number of layers that own K/V.")
        for name in ("k_heads", "v_heads"):
            need(getattr(self, name) >= 0, f"convert.{name} is {getattr(self, name)}; it must not be negative.")
        need(
            self.k_heads > 0 or not self.v_heads,
            f"convert.v_heads is {self.v_heads} and needs k_heads too (now 0, which keeps all heads).",
        )
        sharing.check_method(self.method)

    def plan(self, cfg: ModelConfig, facts: Any = None) -> ModelConfig:
        """Raises UserError: more owners than layers, and as `pooling.pooled` and `sharing.shared`."""
        need(
            self.owners <= cfg.n_layers,
            f"convert.owners is {self.owners}, outside 1..{cfg.n_layers}, the model's layers.",
        )
        return sharing.shared(self._pooled(cfg), mlkv_sources(cfg.n_layers, self.owners), self.tag)

    def apply(self, params: Any, cfg: ModelConfig, context: Context) -> Converted:
        """Raises UserError as `plan`."""
        new, pooled = self.plan(cfg), self._pooled(cfg)
        if not self.k_heads:
            return sharing.share(params, cfg, new, self.method)
        method = "first" if self.method == "first" else "mean"
        params, exact = pooling.pool_heads(params, cfg, pooled, method)
        result = sharing.share(params, pooled, new, self.method)
        note = f"{pooling.describe(cfg, pooled)} by {method} of each contiguous group; {result.note}"
        return dataclasses.replace(result, exact=exact and result.exact, note=note)

    def _pooled(self, cfg: ModelConfig) -> ModelConfig:
        return pooling.pooled(cfg, self.k_heads, self.v_heads, self.tag) if self.k_heads else cfg
