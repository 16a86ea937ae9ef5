"""What every conversion returns, and the checks they share."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kvattn.config import ConvertConfig, ModelConfig
from kvattn.errors import UserError


@dataclasses.dataclass(frozen=True)
class Converted:
    """A converted model.

    `exact` is True only where the weights prove that the function is unchanged, up to rounding, for every
    input; `note` says in a sentence what was done and, where it is not exact, what that rests on.
    """

    model: ModelConfig
    params: Any
    exact: bool
    note: str


# Which fields of a ConvertConfig each kind reads; the others must keep their default.
FIELDS: dict[str, tuple[str, ...]] = {
    "gqa": ("k_heads", "v_heads", "method"),
    "cla": ("factor", "method"),
    "mlkv": ("owners", "k_heads", "v_heads", "method"),
    "first_half": ("method",),
    "window": ("window", "sinks", "keep_every"),
}

METHODS: dict[str, tuple[str, ...]] = {
    "gqa": ("mean", "first", "random"),
    "cla": ("mean", "running", "first"),
    "mlkv": ("mean", "running", "first"),
    "first_half": ("mean", "running", "first"),
}


def check(step: ConvertConfig) -> None:
    """Raises UserError for an unknown kind, a method it does not have, or a set field that it would ignore."""
    if step.kind not in FIELDS:
        raise UserError(f"convert.kind={step.kind!r} is none of {', '.join(FIELDS)}.")
    used = FIELDS[step.kind]
    for field in dataclasses.fields(step):
        value = getattr(step, field.name)
        if field.name not in ("kind", *used) and value != field.default:
            raise UserError(
                f"convert.{field.name}={value!r} has no meaning for kind={step.kind!r}, which reads "
                f"{', '.join(used)}; leave it at {field.default!r}."
            )
    if step.kind in METHODS and step.method not in METHODS[step.kind]:
        raise UserError(
            f"convert.method={step.method!r} is none of {', '.join(METHODS[step.kind])}, "
            f"the methods of kind={step.kind!r}."
        )


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
