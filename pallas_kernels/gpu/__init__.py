"""Decode kernels for Hopper GPUs (Mosaic GPU); `supports` says what they serve, `run` runs one.

Which kernel is a rule, not a choice: codes of 8 bits and fewer go to `quantised`, a V that is a view of K to `latent`,
all else to `dense`. None stands in for another: what the one cannot serve is refused.
"""

from typing import Any

import jax

from pallas_kernels.codes import bits
from pallas_kernels.contract import KV, Partial, Problem
from pallas_kernels.gpu import _api, dense, latent, quantised

AVAILABLE = _api.AVAILABLE


def kernel_of(p: Problem) -> Any:
    """The module that serves stores of this kind."""
    if bits(p.k_dtype) <= 8 or bits(p.v_dtype) <= 8:
        return quantised
    return latent if p.view else dense


def supports(p: Problem) -> str | None:
    """None if a kernel serves `p`, else why not."""
    return kernel_of(p).supports(p) if AVAILABLE else _api.REASON


def run(q: jax.Array, kv: KV, positions: jax.Array, p: Problem, interpret: Any) -> Partial:
    """Partial of q[B,T,N,H] at positions[B,T] over `kv`; `supports(p)` must be None."""
    return kernel_of(p).run(q, kv, positions, p, interpret)
