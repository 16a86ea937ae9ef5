"""First-half sharing: the upper half of the layers reads the last layer of the lower half (as in YOCO, arXiv
2405.05254)."""

import dataclasses
from typing import Any

from kvattn.config import ModelConfig
from kvattn.convert import sharing
from kvattn.convert.base import Context, Converted, Method


def first_half_sources(n_layers: int) -> tuple[int, ...]:
    """kv_source of first-half sharing: layers ceil(L/2) .. L-1 read layer ceil(L/2) - 1."""
    last = (n_layers + 1) // 2 - 1
    return tuple(min(layer, last) for layer in range(n_layers))


@dataclasses.dataclass(frozen=True)
class FirstHalf(Method, tag="first_half"):
    """`method`: how the weights of the one shared owner are made (sharing.py)."""

    method: str = "mean"

    def check(self) -> None:
        """Raises UserError for an unknown method."""
        sharing.check_method(self.method)

    def plan(self, cfg: ModelConfig, facts: Any = None) -> ModelConfig:
        """Raises UserError as `sharing.shared`."""
        return sharing.shared(cfg, first_half_sources(cfg.n_layers), self.tag)

    def apply(self, params: Any, cfg: ModelConfig, context: Context) -> Converted:
        """Raises UserError as `plan`."""
        return sharing.share(params, cfg, self.plan(cfg), self.method)
