"""Slices: which chips a machine has and how they are joined, by name; and the meshes laid over them.

    >>> where = parse_slice("v5p:2x2x4")
    >>> where.chips, where.hosts, where.devices
    (16, 4, 16)
    >>> default_mesh(where.chips)
    (2, 4, 2)

A slice is `generation:AxB` (v5e, v6e: a 2D torus), `generation:AxBxC` (v4, v5p, tpu7x: 3D), `H100:8` (GPUs of one node)
or `H200:4x8` (nodes x GPUs a node). On v4 and v5p a chip's two cores form one device ("megacore", the way the paper and
every current framework run them); on tpu7x a chip is two devices, so that a mesh on it has twice as many members as
the slice has chips.
"""

import dataclasses
import math
import re

from sharding.cost.hardware import CHIPS, Chip
from sharding.layout.rules import ShardingError

# Chips that one slice of a TPU may have: what libtpu compiles for, on v5p more than can be rented (Chip.max_chips).
TPUS = {"v4": 4096, "v5e": 256, "v5p": 8960, "v6e": 256, "tpu7x": 9216}
GPUS = tuple(name for name, chip in CHIPS.items() if not chip.torus_axes)
_EXAMPLES = "v4:4x4x4, v5e:4x4, v5p:2x2x1, v6e:16x16 or tpu7x:2x2x1"

# (X, Y, Z) by number of chips: the authors' code of Pope et al., arXiv 2211.05102.
DEFAULT_MESHES = {
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
    """`hosts` machines of `per_host` chips each. `chip`: a row of `hardware.CHIPS`; `shape`: the chips along each axis
    of the torus, or (nodes, GPUs a node)."""

    chip: str
    shape: tuple[int, ...]
    hosts: int
    per_host: int

    @property
    def topology(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def name(self) -> str:
        """As `parse_slice` reads it."""
        return f"{self.chip}:{self.topology}"

    @property
    def is_tpu(self) -> bool:
        return self.chip in TPUS

    @property
    def row(self) -> Chip:
        """The data sheet's row."""
        return CHIPS[self.chip]

    @property
    def chips(self) -> int:
        return self.hosts * self.per_host

    @property
    def devices(self) -> int:
        """JAX devices of all hosts: members of a mesh over the slice."""
        return self.chips * self.row.devices_per_chip

    @property
    def is_default_shape(self) -> bool:
        """Whether the number of chips alone gives this topology (2D, or the most cubic one of that many chips)."""
        return len(self.shape) == 2 or tuple(sorted(self.shape)) == min(
            (shape for shape in factorisations(self.chips) if list(shape) == sorted(shape)), key=sum
        )


def parse_slice(name: str) -> Slice:
    """The Slice called `name`. Chips per host: 4 in 2x2 of a plane; on v5e and v6e 8 where the slice is 2x4.

    Raises ShardingError, with examples, for an unknown chip, a topology of the wrong rank or not of positive integers,
    or one too large or too odd for its generation.
    """
    chip, colon, topology = str(name).partition(":")
    sizes = topology.split("x")
    if chip in GPUS and colon:
        return _gpus(name, chip, sizes)
    if chip not in TPUS or not colon:
        raise ShardingError(f"slice {name!r} is not a known TPU generation and topology; write {_EXAMPLES}.")
    axes, largest = CHIPS[chip].torus_axes, TPUS[chip]
    if len(sizes) != axes or not all(s.isascii() and s.isdigit() and int(s) > 0 for s in sizes):
        form = "x".join("ABC"[:axes])
        raise ShardingError(f"slice {name!r} needs a topology {form} of {axes} chip counts; write {_EXAMPLES}.")
    shape = tuple(map(int, sizes))
    chips, bounds = math.prod(shape), host_bounds(shape)
    if chips > largest:
        raise ShardingError(f"slice {name!r} has more than the {largest} chips of a {chip} pod; {_EXAMPLES}.")
    if any(s % host for s, host in zip(shape, bounds)):
        raise ShardingError(
            f"slice {name!r} does not divide into hosts of 2x2 chips: make the first two sizes even, as in {_EXAMPLES}."
        )
    per_host = chips if axes == 2 and chips <= 8 else math.prod(bounds)
    return Slice(chip, shape, chips // per_host, per_host)


def _gpus(name: str, chip: str, sizes: list[str]) -> Slice:
    most = CHIPS[chip].max_chips
    shape = tuple(map(int, sizes)) if all(re.fullmatch(r"[1-9]\d{0,3}", size, re.ASCII) for size in sizes) else ()
    nodes, gpus = (1, *shape) if len(shape) == 1 else shape if len(shape) == 2 else (0, 0)
    if not nodes or gpus > most:
        raise ShardingError(f"slice {name!r}: write {chip}:GPUS or {chip}:NODESxGPUS with at most {most} GPUs a node.")
    return Slice(chip, (nodes, gpus), nodes, gpus)


def host_bounds(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Chips along each axis of a TPU host: 2x2x1, less where the slice is smaller than a host."""
    return tuple(min(2, s) for s in shape[:2]) + (1,)


# --- meshes ----------------------------------------------------------------------------------------------


def factorisations(n: int) -> tuple[tuple[int, int, int], ...]:
    """Every (X, Y, Z) with X Y Z = n, in ascending order. Raises ShardingError for n below 1."""
    if n < 1:
        raise ShardingError(f"chips is {n}; it must be at least 1.")
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    return tuple((x, y, n // x // y) for x in divisors for y in divisors if n // x % y == 0)


def default_mesh(n: int) -> tuple[int, int, int]:
    """The paper's mesh for n chips, or for other n the factorisation nearest to a cube (large axes last). Raises
    ShardingError for n below 1."""
    return DEFAULT_MESHES.get(n) or min(factorisations(n), key=lambda m: (max(m) / min(m), max(m), m))
