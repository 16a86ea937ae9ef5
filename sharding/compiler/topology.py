"""TPU slices by name, as compile-only devices of this machine's libtpu: no TPU is needed.

    >>> slice_ = parse_slice("v4:4x4x4")
    >>> slice_.chips, slice_.devices
    (64, 64)
    >>> mesh_of(slice_, default_mesh(slice_.devices))      # jax Mesh, axes x, y, z

A slice is `generation:AxB` (v5e, v6e: a 2D torus) or `generation:AxBxC` (v4, v5p, tpu7x: 3D). On v4 and v5p a chip's
two cores form one device ("megacore", the way the paper and every current framework run them); on tpu7x a chip is
two devices, so that a mesh on it has twice as many members as the slice has chips.
"""

import dataclasses
import itertools
import math
from typing import Any

import jax
import numpy as np

from sharding.cost.hardware import CHIPS, Chip
from sharding.layout.rules import ShardingError

AXES = ("x", "y", "z")


@dataclasses.dataclass(frozen=True)
class _Generation:
    name: str  # as get_topology_desc spells it
    dims: int
    largest: int  # chips that libtpu knows
    config: str | None = None  # chip_config_name


_GENERATIONS = {
    "v4": _Generation("v4", 3, 4096, "megacore"),
    "v5e": _Generation("v5e", 2, 256),
    "v5p": _Generation("v5p", 3, 8960),
    "v6e": _Generation("v6e", 2, 256),
    "tpu7x": _Generation("tpu7x", 3, 9216),
}
_EXAMPLES = "v4:4x4x4, v5e:4x4, v5p:2x2x1, v6e:16x16 or tpu7x:2x2x1"

# (x, y, z) by number of devices: the paper's code ("Efficiently Scaling Transformer Inference", arXiv 2211.05102).
_DEFAULT_MESHES = {
    1: (1, 1, 1),
    2: (2, 1, 1),
    4: (2, 2, 1),
    8: (2, 2, 2),
    16: (2, 4, 2),
    32: (4, 2, 4),
    64: (4, 4, 4),
    128: (8, 4, 4),
    256: (4, 8, 8),
    512: (8, 8, 8),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A named slice: `generation` is its row in `hardware.CHIPS`, `topology` the chips along each torus axis."""

    generation: str
    topology: tuple[int, ...]

    @property
    def name(self) -> str:
        """As `parse_slice` reads it."""
        return f"{self.generation}:{'x'.join(map(str, self.topology))}"

    @property
    def chip(self) -> Chip:
        """The data sheet's row."""
        return CHIPS[self.generation]

    @property
    def chips(self) -> int:
        """Chips of the slice."""
        return math.prod(self.topology)

    @property
    def devices(self) -> int:
        """JAX devices of the slice: members of a mesh over it."""
        return self.chips * self.chip.devices_per_chip


def parse_slice(name: str) -> Slice:
    """The Slice called `name`. Raises ShardingError, with examples, for an unknown generation, a topology of the
    wrong rank or not of positive integers, or one too large or too odd for the generation."""
    generation, colon, topology = str(name).partition(":")
    sizes = topology.split("x")
    if generation not in _GENERATIONS or not colon:
        raise ShardingError(f"slice {name!r} is not a known TPU generation and topology; write {_EXAMPLES}.")
    row = _GENERATIONS[generation]
    if len(sizes) != row.dims or not all(s.isascii() and s.isdigit() and int(s) > 0 for s in sizes):
        form = "x".join("ABC"[: row.dims])
        raise ShardingError(f"slice {name!r} needs a topology {form} of {row.dims} chip counts; write {_EXAMPLES}.")
    shape = tuple(int(s) for s in sizes)
    if math.prod(shape) > row.largest:
        raise ShardingError(f"slice {name!r} has more than the {row.largest} chips of a {generation} pod; {_EXAMPLES}.")
    if any(s % host for s, host in zip(shape, _host_bounds(shape))):
        raise ShardingError(
            f"slice {name!r} does not divide into hosts of 2x2 chips: make the first two sizes even, as in {_EXAMPLES}."
        )
    return Slice(generation, shape)


def default_mesh(devices: int) -> tuple[int, int, int]:
    """(X, Y, Z) for a device count: the paper's table up to 512, near-cubic factors for other powers of two.

    Raises ShardingError for a count that is no power of two.
    """
    if devices in _DEFAULT_MESHES:
        return _DEFAULT_MESHES[devices]
    bits = devices.bit_length() - 1
    if devices < 1 or devices != 1 << bits:
        raise ShardingError(f"no default mesh for {devices} devices; give X, Y, Z whose product is {devices}.")
    x, y = bits // 3, (bits - bits // 3 + 1) // 2
    return 1 << x, 1 << y, 1 << (bits - x - y)


def check_mesh(slice_: Slice, mesh: tuple[int, ...]) -> None:
    """Raises ShardingError unless `mesh` is three positive sizes whose product is the slice's devices."""
    if len(mesh) != 3 or not all(isinstance(s, int) and s > 0 for s in mesh):
        raise ShardingError(f"mesh {mesh} must be three positive sizes X, Y, Z.")
    if math.prod(mesh) != slice_.devices:
        per = slice_.chip.devices_per_chip
        each = f" ({slice_.chips} chips of {per} devices)" if per > 1 else ""
        try:
            example = f", such as {default_mesh(slice_.devices)}"
        except ShardingError:
            example = ""
        raise ShardingError(
            f"mesh {'x'.join(map(str, mesh))} has {math.prod(mesh)} members but {slice_.name} has {slice_.devices} "
            f"devices{each}; choose X, Y, Z whose product is {slice_.devices}{example}."
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
    row = _GENERATIONS[slice_.generation]
    options = {"chip_config_name": row.config} if row.config else {}
    name = f"{row.name}:{'x'.join(map(str, slice_.topology))}"
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=name, chips_per_host_bounds=_host_bounds(slice_.topology), **options
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


def _host_bounds(topology: tuple[int, ...]) -> tuple[int, int, int]:
    """Chips per host: 2x2x1, less where the slice is smaller than a host."""
    return tuple(min(2, s) for s in topology[:2]) + (1,)
