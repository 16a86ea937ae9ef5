"""Conversions: a checkpoint of one attention variant becomes another, tree -> tree.

    >>> step = ConvertConfig(kind="cla", factor=2)
    >>> converted = convert(loaded.params, loaded.model, step)
    >>> converted.exact, converted.note
    (False, '15 of 30 layers own K/V ...')

One file a method; `CONVERSIONS` is the list. A conversion has the signature
`f(params, cfg, step, rng) -> Converted`, changes no array in place, and shares every leaf it does not touch.
Its half that needs no weights is in `PLANS`, `f(cfg, step) -> ModelConfig`; `plan` runs those.
`report.measure` says what a conversion cost in KL and loss and saved in bytes.
"""

from typing import Any

import jax

from kvattn.config import ConvertConfig, ModelConfig, validate
from kvattn.convert import cross_layer, gqa, window
from kvattn.convert.base import FIELDS, METHODS, Converted, check
from kvattn.errors import UserError

CONVERSIONS = {
    "gqa": gqa.convert,
    "cla": cross_layer.cla,
    "mlkv": cross_layer.mlkv,
    "first_half": cross_layer.first_half,
    "window": window.convert,
}

PLANS = {
    "gqa": gqa.plan,
    "cla": cross_layer.cla_plan,
    "mlkv": cross_layer.mlkv_plan,
    "first_half": cross_layer.first_half_plan,
    "window": window.plan,
}

__all__ = ["CONVERSIONS", "FIELDS", "METHODS", "PLANS", "Converted", "convert", "convert_all", "plan"]


def plan(cfg: ModelConfig, steps: tuple[ConvertConfig, ...]) -> ModelConfig:
    """The config that `convert_all` would return, without weights: for ledgers, and to refuse a bad step before
    a checkpoint is read. Raises UserError as `convert` does."""
    for step in steps:
        check(step)
        cfg = PLANS[step.kind](cfg, step)
        validate(cfg)
    return cfg


def convert(params: Any, cfg: ModelConfig, step: ConvertConfig, *, rng: jax.Array | None = None) -> Converted:
    """One conversion of `params` (the tree of `model.param_specs(cfg)`). `rng` serves method 'random'.

    Raises UserError: unknown kind, a method or field the kind does not have, anything the kind's own
    docstring lists, or a result that is not a legal model.
    """
    check(step)
    if cfg.scan_layers:
        raise UserError("model.scan_layers is True; convert model.unstack_layers(params, cfg) with scan_layers False.")
    result = CONVERSIONS[step.kind](params, cfg, step, rng)
    validate(result.model)
    return result


def convert_all(
    params: Any, cfg: ModelConfig, steps: tuple[ConvertConfig, ...], *, rng: jax.Array | None = None
) -> Converted:
    """`steps` one after the other; exact when each is. No steps: the model itself, exact."""
    exact, notes = True, []
    for index, step in enumerate(steps):
        key = None if rng is None else jax.random.fold_in(rng, index)
        result = convert(params, cfg, step, rng=key)
        params, cfg, exact = result.params, result.model, exact and result.exact
        notes.append(result.note)
    return Converted(cfg, params, exact, "; ".join(notes) or "unconverted")
