"""Cross-layer attention: groups of consecutive layers share one K/V (Brandon et al., arXiv 2405.12981, section 3)."""

import dataclasses
from typing import Any

from kvattn.config import ModelConfig
from kvattn.config.check import need
from kvattn.convert import sharing
from kvattn.convert.base import Context, Converted, Method


def cla_sources(n_layers: int, factor: int) -> tuple[int, ...]:
    """kv_source of CLA: ceil(L / factor) owners, the short group (L mod factor layers) first: L=10, factor=3 has
    owners 0, 1, 4, 7."""
    short = n_layers % factor
    return tuple(0 if layer < short else short + factor * ((layer - short) // factor) for layer in range(n_layers))


@dataclasses.dataclass(frozen=True)
class Cla(Method, tag="cla"):
    """Groups of `factor` layers read the first of the group; `method`: how its weights are made (sharing.py)."""

    factor: int = 0
    method: str = "mean"

    def check(self) -> None:
        """Raises UserError: a factor below 1, an unknown method."""
        need(self.factor >= 1, f"convert.factor is {self.factor}; give the number of layers that share.")
        sharing.check_method(self.method)

    def plan(self, cfg: ModelConfig, facts: Any = None) -> ModelConfig:
        """Raises UserError: a factor above L, and as `sharing.shared`."""
        need(
            self.factor <= cfg.n_layers,
            f"convert.factor is {self.factor}, outside 1..{cfg.n_layers}, the model's layers.",
        )
        return sharing.shared(cfg, cla_sources(cfg.n_layers, self.factor), self.tag)

    def apply(self, params: Any, cfg: ModelConfig, context: Context) -> Converted:
        """Raises UserError as `plan`."""
        result = sharing.share(params, cfg, self.plan(cfg), self.method)
        if cfg.kv_norm or self.factor == 1:
            return result
        note = f"{result.note}; owners feed q, k and v from one norm (the paper trains with model.kv_norm=True)"
        return dataclasses.replace(result, note=note)
