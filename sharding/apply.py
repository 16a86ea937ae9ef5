"""Applies a rule table: shardings of trees of specs, and constraints inside traced functions."""

import contextlib
import contextvars
import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.rules import Rules, ShardingError

_ACTIVE: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar("kvattn_rules", default=None)


def partition_spec(axes: tuple[str, ...], rules: Rules, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The PartitionSpec of an array with logical `axes`.

    Raises ShardingError for an unknown name, a mesh axis used twice, or a dim its mesh axes do not divide.
    """
    out, used = [], set()
    for name, size in zip(axes, shape, strict=True):
        if name not in rules:
            raise ShardingError(f"logical axis {name!r} is in no row of the rule table; add it or fix the name.")
        target = rules[name]
        mesh_axes = () if target is None else (target,) if isinstance(target, str) else tuple(target)
        for mesh_axis in mesh_axes:
            if mesh_axis not in mesh.shape:
                raise ShardingError(f"logical axis {name!r} maps to {mesh_axis!r}, which the mesh lacks; "
                                    f"its axes are {', '.join(mesh.axis_names)}.")
            if mesh_axis in used:
                raise ShardingError(f"axes {axes} put two dims on mesh axis {mesh_axis!r}; change one row.")
            used.add(mesh_axis)
        parts = math.prod(mesh.shape[a] for a in mesh_axes)
        if size % parts:
            raise ShardingError(f"{name} is {size}, not divisible by {parts}, the size of mesh axes {mesh_axes}; "
                                "change the mesh, or take a rule table that replicates it.")
        out.append(target)
    return PartitionSpec(*out)


def named(specs: Any, mesh: Mesh, rules: Rules) -> Any:
    """NamedShardings of a tree whose leaves have `.shape` and `.axes` (kvattn.spec.ParamSpec)."""
    return jax.tree.map(
        lambda s: NamedSharding(mesh, partition_spec(s.axes, rules, s.shape, mesh)),
        specs,
        is_leaf=lambda s: hasattr(s, "axes") and hasattr(s, "shape"),
    )


@contextlib.contextmanager
def use_rules(mesh: Mesh, rules: Rules):
    """Makes `constrain` effective while a function is traced. Jit the function inside the same context."""
    token = _ACTIVE.set((mesh, rules))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Pins x to the layout its logical axes have in the active table; identity when none is active."""
    active = _ACTIVE.get()
    if active is None:
        return x
    mesh, rules = active
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, partition_spec(axes, rules, x.shape, mesh)))
