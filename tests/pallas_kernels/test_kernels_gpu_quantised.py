"""Decode over int8, int4 and fp8 caches on Hopper: what the shared suite leaves out, and what the compiler says.

The loops of reference.py are the oracle, in the interpreter, at the sizes the suite has no room for: more tiles than
stages, several chunks of rows, scales of V over many powers of two, stores without scales. The compiler's report (no
GPU needed) is of real sizes: registers, spills, shared memory, and that nothing of the cache's size is moved.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import KV, KernelError, Leaf, Options, gpu, problem, reference
from pallas_kernels.gpu import aot, quantised
from tests.helpers import kernel_cases
from tests.helpers.kernel_cases import Case
from tests.helpers.tolerances import KERNEL_BF16, KERNEL_DIGITS, KERNEL_F16, KERNEL_STATS, close

needs_gpu_jax = pytest.mark.skipif(not gpu.AVAILABLE, reason="Mosaic GPU kernels need JAX 0.11 or later")
THREADS = 128  # one warpgroup a block

INT8 = dict(store="int8", v_lanes=True)
INT4 = dict(store="int4", v_lanes=True)
FP8 = dict(store="float8_e4m3fn", v_lanes=True, dtype="float16")
CASES = {
    "int8_long": Case(**INT8, slots=1024, lengths=(1024, 900, 5), splits=2),
    "int8_rows_48": Case(**INT8, heads=48, k_heads=1, v_heads=1, lengths=(250,)),
    "int8_rows_20": Case(**INT8, heads=20, k_heads=1, v_heads=1, lengths=(250, 64)),
    "int8_uneven_heads": Case(**INT8, heads=12, k_heads=2, v_heads=3),
    "int8_wide_values": Case(**INT8, key_dim=64, value_dim=256, lengths=(200, 3)),
    "int8_soft_cap_padding": Case(**INT8, soft_cap=2.0, padded_row=True),
    "int8_ring": Case(**INT8, ring=100, ring_sinks=3, window=100, sinks=3, slots=128, lengths=(251, 77, 1)),
    "int8_second_half": Case(**INT8, start=256, lengths=(500, 257, 3)),
    "int8_f16": Case(**INT8, dtype="float16"),
    "int8_empty": Case(**INT8, lengths=(256, 0)),
    "int4_long_window": Case(**INT4, slots=1024, lengths=(1024, 900, 70), window=300, sinks=130, splits=2, tokens=2),
    "int4_rows_48": Case(**INT4, heads=24, k_heads=1, v_heads=1, tokens=2, lengths=(250,)),
    "int4_width_256": Case(**INT4, key_dim=256, value_dim=256, lengths=(200, 3)),
    "int4_width_64": Case(**INT4, key_dim=64, value_dim=64, slots=384, lengths=(384, 100)),
    "int4_pages_odd": Case(**INT4, page=64, slots=192, lengths=(192, 100)),
    "int4_rows_20": Case(**INT4, heads=20, k_heads=1, v_heads=1, lengths=(250, 64)),
    "int4_soft_cap_ring": Case(
        **INT4, ring=100, ring_sinks=3, window=100, sinks=3, slots=128, lengths=(251, 77, 1), soft_cap=2.0
    ),
    "int4_second_half": Case(**INT4, start=256, lengths=(500, 257, 3)),
    "int4_pages_128": Case(**INT4, page=128, slots=512, lengths=(500, 130, 1)),
    "fp8_long": Case(**FP8, slots=1024, lengths=(1024, 900, 5), splits=3),
    "fp8_bf16_q": Case(**FP8 | dict(dtype="bfloat16"), tokens=2, lengths=(256, 77, 2)),
    "fp8_rows_32": Case(**FP8, heads=32, k_heads=1, v_heads=1, lengths=(250,)),
    "fp8_pages_odd": Case(**FP8, page=64, slots=192, lengths=(192, 100)),
}


def _equals(name, q, kv, positions, options, tolerance):
    want = reference.decode_attention(q, kv, positions, options)
    p = problem(q, kv, options)
    assert quantised.supports(p) is None
    got = jax.jit(lambda *args: quantised.run(*args, p, True))(q, kv, positions)
    close(got.out, want.out, tolerance, f"{name} out")
    close(got.max, want.max, KERNEL_STATS, f"{name} max")
    close(got.sum, want.sum, KERNEL_STATS, f"{name} sum")


@needs_gpu_jax
@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_the_loops(name):
    case = CASES[name]
    _equals(name, *kernel_cases.build(case), KERNEL_DIGITS if case.store.startswith("int") else KERNEL_F16)


@needs_gpu_jax
@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
def test_scales_of_values_over_many_powers_of_two(name, rng):
    """Weights times scales are rounded to 16 bits: neither 1e-6 nor 1e6 may vanish or overflow, nor a zero scale."""
    case = dataclasses.replace(kernel_cases.CASES[name], lengths=(256, 77))
    q, kv, positions, options = kernel_cases.build(case)
    powers = np.exp2(rng.integers(-20, 21, kv.v.scale.shape)).astype(np.float32)
    powers[0, 0] = np.float32(1e-6)
    powers[0, 1, 3] = 0
    kv = dataclasses.replace(kv, v=dataclasses.replace(kv.v, scale=jnp.asarray(powers)))
    want = reference.decode_attention(q, kv, positions, options)
    got = jax.jit(lambda *args: quantised.run(*args, problem(q, kv, options), True))(q, kv, positions)
    size = np.abs(np.asarray(want.out)).max(-1, keepdims=True)
    close(np.asarray(got.out) / size, want.out / size, KERNEL_BF16, "out")
    close(got.sum, want.sum, KERNEL_STATS, "sum")


@needs_gpu_jax
@pytest.mark.parametrize("store,tolerance", [("int8", KERNEL_F16), ("int4", KERNEL_DIGITS)])
def test_a_flat_tail_below_one_large_weight_is_not_rounded_away(store, tolerance):
    """Weights of 1.4e-6 of the largest, 1023 of them with values seven times as large: one percent of the result."""
    q = jnp.zeros((1, 1, 1, 64), jnp.bfloat16).at[..., 0].set(1)
    k = jnp.zeros((1, 1, 1024, 64), jnp.int8).at[:, :, 0, 0].set(1).astype(store)
    v = jnp.full((1, 1, 64, 1024), 7, jnp.int8).at[..., 0].set(1).astype(store)
    kv = KV(Leaf(k), Leaf(v, lanes=True), jnp.array([1024], jnp.int32))
    _equals("tail", q, kv, jnp.array([[1023]], jnp.int32), Options(13.5), tolerance)


@needs_gpu_jax
@pytest.mark.parametrize("name", ["int4", "fp8"])
def test_a_store_without_scales(name):
    q, kv, positions, options = kernel_cases.build(kernel_cases.CASES[name])
    bare = KV(Leaf(kv.k.values), Leaf(kv.v.values, lanes=True), kv.length)
    options = dataclasses.replace(options, scale=options.scale * float(np.mean(kv.k.scale)))
    want = reference.decode_attention(q, bare, positions, options)
    got = jax.jit(lambda *args: quantised.run(*args, problem(q, bare, options), True))(q, bare, positions)
    size = np.abs(want.out).max()
    close(got.out / size, want.out / size, KERNEL_DIGITS if name == "int4" else KERNEL_F16, "out")
    close(got.sum, want.sum, KERNEL_STATS, "sum")


@pytest.mark.parametrize(
    "change,words",
    [
        (dict(v_lanes=False), r"V as \[B,heads,V,S\] \(v_lanes=True\)"),
        (dict(k_lanes=True), r"K as \[B,heads,S,H\] \(k_lanes=False\)"),
        (dict(dtype="float32"), "use bfloat16 or float16"),
        (dict(key_dim=96), "head dims are 96 and 128"),
        (dict(page=16), "pages hold 16 tokens"),
        (dict(slots=240), "240 slots"),
        (dict(store="int4", slots=192), "192 slots of int4 are not a multiple of 128"),
        (dict(store=""), "both must be one of int8, int4, float8_e4m3fn"),
    ],
)
def test_what_it_cannot_serve_it_says(change, words):
    q, kv, _, options = kernel_cases.build(dataclasses.replace(kernel_cases.CASES["int8"], **change))
    with pytest.raises(KernelError, match=words):
        raise KernelError(quantised.supports(problem(q, kv, options)))


# --- what the compiler says -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Size:
    """Llama-3-8B's layer by default. `blocks`: of one warpgroup each, that must fit on one multiprocessor."""

    store: str
    blocks: int = 3
    batch: int = 8
    tokens: int = 1
    heads: int = 32
    k_heads: int = 8
    dim: int = 128
    slots: int = 8192
    page: int = 0
    window: int = 0
    dtype: str = "bfloat16"


SIZES = {
    f"{name}_{what}": Size(store, **change)
    for name, store in (("int8", "int8"), ("int4", "int4"), ("fp8", "float8_e4m3fn"))
    for what, change in {
        "gqa": {},
        "mqa_16": dict(heads=16, k_heads=1, blocks=2),
        "tokens_4": dict(tokens=4, blocks=2),
        "width_64": dict(dim=64),
        "pages_64": dict(page=64),
        "pages_128_window": dict(page=128, window=1024),
    }.items()
} | {
    "int8_rows_32": Size("int8", heads=32, k_heads=1, blocks=2),
    "int8_rows_24": Size("int8", heads=24, k_heads=1, blocks=2),
    "int4_rows_32": Size("int4", heads=32, k_heads=1, blocks=2),
    "fp8_rows_32": Size("float8_e4m3fn", heads=32, k_heads=1, blocks=2),
    "int8_width_256": Size("int8", heads=32, k_heads=1, dim=256, blocks=1),
    "int4_width_256": Size("int4", heads=16, k_heads=2, dim=256, blocks=2),
    "fp8_width_256": Size("float8_e4m3fn", heads=16, k_heads=1, dim=256, blocks=1),
}


def _arguments(size: Size):
    lead = (size.batch * size.slots // size.page + 5, size.k_heads) if size.page else (size.batch, size.k_heads)
    held, width = size.page or size.slots, size.dim
    scale = aot.abstract(*lead, held, dtype="float32")
    k = Leaf(aot.abstract(*lead, held, width, dtype=size.store), scale)
    v = Leaf(aot.abstract(*lead, width, held, dtype=size.store), scale, True)
    table = aot.abstract(size.batch, size.slots // size.page, dtype="int32") if size.page else None
    q = aot.abstract(size.batch, size.tokens, size.heads, width, dtype=size.dtype)
    kv = KV(k, v, aot.abstract(size.batch, dtype="int32"), table)
    options = Options(width**-0.5, size.window, 4 if size.window else 0)
    return q, kv, aot.abstract(size.batch, size.tokens, dtype="int32"), options


@needs_gpu_jax
@pytest.mark.parametrize("name", SIZES)
def test_compiles_for_an_h200(name):
    size = SIZES[name]
    q, kv, positions, options = _arguments(size)
    p = problem(q, kv, options)
    assert quantised.supports(p) is None
    report = aot.compile_report(lambda *args: quantised.run(*args, p, False), q, kv, positions)
    print(
        f"{name}: {report.registers} registers, {report.shared_bytes} bytes shared, {report.spill_bytes} spilled, "
        f"{report.ctas_a_core(THREADS)} blocks an SM, {report.temp_bytes} bytes temporary, {report.seconds:.1f} s"
    )
    assert report.spill_bytes == 0
    assert report.shared_bytes <= aot.SHARED_BLOCK
    assert report.ctas_a_core(THREADS) >= size.blocks
    elements = size.batch * size.slots * size.k_heads * size.dim
    cache = 2 * elements * {"int4": 4}.get(size.store, 8) // 8
    assert not report.moved(elements // 8), "something of the cache's size is moved outside the kernel"
    assert report.temp_bytes <= cache // 3
