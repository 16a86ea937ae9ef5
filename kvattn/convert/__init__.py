"""Conversions: a checkpoint of one attention variant becomes another, tree -> tree. A method a file; importing this
registers them, a line here is all that a new one needs beside its file.

>>> step = Conversion.of("cla", factor=2)
>>> converted = convert(loaded.params, loaded.model, step)
>>> converted.exact, converted.note
(False, '15 of 30 layers own K/V ...')

`report.measure` says what a conversion cost in KL and loss and saved in bytes; `facts.gather` what a method may know of
a model from calibration text.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from kvattn.config import Conversion, ModelConfig
from kvattn.convert import facts as facts_lib
from kvattn.convert.base import NOTHING, Context, Converted, Method
from kvattn.convert.cla import Cla
from kvattn.convert.facts import Facts, gather
from kvattn.convert.first_half import FirstHalf
from kvattn.convert.gqa import Gqa
from kvattn.convert.mlkv import Mlkv
from kvattn.convert.window import Window
from kvattn.errors import UserError

__all__ = [
    "Cla",
    "Context",
    "Conversion",
    "Converted",
    "Facts",
    "FirstHalf",
    "Gqa",
    "Method",
    "Mlkv",
    "Window",
    "convert",
    "convert_all",
    "gather",
    "plan",
]


def plan(cfg: ModelConfig, steps: Sequence[Method]) -> ModelConfig:
    """The config that `convert_all` would return, without weights: for ledgers, and to refuse a bad step before
    a checkpoint is read. Raises UserError as `convert` does. A step whose sizes depend on facts plans without them."""
    for step in steps:
        step.check()
        cfg = step.plan(cfg)
        cfg.check()
    return cfg


def convert(params: Any, cfg: ModelConfig, step: Method, context: Context = NOTHING) -> Converted:
    """One conversion of `params` (the tree of `model.param_specs(cfg)`); facts that it wants and the context lacks are
    gathered from the context's batches.

    Raises UserError: an illegal field, a model that the method cannot convert (naming the layer and its family), facts
    or an rng that are not there, or a result that is not a legal model.
    """
    step.check()
    if cfg.scan_layers:
        raise UserError(
            "model.scan_layers is True; convert stacking.unstack_layers(params, cfg) with scan_layers False."
        )
    if step.wants:
        step.plan(cfg).check()  # what cannot be converted is refused before text is read
        context = dataclasses.replace(context, facts=_facts(params, cfg, step, context))
    result = step.apply(params, cfg, context)
    result.model.check()
    return dataclasses.replace(result, facts=(context.facts if step.wants else None,))


def _facts(params: Any, cfg: ModelConfig, step: Method, context: Context) -> Facts:
    if context.facts is not None:
        facts_lib.check_fit(context.facts, cfg, step.wants)
        return context.facts
    if not context.batches:
        raise UserError(
            f"convert.kind {step.tag!r} wants {', '.join(step.wants)} of calibration text and there is none; pass "
            "Context(batches=...), or facts."
        )
    return gather(params, cfg, context.batches, step.wants)


def convert_all(params: Any, cfg: ModelConfig, steps: Sequence[Method], context: Context = NOTHING) -> Converted:
    """`steps` one after the other; exact when each is. No steps: the model itself, exact. Each step draws from a key of
    its own; `context.facts` are the first step's, later ones gather from the model that they are given."""
    exact, notes, facts = True, [], ()
    for index, step in enumerate(steps):
        key = None if context.rng is None else jax.random.fold_in(context.rng, index)
        given = context.facts if index == 0 else None
        result = convert(params, cfg, step, dataclasses.replace(context, rng=key, facts=given))
        params, cfg, exact = result.params, result.model, exact and result.exact
        notes.append(result.note)
        facts += result.facts
    return Converted(cfg, params, exact, "; ".join(notes) or "unconverted", facts)
