"""The chip table: what one accelerator can compute, hold and move. Every figure carries its source.

    >>> CHIPS["v5e"].peak_flops / CHIPS["v5e"].hbm_bandwidth     # FLOPs per byte at the ridge
    240.53...

Peaks are dense bf16 (NVIDIA's sheets print the sparse figure, twice as large).
`interconnect_bandwidth` is what a chip can send in one direction over all its links together;
vendors quote both directions added up, so their "bidirectional" figure is halved here. That is the
`bw` of the collective formulas in Pope et al., arXiv 2211.05102, section 3.1. One TPU chip may be
more than one JAX device (v4, v5p in non-megacore mode, tpu7x: two); `devices_per_chip` says how
many, and all other figures are per chip.

`torus_axes` and `max_chips` say what the links join. A TPU chip has two links (one each way) per
torus axis; eight SXM GPUs share one NVSwitch, where any chip reaches any other at full bandwidth,
and beyond the eight there is only the network, which this table does not have.

There is no table row for a CPU, because CPUs differ: `measure_cpu()` times this machine.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp

GB, GIB, TERA = 10**9, 2**30, 10**12


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    peak_flops              bf16 FLOP/s, dense
    hbm_bytes               bytes of device memory
    hbm_bandwidth           bytes/s between device memory and the chip
    interconnect_bandwidth  bytes/s sent by one chip over all links, one direction; 0 = no link
    devices_per_chip        JAX devices one chip shows up as
    source                  where the figures come from
    torus_axes              axes of the torus: 3 or 2; 0 = all to all through a switch
    max_chips               chips that the links join in one slice or node
    """

    name: str
    peak_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    interconnect_bandwidth: float
    devices_per_chip: int
    source: str
    torus_axes: int = 0
    max_chips: int = 1


_TPU_DOCS = "https://docs.cloud.google.com/tpu/docs/"
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"

CHIPS = {
    # 275 TFLOP/s, 32 GiB at 1200 GB/s: Google's v4 page; it gives no link bandwidth, Pope et al.
    # (2211.05102, section 3.1) give 270 GB/s. Megacore (the default on v4 and v5p) makes a chip
    # one device. 4096 chips a pod, linked to the neighbours in three dimensions (same page).
    "v4": Chip("v4", 275 * TERA, 32 * GIB, 1200 * GB, 270 * GB, 1, _TPU_DOCS + "v4; arXiv 2211.05102", 3, 4096),
    # 197 TFLOP/s, 16 GB, 819 GB/s (the current page rounds to 800 GiB/s), 400 GB/s both directions;
    # 256 chips a pod, 2D torus.
    "v5e": Chip("v5e", 197 * TERA, 16 * GB, 819 * GB, 200 * GB, 1, _TPU_DOCS + "v5e", 2, 256),
    # 459 TFLOP/s, 95 GiB, 2765 GB/s, 1200 GB/s both directions; 3D torus, 8960 chips a pod of which
    # one slice takes at most 6144.
    "v5p": Chip("v5p", 459 * TERA, 95 * GIB, 2765 * GB, 600 * GB, 1, _TPU_DOCS + "v5p-training", 3, 6144),
    # 918 TFLOP/s, 32 GB, 1638 GB/s, 800 GB/s both directions; 256 chips a pod, 2D torus, 4 links.
    "v6e": Chip("v6e", 918 * TERA, 32 * GB, 1638 * GB, 400 * GB, 1, _TPU_DOCS + "v6e", 2, 256),
    # 2307 TFLOP/s, 192 GiB, 7380 GB/s, 1200 GB/s both directions; two devices (chiplets) per chip;
    # 9216 chips a pod, 3D torus.
    "tpu7x": Chip("tpu7x", 2307 * TERA, 192 * GIB, 7380 * GB, 600 * GB, 2, _TPU_DOCS + "tpu7x", 3, 9216),
    # SXM: 1979 TFLOP/s with sparsity = 989.5 dense, 80 GB, 3.35 TB/s, NVLink 900 GB/s both
    # directions, eight to an HGX or DGX node.
    "H100": Chip("H100", 989.5 * TERA, 80 * GB, 3350 * GB, 450 * GB, 1, _NVIDIA + "h100 (SXM)", 0, 8),
    # SXM: 1979 TFLOP/s with sparsity = 989.5 dense, 141 GB, 4.8 TB/s, NVLink 900 GB/s both
    # directions, eight to an HGX or DGX node.
    "H200": Chip("H200", 989.5 * TERA, 141 * GB, 4800 * GB, 450 * GB, 1, _NVIDIA + "h200 (SXM)", 0, 8),
}

# `jax.Device.device_kind`, whole and in lower case -> row. Whole, because a GH200 or an H100 PCIe
# card has other figures than the SXM boards above.
_KINDS = {
    "tpu v4": "v4",
    "tpu v5 lite": "v5e",
    "tpu v5e": "v5e",
    "tpu v5": "v5p",
    "tpu v5p": "v5p",
    "tpu v6 lite": "v6e",
    "tpu v6e": "v6e",
    "tpu7x": "tpu7x",
    "nvidia h100 80gb hbm3": "H100",
    "nvidia h200": "H200",
}


def of_device(device: jax.Device) -> Chip | None:
    """The table row of `device`, or None where the table has none (every CPU, for instance)."""
    name = _KINDS.get(device.device_kind.lower())
    return CHIPS[name] if name else None


def measure_cpu(n: int = 1024, repeats: int = 5) -> Chip:
    """A Chip row timed on this machine's CPU: an f32 [n,n] x [n,n] matmul and a sum over 256 MiB.

    `peak_flops` is therefore float32 (what this package computes in on a CPU), and both figures
    are what XLA reached, the best of `repeats`, not a data sheet's. `hbm_bytes` is 0: not
    measured.
    """
    cpu = jax.devices("cpu")[0]
    a = jax.device_put(jnp.ones((n, n), jnp.float32), cpu)
    big = jax.device_put(jnp.ones((64, 1 << 20), jnp.float32), cpu)
    matmul = _best_seconds(jax.jit(lambda x: x @ x), a, repeats)
    read = _best_seconds(jax.jit(lambda x: x.sum(axis=1)), big, repeats)
    return Chip(
        name="cpu",
        peak_flops=2 * n**3 / matmul,
        hbm_bytes=0,
        hbm_bandwidth=big.nbytes / read,
        interconnect_bandwidth=0,
        devices_per_chip=1,
        source=f"measured: f32 matmul of {n}, f32 sum over {big.nbytes >> 20} MiB, best of {repeats}",
    )


def _best_seconds(f, x: jax.Array, repeats: int) -> float:
    jax.block_until_ready(f(x))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(f(x))
        seconds.append(time.perf_counter() - start)
    return min(seconds)
