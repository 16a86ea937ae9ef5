"""Axis A: the projections a config can name in `model.variant`."""

import dataclasses
from collections.abc import Callable

from kvattn.attention import heads


@dataclasses.dataclass(frozen=True)
class Projection:
    """What a variant must provide; caches, masks, kernels and sharding know nothing else about it."""

    param_specs: Callable
    kv_spec: Callable
    kv_axes: Callable
    queries: Callable
    entries: Callable
    expand: Callable
    kernel_kv: Callable
    output: Callable


def _from_module(module) -> Projection:
    return Projection(**{field.name: getattr(module, field.name) for field in dataclasses.fields(Projection)})


VARIANTS = {"heads": _from_module(heads)}
