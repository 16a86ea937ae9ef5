"""Sliding window + attention sinks: Xiao et al., "StreamingLLM", arXiv 2309.17453, section 3.

Only masks change, so parameters are returned as they came. Positions stay absolute: the paper's re-indexing
of positions inside the cache is another method (it matters only beyond the trained length).
"""

import dataclasses
from typing import Any

from kvattn.config import Layer, MaskConfig, ModelConfig, shortest
from kvattn.config.check import need
from kvattn.convert.base import Context, Converted, Method
from kvattn.errors import UserError


@dataclasses.dataclass(frozen=True)
class Window(Method, tag="window"):
    """Each layer sees the last `window` tokens and the first `sinks`, except every `keep_every`-th layer
    (1-based, so keep_every=3 keeps layers 2, 5, 8, ...: windows on two layers of three; 0 keeps none).

    A layer, or a head group, that has a window keeps the narrower of the two views; a layer without attention stays.
    Outputs are the same for texts of up to window + sinks tokens; exact only where no mask changed.
    """

    window: int = 0
    sinks: int = 0
    keep_every: int = 0

    def check(self) -> None:
        """Raises UserError: a window below 1, negative sinks or keep_every."""
        for name, low in (("window", 1), ("sinks", 0), ("keep_every", 0)):
            need(getattr(self, name) >= low, f"convert.{name} is {getattr(self, name)}; it must be at least {low}.")

    def plan(self, cfg: ModelConfig, facts: Any = None) -> ModelConfig:
        """Raises UserError naming the layer: a family without a softmax to mask, a mask that sees later tokens, a
        present window and a new one that overlap without either containing the other."""
        layers = tuple(self._layer(cfg, index, layer) for index, layer in enumerate(cfg.every))
        return dataclasses.replace(cfg, layers=shortest(layers))

    def apply(self, params: Any, cfg: ModelConfig, context: Context) -> Converted:
        """Raises UserError as `plan`."""
        new = self.plan(cfg)
        changed = sum(a != b for a, b in zip(cfg.every, new.every, strict=True))
        note = (
            f"window {self.window} + {self.sinks} sinks on {changed} of {cfg.n_layers} layers, exact for "
            f"texts of up to {self.window + self.sinks} tokens"
        )
        return Converted(new, params, not changed, note)

    def _layer(self, cfg: ModelConfig, index: int, layer: Layer) -> Layer:
        if not layer.attention.leaves(cfg) or (self.keep_every and (index + 1) % self.keep_every == 0):
            return layer
        if layer.attention.softmax(cfg) is None:
            raise UserError(
                f"convert.kind {self.tag!r} masks a softmax and layer {index} ({layer.attention.tag!r}) has none; keep "
                "it out with keep_every, or convert another model."
            )
        groups = tuple(dataclasses.replace(g, mask=self._narrowed(g.mask, index)) for g in layer.groups)
        mask = layer.mask if groups else self._narrowed(layer.mask, index)
        return dataclasses.replace(layer, mask=mask, groups=groups)

    def _narrowed(self, old: MaskConfig, layer: int) -> MaskConfig:
        if old.kind != "causal":
            raise UserError(
                f"convert.kind {self.tag!r} takes causal masks and that of layer {layer} is {old.kind!r}; keep it out "
                "with keep_every, or convert another model."
            )
        new = dataclasses.replace(old, window=self.window, sinks=self.sinks)
        if not old.window or (new.window <= old.window and new.sinks <= old.sinks):
            return new
        if old.window <= new.window and old.sinks <= new.sinks:
            return old
        raise UserError(
            f"convert.window is {self.window} with {self.sinks} sinks, which neither contains nor fits the window of "
            f"{old.window} with {old.sinks} sinks of layer {layer}; choose both at most, or both at least, as large."
        )
