"""Device meshes with explicit axis types."""

from typing import Any

import jax

from sharding.layout.rules import ShardingError


def make_mesh(config: Any, devices: Any = None) -> jax.sharding.Mesh:
    """The data x fsdp x tensor mesh of `config` (fields data, fsdp, tensor), Auto axes.

    Raises ShardingError when the product is not the number of devices in use.
    """
    shape = (config.data, config.fsdp, config.tensor)
    devices = jax.devices() if devices is None else devices
    total = shape[0] * shape[1] * shape[2]
    if total > len(devices):
        raise ShardingError(
            f"mesh is data={shape[0]} x fsdp={shape[1]} x tensor={shape[2]} = {total} devices but only "
            f"{len(devices)} are there; make the product at most {len(devices)}."
        )
    types = (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=types, devices=devices[:total])
