"""Fewer key and/or value heads: Ainslie et al., "GQA", arXiv 2305.13245, section 2.1 (pooling.py has the arithmetic).

>>> convert(params, cfg, Conversion.of("gqa", k_heads=1))         # GQA -> MQA by the mean
"""

import dataclasses
from typing import Any

from kvattn.config import ModelConfig
from kvattn.config.check import choice, need
from kvattn.convert import pooling
from kvattn.convert.base import Context, Converted, Method
from kvattn.errors import UserError

METHODS = ("mean", "first", "random")


@dataclasses.dataclass(frozen=True)
class Gqa(Method, tag="gqa"):
    """K -> `k_heads` key heads and M -> `v_heads` value heads (0 = k_heads) in every layer.

    `mean` averages each group's weights (biases and a per-head k_norm scale too), `first` keeps the first head of each
    group, `random` draws new weights as the model's initialisation does. Exact when the heads of every group have the
    same weights (`random`: when no head is removed).
    """

    k_heads: int = 0
    v_heads: int = 0
    method: str = "mean"

    def check(self) -> None:
        """Raises UserError: no head count, an unknown method."""
        need(self.k_heads >= 1, f"convert.k_heads is {self.k_heads}; give a number of heads that divides the model's.")
        need(self.v_heads >= 0, f"convert.v_heads is {self.v_heads}; give a number of heads, or 0 for k_heads.")
        choice(self.method, METHODS, "convert.method")

    def plan(self, cfg: ModelConfig, facts: Any = None) -> ModelConfig:
        """Raises UserError as `pooling.pooled`."""
        return pooling.pooled(cfg, self.k_heads, self.v_heads, self.tag)

    def apply(self, params: Any, cfg: ModelConfig, context: Context) -> Converted:
        """Raises UserError: what `plan` raises; `random` without an rng."""
        new = self.plan(cfg)
        if self.method != "random":
            params, exact = pooling.pool_heads(params, cfg, new, self.method)
        elif context.rng is None:
            raise UserError("convert.method is 'random' and there is no rng; pass Context(rng=jax.random.key(seed)).")
        else:
            params, exact = pooling.redraw_heads(params, cfg, new, context.rng), new.every == cfg.every
        return Converted(new, params, exact, f"{pooling.describe(cfg, new)} by {self.method} of each contiguous group")
