"""TPU slices as compile-only devices of this machine's libtpu: no TPU is needed.

>>> where = tpu_slice("v4:4x4x4")
>>> mesh_of(where, default_mesh(where.devices))      # jax Mesh, axes x, y, z
"""

import itertools
import math
from typing import Any

import jax
import numpy as np

from sharding.cost.slices import Slice, default_mesh, host_bounds, parse_slice
from sharding.layout.rules import ShardingError
from sharding.layout.torus_layouts import AXES

_CONFIGS = {"v4": {"chip_config_name": "megacore"}}  # what get_topology_desc is told beside the slice's name


def tpu_slice(name: str) -> Slice:
    """The slice called `name`. Raises ShardingError as `parse_slice` does, and for GPUs, which have no such compiler
    here."""
    found = parse_slice(name)
    if not found.is_tpu:
        raise ShardingError(f"slice {name!r} is not a known TPU generation and topology; write one such as v4:4x4x4.")
    return found


def check_mesh(slice_: Slice, mesh: tuple[int, ...]) -> None:
    """Raises ShardingError unless `mesh` is three positive sizes whose product is the slice's devices."""
    if len(mesh) != 3 or not all(isinstance(s, int) and s > 0 for s in mesh):
        raise ShardingError(f"mesh {mesh} must be three positive sizes X, Y, Z.")
    if math.prod(mesh) != slice_.devices:
        per = slice_.row.devices_per_chip
        each = f" ({slice_.chips} chips of {per} devices)" if per > 1 else ""
        raise ShardingError(
            f"mesh {'x'.join(map(str, mesh))} has {math.prod(mesh)} members but {slice_.name} has {slice_.devices} "
            f"devices{each}; choose X, Y, Z whose product is {slice_.devices}, such as "
            f"{default_mesh(slice_.devices)}."
        )


def devices_of(slice_: Slice) -> list[Any]:
    """The slice's compile-only devices. Raises ShardingError where libtpu is missing or does not know the slice.

    libtpu reads its environment when it is first loaded (`aot.environment`), and aborts the process on some
    compiler errors: programs are compiled in a child (`aot.Compiler`).
    """
    from jax.experimental import topologies

    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise ShardingError("libtpu is not installed; pip install 'kvattn[tpu]' (it needs no TPU).") from None
    try:
        described = topologies.get_topology_desc(
            platform="tpu",
            topology_name=slice_.name,
            chips_per_host_bounds=host_bounds(slice_.shape),
            **_CONFIGS.get(slice_.chip, {}),
        )
    except Exception as error:  # jax raises JaxRuntimeError, libtpu ValueError or RuntimeError
        reason = str(error).strip().split("\n")[0]
        raise ShardingError(f"libtpu does not accept the slice {slice_.name}: {reason}") from error
    return list(described.devices)


def mesh_of(slice_: Slice, mesh: tuple[int, int, int]) -> jax.sharding.Mesh:
    """A jax Mesh with Auto axes x, y, z of these sizes over the slice's compile-only devices.

    Each mesh axis is laid along whole axes of the torus where the sizes allow it, else a torus axis is split.
    Raises ShardingError: sizes that do not multiply to the slice's devices, libtpu missing.
    """
    check_mesh(slice_, mesh)
    return jax.sharding.Mesh(
        arrange(devices_of(slice_), mesh), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES)
    )


def arrange(devices: list[Any], mesh: tuple[int, int, int]) -> np.ndarray:
    """`devices` as an array of shape `mesh`: each mesh axis along whole torus axes (or a chip's cores) where the
    sizes multiply so, the slowest first; else as jax splits them, else in the torus's own order."""
    from jax.experimental import mesh_utils

    places = np.array([(*d.coords[::-1], d.core_on_chip) for d in devices])  # z, y, x, core
    torus = np.empty(places.max(axis=0) + 1, object)
    torus[tuple(places.T)] = devices
    sizes = torus.shape
    for owners in itertools.product(range(len(mesh)), repeat=len(sizes)):
        if tuple(math.prod(s for s, o in zip(sizes, owners) if o == axis) for axis in range(len(mesh))) == mesh:
            return torus.transpose(sorted(range(len(sizes)), key=lambda dim: owners[dim])).reshape(mesh)
    try:
        return mesh_utils.create_device_mesh(mesh, devices, allow_split_physical_axes=True)
    except (NotImplementedError, ValueError):
        return torus.reshape(mesh)
