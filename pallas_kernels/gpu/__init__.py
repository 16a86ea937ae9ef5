"""Decode kernels for GPU; `supports` says what they serve, `run` runs one."""

from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.contract import Partial, Problem

AVAILABLE = hasattr(plgpu, "InterpretGPUParams")  # JAX 0.11 or later


def supports(p: Problem) -> str | None:
    """None if a kernel serves `p`, else why not."""
    return "no kernel is written yet"


def run(q, kv, positions, p: Problem, interpret) -> Partial:
    raise NotImplementedError
