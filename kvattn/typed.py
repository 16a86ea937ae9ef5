"""Shapes in public signatures, checked where the environment asks for it.

    @shaped
    def attend(q: Float[Array, "B T N H"], k: Float[Array, "B K S H"]) -> Float[Array, "B T N V"]: ...

The annotations are the docstrings' letters. With KVATTN_CHECK_SHAPES=1 (the test session sets it, before the first
import) every call binds them, under jit, grad and vmap too: B twice with two sizes raises. Without it `shaped` returns
the function as it is. Inside a shard_map arrays have one chip's part of each dim, and nothing is checked.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar

from sharding import one_chip

CHECK = os.environ.get("KVATTN_CHECK_SHAPES") == "1"
F = TypeVar("F", bound=Callable[..., Any])


def shaped(f: F) -> F:
    """f, its annotations checked at every call where KVATTN_CHECK_SHAPES=1. Raises jaxtyping.TypeCheckError there."""
    if not CHECK:
        return f
    from beartype import beartype
    from jaxtyping import jaxtyped

    checked = jaxtyped(f, typechecker=beartype)

    @functools.wraps(f)
    def run(*args, **kwargs):
        return (f if one_chip() else checked)(*args, **kwargs)

    return run
