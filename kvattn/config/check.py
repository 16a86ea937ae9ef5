"""Rules of configs: each raises UserError with one sentence that names the field, the value and the fix."""

import math
from typing import Any

from kvattn.errors import UserError

CODES = ("int8", "int4", "float8_e4m3fn")  # dtypes of a cache that are codes with scales


def need(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


def choice(value: Any, valid: Any, field: str) -> None:
    need(value in tuple(valid), f"{field} is {value!r}; choose one of {', '.join(valid)}.")


def at_least(config: Any, section: str, **bounds: float) -> None:
    """Each named field is a number of at least its bound (NaN and infinity are none)."""
    for name, low in bounds.items():
        value = getattr(config, name)
        need(value >= low and value < math.inf, f"{section}.{name} is {value}; it must be at least {low}.")
