"""ParamSpec: one table per model from which everything about its parameters is derived.

Shape, logical axes and initialiser in one place give initialisation, abstract shapes, shardings, counts
and FLOPs. A parameter's random key is folded from its path, so adding a parameter changes no other.
"""

import dataclasses
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter. `axes` names every dimension (see sharding/layout/rules.py). `init` is normal | zeros | ones;
    normal draws with standard deviation `scale` (0 = fan_in ** -0.5 over the dims named in `fan_in`)."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: str = "normal"
    scale: float = 0.0
    fan_in: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def is_spec(x: Any) -> bool:
    return isinstance(x, ParamSpec)


def map_specs(f, specs: Any) -> Any:
    """`f(spec)` over a tree of ParamSpec."""
    return jax.tree.map(f, specs, is_leaf=is_spec)


def init(rng: jax.Array, specs: Any, dtype: Any = jnp.float32) -> Any:
    """Random parameters of `specs`, each drawn from a key folded from its own path."""

    def one(path, spec):
        key = jax.random.fold_in(rng, zlib.crc32(jax.tree_util.keystr(path).encode()))
        if spec.init == "zeros":
            return jnp.zeros(spec.shape, dtype)
        if spec.init == "ones":
            return jnp.ones(spec.shape, dtype)
        std = spec.scale or max(spec.fan_in, 1) ** -0.5
        return (std * jax.random.normal(key, spec.shape, jnp.float32)).astype(dtype)

    return jax.tree_util.tree_map_with_path(one, specs, is_leaf=is_spec)


def abstract(specs: Any, dtype: Any = jnp.float32) -> Any:
    """ShapeDtypeStructs of `specs`."""
    return map_specs(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), specs)


def count(specs: Any) -> int:
    """Number of scalar parameters."""
    return sum(s.size for s in jax.tree.leaves(specs, is_leaf=is_spec))
