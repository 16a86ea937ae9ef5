"""Which platform the function being traced will run on, for the kernels that exist on one only.

The default backend, unless said otherwise: a program compiled ahead of time for another machine is traced within
`target.of("tpu")`, and a test that runs a kernel in its interpreter within `target.of("tpu", interpret=True)`. What
was traced is cached by jax.jit, so each target needs a function of its own.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax

from kvattn.errors import UserError

_TARGET: contextvars.ContextVar[tuple[str, Any] | None] = contextvars.ContextVar("kvattn_target", default=None)


@contextlib.contextmanager
def of(platform: str, interpret: Any = False) -> Iterator[None]:
    """Traces for `platform` (cpu, gpu, tpu); `interpret`: kernels run in their interpreter on CPU."""
    token = _TARGET.set((platform, interpret))
    try:
        yield
    finally:
        _TARGET.reset(token)


@contextlib.contextmanager
def default(platform: str) -> Iterator[None]:
    """`of(platform)`, unless a target is set already."""
    with contextlib.nullcontext() if _TARGET.get() else of(platform):
        yield


def platform() -> str:
    """cpu, gpu or tpu."""
    return (_TARGET.get() or (jax.default_backend(),))[0]


def interpret() -> Any:
    """What kernels get as `interpret`."""
    active = _TARGET.get()
    return active[1] if active else False


def need(field: str, kernel: str, platform_name: str) -> None:
    """Raises UserError if the kernel's platform is not the target."""
    if platform() != platform_name:
        raise UserError(f"{field} is {kernel!r}, a kernel for {platform_name}, and this is a {platform()}; use xla.")
