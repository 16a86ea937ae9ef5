"""What a conversion method provides, what it is given and what it returns. A method is a frozen dataclass in a file of
its own and a line in kvattn/convert/__init__.py:

    @dataclasses.dataclass(frozen=True)
    class Halve(Method, tag="halve"):
        layer: int = 0                          # its fields: what a config sets
        wants = ("inputs",)                     # facts that it reads (kvattn.convert.facts)

        def check(self): ...                    # one sentence for an illegal field
        def plan(self, cfg, facts=None): ...    # the new config
        def apply(self, params, cfg, context): ...      # -> Converted
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from kvattn.config import Conversion, ModelConfig
from kvattn.convert.facts import Facts
from kvattn.model import Inputs


@dataclasses.dataclass(frozen=True)
class Converted:
    """A converted model.

    `exact` is True only where the weights prove that the function is unchanged, up to rounding, for every
    input; `note` says in a sentence what was done and, where it is not exact, what that rests on. `facts`: what was
    gathered for each step, None for a step that wants nothing.
    """

    model: ModelConfig
    params: Any
    exact: bool
    note: str
    facts: tuple[Facts | None, ...] = ()


@dataclasses.dataclass(frozen=True)
class Context:
    """What a method may use beside weights. `rng`: the key of its random draws. `facts`: what it `wants`, of the model
    that it is given. `batches`: the calibration text behind them, tokens[B,T] each."""

    rng: jax.Array | None = None
    facts: Facts | None = None
    batches: tuple[Inputs, ...] = ()


NOTHING = Context()


class Method(Conversion):
    """Base of all conversions. `plan` needs no weights; `apply` changes no array in place and shares every leaf that
    it does not touch. `wants`: names of facts, () = none; `calibration_tokens`: of text behind them."""

    wants: ClassVar[tuple[str, ...]] = ()
    calibration_tokens: ClassVar[int] = 8192

    def plan(self, cfg: ModelConfig, facts: Facts | None = None) -> ModelConfig:
        """The config of the converted model. Without `facts` (ledgers, and the check before a checkpoint is read) a
        method whose sizes depend on them plans without them. Raises UserError where `cfg` cannot be converted."""
        raise NotImplementedError

    def apply(self, params: Any, cfg: ModelConfig, context: Context) -> Converted:
        """The weights of `plan(cfg, context.facts)`. Raises UserError as `plan`, or for what the context lacks."""
        raise NotImplementedError


def replace_layers(params: Mapping[str, Any], changes: Mapping[int, Any]) -> dict[str, Any]:
    """`params` with layers[l] = changes[l]; every other leaf is the same array, nothing is copied."""
    layers = tuple(changes.get(index, layer) for index, layer in enumerate(params["layers"]))
    return {**params, "layers": layers}


def same(a: Any, b: Any) -> bool:
    """Whether two trees hold the same arrays, value for value."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b))
    return all(x.shape == y.shape and bool(jnp.array_equal(x, y)) for x, y in leaves)
