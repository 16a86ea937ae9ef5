"""Decode kernels for TPU; `supports` says what they serve, `run` runs one."""

from pallas_kernels.contract import Partial, Problem


def supports(p: Problem) -> str | None:
    """None if a kernel serves `p`, else why not."""
    return "no kernel is written yet"


def run(q, kv, positions, p: Problem, interpret) -> Partial:
    raise NotImplementedError
