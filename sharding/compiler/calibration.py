"""One clock per chip: what turns the TPU compiler's estimated cycles into seconds.

Three programs are compiled alone for one device: a 1 GiB float32 add-one (limited by HBM), the same elements in
bfloat16 (limited by the vector unit, in the compiler's model) and a bfloat16 16384^3 matmul. The data sheet's
bandwidth and peak say how long the first and the last must take, so each implies a clock:

    copy_clock   = cycles of the float32 copy / (bytes read and written / HBM bandwidth)
    matmul_clock = cycles of the matmul / (FLOPs / peak)

Where the compiler thinks that the one kind of work falls short of its data sheet by more than the other, the two
differ. `clock` is the slower one, which gives the longer times. Times are then right at the data sheet for that kind
of work and pessimistic by the ratio of the two for the other. `vector_clock`, from the bfloat16 copy, is only what
the doctor compares element-wise operations with.

    v4, libtpu 0.0.48: copy 1.330 GHz, matmul 1.120 GHz -> 1.120 GHz
"""

import dataclasses
import importlib.metadata
import math

from sharding.compiler import topology
from sharding.compiler.hlo_costs import analyse
from sharding.cost.slices import Slice

_COPY_SHAPE = (2**15, 2**13)  # float32: 1 GiB
_MATMUL = 2**14


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Cycles of the three programs and the clocks (Hz) that they imply at the data sheet of `chip`."""

    chip: str
    libtpu: str
    copy_cycles: int
    copy_clock: float
    vector_clock: float
    matmul_cycles: int
    matmul_clock: float

    @property
    def clock(self) -> float:
        """Cycles per second used for every time."""
        return min(self.copy_clock, self.matmul_clock)


def versions() -> dict[str, str]:
    """The versions that decide what the compiler says."""
    return {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}


def calibrate(slice_: Slice) -> Calibration:
    """Compiles the three programs (about 2 s) for one device of `slice_`'s generation."""
    import jax
    import jax.numpy as jnp

    chip = slice_.row
    one = jax.sharding.SingleDeviceSharding(topology.devices_of(slice_)[0])

    def cycles(fn, *args: tuple) -> int:
        shapes = [jax.ShapeDtypeStruct(shape, dtype, sharding=one) for shape, dtype in args]
        return round(sum(analyse(jax.jit(fn).lower(*shapes).compile().as_text(), {"x": 1}).cycles().values()))

    elements, square = math.prod(_COPY_SHAPE), ((_MATMUL, _MATMUL), jnp.bfloat16)
    second = chip.hbm_bandwidth / chip.devices_per_chip  # bytes
    copied = cycles(lambda a: a + 1, (_COPY_SHAPE, jnp.float32))
    vector = cycles(lambda a: a + 1, (_COPY_SHAPE, jnp.bfloat16))
    multiplied = cycles(lambda a, b: a @ b, square, square)
    return Calibration(
        chip=slice_.chip,
        libtpu=versions()["libtpu"],
        copy_cycles=copied,
        copy_clock=copied / (2 * 4 * elements / second),
        vector_clock=vector / (2 * 2 * elements / second),
        matmul_cycles=multiplied,
        matmul_clock=multiplied / (2 * _MATMUL**3 / (chip.peak_flops / chip.devices_per_chip)),
    )
