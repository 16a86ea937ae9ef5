"""Decode attention by a kernel that is named: what it cannot serve raises KernelError, nothing is substituted."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import gpu, tpu
from pallas_kernels.contract import KV, KernelError, Options, Partial, Problem, problem


@dataclasses.dataclass(frozen=True)
class Backend:
    """`platform` it compiles for; supports(problem) -> None or why not; run(q, kv, positions, problem, interpret)."""

    platform: str
    supports: Callable[[Problem], str | None]
    run: Callable[..., Partial]


BACKENDS: dict[str, Backend] = {
    "mosaic_tpu": Backend("tpu", tpu.supports, tpu.run),
    "mosaic_gpu": Backend("gpu", gpu.supports, gpu.run),
}


def why_not(backend: str, p: Problem) -> str | None:
    """None if `backend` serves `p`; else one sentence with the limit and the kernels that can."""
    if p.view and p.v_heads != p.k_heads:
        return "V as a view of K has K's heads"
    reason = BACKENDS[backend].supports(p)
    if reason is None:
        return None
    able = [name for name, other in BACKENDS.items() if name != backend and other.supports(p) is None]
    return f"kernel {backend} cannot serve this: {reason}; {' and '.join([*able, 'xla'])} can."


def decode_attention(
    q: jax.Array, kv: KV, positions: jax.Array, options: Options, *, backend: str, interpret: Any = False
) -> Partial:
    """Attention of q[B,T,N,H] at positions[B,T] int32 (-1 = padding, gets out 0 and sum 0) over `kv`, as a Partial.

    `interpret`: run the kernel on CPU (True, or the interpreter's parameters). Raises KernelError for what the kernel
    cannot serve and for an unknown name. Equations: reference.py.
    """
    if backend not in BACKENDS:
        raise KernelError(f"there is no decode kernel {backend!r}; choose one of {', '.join(BACKENDS)}.")
    p = problem(q, kv, options)
    reason = why_not(backend, p)
    if reason:
        raise KernelError(reason)
    if kv.k.channel and kv.k.scale is not None:
        if kv.v is None:
            raise KernelError("V is a view of K and K has a scale per channel; use one per token and head.")
        per_head = jnp.repeat(kv.k.scale[:, :, 0], p.heads // p.k_heads, axis=1)  # [B,N,H]: (q s) . code = q . (s code)
        q = (q.astype(jnp.float32) * per_head[:, None]).astype(q.dtype)
        kv = dataclasses.replace(kv, k=dataclasses.replace(kv.k, scale=None, channel=False))
    return BACKENDS[backend].run(q, kv, positions, p, interpret)
