"""Sliding window + attention sinks: Xiao et al., "StreamingLLM", arXiv 2309.17453, section 3.

Only masks change, so parameters are returned as they came. Positions stay absolute: the paper's re-indexing
of positions inside the cache is another method (it matters only beyond the trained length).
"""

import dataclasses
from typing import Any

import jax

from kvattn.config import ConvertConfig, MaskConfig, ModelConfig
from kvattn.convert.base import Converted
from kvattn.errors import UserError


def plan(cfg: ModelConfig, step: ConvertConfig) -> ModelConfig:
    """Each layer sees the last `window` tokens and the first `sinks`, except every `keep_every`-th layer
    (1-based, so keep_every=3 keeps layers 2, 5, 8, ...: windows on two layers of three; 0 keeps none).

    A layer that has a window keeps the narrower of the two views.
    Raises UserError: a window below 1, negative sinks or keep_every, a layer whose present window and the
    new one overlap without either containing the other.
    """
    for name, low in (("window", 1), ("sinks", 0), ("keep_every", 0)):
        if getattr(step, name) < low:
            raise UserError(f"convert.{name}={getattr(step, name)} is below {low}, the smallest it takes.")
    masks = tuple(_narrowed(cfg.mask(layer), step, layer) for layer in range(cfg.n_layers))
    return dataclasses.replace(cfg, masks=_shortest_pattern(masks))


def convert(params: Any, cfg: ModelConfig, step: ConvertConfig, rng: jax.Array | None) -> Converted:
    """`plan(cfg, step)` with `params` as they are. Outputs are the same for texts of up to window + sinks
    tokens; `exact` is True only when no mask changed."""
    new = plan(cfg, step)
    changed = sum(new.mask(layer) != cfg.mask(layer) for layer in range(cfg.n_layers))
    note = (
        f"window {step.window} + {step.sinks} sinks on {changed} of {cfg.n_layers} layers, exact for "
        f"texts of up to {step.window + step.sinks} tokens"
    )
    return Converted(new, params, not changed, note)


def _narrowed(old: MaskConfig, step: ConvertConfig, layer: int) -> MaskConfig:
    if step.keep_every and (layer + 1) % step.keep_every == 0:
        return old
    new = dataclasses.replace(old, window=step.window, sinks=step.sinks)
    if not old.window or (new.window <= old.window and new.sinks <= old.sinks):
        return new
    if old.window <= new.window and old.sinks <= new.sinks:
        return old
    raise UserError(
        f"convert.window={step.window}, sinks={step.sinks} neither contains nor fits layer {layer}'s window="
        f"{old.window}, sinks={old.sinks}; choose both at most, or both at least, as large."
    )


def _shortest_pattern(masks: tuple[MaskConfig, ...]) -> tuple[MaskConfig, ...]:
    """The shortest prefix that, repeated, gives `masks` (layer l uses entry l % len)."""
    for period in range(1, len(masks)):
        if all(mask == masks[layer % period] for layer, mask in enumerate(masks)):
            return masks[:period]
    return masks
