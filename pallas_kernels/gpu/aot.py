"""What the compiler says of a Mosaic GPU kernel for an H200, without one: registers, spills, shared memory, copies.

    >>> report = compile_report(fn, abstract(4096, 128), donate_argnums=(0,))
    >>> report.registers, report.spill_bytes, report.shared_bytes, report.ctas_a_core(threads=256)

Needs the CUDA plugin of JAX 0.11 or later (no GPU, no NVIDIA libraries). Mosaic lowers the kernel to PTX and ptxas to
machine code, as on the GPU; what ptxas prints goes to the process's standard output from C++, so that it is read there
by file descriptor while the one compilation runs. Nothing is timed: there is no clock here.
"""

import contextlib
import dataclasses
import functools
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pallas_kernels.contract import KernelError

CORES = 132  # streaming multiprocessors of an H200
REGISTERS = 65536  # 32-bit registers of one
SHARED = 233472  # bytes of shared memory of one
SHARED_BLOCK = 232448  # of those, what one CTA may take
RESERVED = 1024  # bytes of shared memory each CTA costs besides
THREADS = 2048

_TARGET = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 151397597184 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024
  thread_dim_limit_z: 64 device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability 9.0a"
  name: "NVIDIA H200 141GB HBM3e" driver_version: "13.0.0" runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200 141GB HBM3e"
"""
_DUMPS = ("MOSAIC_GPU_DUMP_PTXAS", "MOSAIC_GPU_DUMP_RESOURCES")
_LOCK = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One Mosaic kernel: `registers` a thread, `spill_bytes` stored or loaded a thread, `stack_bytes` a thread,
    `shared_bytes` a CTA (barriers included; of several kernels in one program, the largest)."""

    name: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int

    def ctas_a_core(self, threads: int) -> int:
        """How many CTAs of `threads` fit on one streaming multiprocessor."""
        per_thread = -(-self.registers // 8) * 8
        return min(REGISTERS // (per_thread * threads), SHARED // (self.shared_bytes + RESERVED), THREADS // threads)


@dataclasses.dataclass(frozen=True)
class Report:
    """One compiled program. The figures of its kernels are the largest of any; memory is in bytes."""

    seconds: float
    kernels: tuple[Kernel, ...]
    temp_bytes: int
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    hlo_text: str

    @property
    def registers(self) -> int:
        return max(k.registers for k in self.kernels)

    @property
    def spill_bytes(self) -> int:
        return max(k.spill_bytes for k in self.kernels)

    @property
    def shared_bytes(self) -> int:
        return max(k.shared_bytes for k in self.kernels)

    def ctas_a_core(self, threads: int) -> int:
        """CTAs of `threads` of the largest kernel that fit on one streaming multiprocessor."""
        return min(k.ctas_a_core(threads) for k in self.kernels)

    def moved(self, elements: int) -> list[str]:
        """Instructions outside kernels that write at least `elements` elements by copying, transposing, converting,
        padding, slicing, concatenating or fusing: a decode step over a cache has none of the cache's size."""
        moves = ("copy", "transpose", "convert", "pad", "slice", "concatenate", "fusion", "gather", "copy-start")
        found = []
        for line in self.hlo_text.splitlines():
            match = re.match(r"\s*(?:ROOT )?%?([\w.-]+) = \(?\w+\[([\d,]*)\]\S* ([\w-]+)\(", line)
            if match and match[3] in moves:
                size = 1
                for n in filter(None, match[2].split(",")):
                    size *= int(n)
                if size >= elements:
                    found.append(f"{match[3]} {match[1]}[{match[2]}]")
        return found


@functools.cache
def h200() -> SingleDeviceSharding:
    """The sharding of one H200 that need not be there. Raises KernelError without the plugin."""
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=_TARGET, topology_name="h200", topology="1x1x1"
        )
    except Exception as error:  # a missing plugin is a RuntimeError, an old one a NotImplementedError or TypeError
        raise KernelError(f"compiling for an H200 needs jax-cuda13-plugin of JAX 0.11 or later: {error}") from None
    return SingleDeviceSharding(topology.devices[0])


def abstract(*shape: int, dtype: Any = "bfloat16") -> jax.ShapeDtypeStruct:
    """An argument [shape] on that H200."""
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=h200())


def compile_report(fn: Any, *args: Any, donate_argnums: tuple[int, ...] = ()) -> Report:
    """Compiles fn(*args) for an H200; `args` are trees of jax.ShapeDtypeStruct (any sharding) or arrays.

    Raises KernelError when there is no plugin, or when ptxas reported no kernel.
    """
    device = h200()
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), args)
    begin = time.perf_counter()
    with _printed() as text:
        compiled = jax.jit(fn, donate_argnums=donate_argnums, out_shardings=device).lower(*args).compile()
    seconds = time.perf_counter() - begin
    kernels = parse(text[0])
    if not kernels:
        raise KernelError("the compiled program has no Mosaic GPU kernel.")
    memory = compiled.memory_analysis()
    return Report(
        seconds,
        kernels,
        memory.temp_size_in_bytes,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        compiled.as_text(),
    )


def parse(text: str) -> tuple[Kernel, ...]:
    """The kernels in what Mosaic (one line of resources a kernel, in any order) and ptxas (registers, spills) print."""
    shared = max((_shared(line) for line in text.splitlines() if line.startswith("Resources(")), default=0)
    parts = re.split(r"Compiling entry function '([^']+)'", text)[1:]
    kernels = []
    for name, body in zip(parts[::2], parts[1::2], strict=True):
        stack, stores, loads = (
            int(re.search(rf"(\d+) bytes {what}", body)[1]) for what in ("stack frame", "spill stores", "spill loads")
        )
        kernels.append(Kernel(name, int(re.search(r"Used (\d+) registers", body)[1]), stores + loads, stack, shared))
    return tuple(kernels)


def _shared(line: str) -> int:
    """Scratch rounded to 8 bytes, and 8 bytes a barrier."""
    scratch = int(re.search(r"smem_scratch_bytes=(\d+)", line)[1])
    barriers = sum(int(n) * int(count) for n, count in re.findall(r"num_barriers=(\d+)[^)]*\): (\d+)", line))
    return -(-scratch // 8) * 8 + 8 * barriers


@contextlib.contextmanager
def _printed() -> Iterator[list[str]]:
    """What this process writes to descriptors 1 and 2 inside, with Mosaic told to print; in [0] afterwards. Text
    of others that falls in between is not lost to them on an error: it is written out again."""
    text: list[str] = []
    with _LOCK, tempfile.TemporaryFile() as file:
        saved, before = [os.dup(1), os.dup(2)], {name: os.environ.get(name) for name in _DUMPS}
        _flush()
        os.environ.update(dict.fromkeys(_DUMPS, "1"))
        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield text
        finally:
            _flush()
            for descriptor, held in zip((1, 2), saved, strict=True):
                os.dup2(held, descriptor)
                os.close(held)
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
            file.seek(0)
            text.append(file.read().decode(errors="replace"))
            if sys.exc_info()[0] is not None:
                sys.stderr.write(text[0])


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
