"""The machine behind a figure: device, cores, versions of what computed it, date.

Importing this module imports no package, so that a worker beside torch, which has no jax, may.
"""

import importlib.metadata
import os
import pathlib
import platform
import resource
import time
from typing import Any

PACKAGES = ("jax", "jaxlib", "numpy")


def describe() -> dict[str, Any]:
    """{date, device, cores, versions} of this process; device as "8 x NAME", a CPU by its model's name."""
    import jax

    device = jax.devices()[0]
    name = cpu_name() if device.platform == "cpu" else device.device_kind
    return {
        "date": now(),
        "device": f"{jax.device_count()} x {name}",
        "cores": os.cpu_count(),
        "versions": versions(*PACKAGES),
    }


def accelerator() -> dict[str, Any]:
    """{device_kind, platform, accelerator} of the first device; accelerator is false on a CPU."""
    import jax

    chip = jax.devices()[0]
    return {"device_kind": chip.device_kind, "platform": chip.platform, "accelerator": chip.platform != "cpu"}


def versions(*packages: str) -> dict[str, str]:
    """Versions of python and of those `packages` that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def now() -> str:
    """The local time, to the second."""
    return time.strftime("%Y-%m-%d %H:%M:%S")


def cpu_name() -> str:
    """The model name that Linux gives, else what Python knows."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "cpu"


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
