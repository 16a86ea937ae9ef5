"""The names of `plgpu` that differ between JAX releases, in one place; the other modules use those of 0.11 and later.

JAX 0.10 has Mosaic GPU without its interpreter (`InterpretGPUParams`): there the package imports and refuses to run.
"""

from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.codes import bits

AVAILABLE = hasattr(plgpu, "InterpretGPUParams")  # JAX 0.11 or later
REASON = "Mosaic GPU kernels need JAX 0.11 or later"


def interpreter(interpret: Any) -> Any:
    """What `plgpu.kernel` takes for `interpret`: False, or the interpreter's parameters (True: its defaults)."""
    return plgpu.InterpretGPUParams() if interpret is True else interpret


def tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory laid out for TMA and warpgroup matmuls: tiles of 8 rows, swizzled."""
    width = bits(dtype)
    swizzle = plgpu.find_swizzle(shape[-1] * width)
    transforms = (plgpu.TilingTransform((8, swizzle * 8 // width)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)
