"""One suite for all decode kernels: every case either equals the loops of reference.py or raises with the reason.

TPU kernels run in the TPU interpreter, in both DMA modes and with NaN in uninitialised memory; GPU kernels in the
Mosaic GPU interpreter (JAX 0.11 or later; before that every case must raise).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import BACKENDS, KernelError, decode_attention, gpu, problem, reference, why_not, with_sink_logits
from tests.helpers import kernel_cases
from tests.helpers.kernel_cases import CASES
from tests.helpers.tolerances import EXACT, KERNEL_BF16, KERNEL_F16, KERNEL_STATS, close

MODES = {
    "mosaic_tpu": {
        mode: pltpu.InterpretParams(dma_execution_mode=mode, uninitialized_memory="nan")
        for mode in ("on_wait", "eager")
    },
    "mosaic_gpu": {"interpreted": True},
}
RUNS = [(backend, mode) for backend, modes in MODES.items() for mode in modes]
# Cases that a backend cannot serve, written out here: everything else must run.
REFUSED = {
    "mosaic_tpu": {"f16", "paged_16", "paged_int8", "paged_int4", "paged_fp8"},
    "mosaic_gpu": {"lanes", "int8_lanes", "paged_16"},
}


@functools.cache
def _case(name):
    q, kv, positions, options = kernel_cases.build(CASES[name])
    return q, kv, positions, options, reference.decode_attention(q, kv, positions, options)


def _refused(backend, name):
    return name in REFUSED[backend] or (backend == "mosaic_gpu" and not gpu.AVAILABLE)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend,mode", RUNS)
def test_kernel_equals_the_loops(backend, mode, name):
    q, kv, positions, options, want = _case(name)
    call = functools.partial(decode_attention, options=options, backend=backend, interpret=MODES[backend][mode])
    if _refused(backend, name):
        with pytest.raises(KernelError, match=f"kernel {backend} cannot serve this: .*; .*xla can"):
            call(q, kv, positions)
        return
    got = jax.jit(call)(q, kv, positions)
    tolerance = KERNEL_F16 if CASES[name].dtype == "float16" else KERNEL_BF16
    close(got.out, want.out, tolerance, f"{backend} {name} out")
    stats = tolerance if CASES[name].channel else KERNEL_STATS  # q times a channel's scale is rounded to q's dtype
    close(got.max, want.max, stats, f"{backend} {name} max")
    close(got.sum, want.sum, stats, f"{backend} {name} sum")


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_case_is_served_or_refused_as_listed(backend):
    for name in CASES:
        q, kv, _, options = kernel_cases.build(CASES[name])
        assert (why_not(backend, problem(q, kv, options)) is not None) == _refused(backend, name), name


def test_learned_sinks_are_one_more_term_of_the_sum(rng):
    q, kv, positions, options = kernel_cases.build(CASES["gqa"])
    logits = rng.normal(size=q.shape[2]).astype(np.float32) * 3
    want = reference.decode_attention(q, kv, positions, options, logits)
    got = with_sink_logits(reference.decode_attention(q, kv, positions, options), jnp.asarray(logits))
    for a, b, what in zip(got, want, ("out", "max", "sum"), strict=True):
        close(a, b, KERNEL_STATS, what)


def test_no_slot_beyond_a_rows_length_is_seen():
    q, kv, positions, options = kernel_cases.build(CASES["gqa"])
    held = np.array(kv.k.values)
    for b, length in enumerate(CASES["gqa"].lengths):
        held[b, :, length:] = 7
    other = jax.tree.map(lambda x: x, kv)
    object.__setattr__(other, "k", type(kv.k)(jnp.asarray(held)))
    close(
        reference.decode_attention(q, other, positions, options).out,
        reference.decode_attention(q, kv, positions, options).out,
        EXACT,
        "out",
    )


@pytest.mark.parametrize(
    "change,words",
    [
        (dict(heads=6, k_heads=4), "do not divide"),
        (dict(key_dim=96, view=True, value_dim=97), "v_dim is 97"),
        (dict(page=64, ring=50, window=50), "ring has no pages"),
    ],
)
def test_what_fits_no_contract_raises(change, words):
    q, kv, positions, options = kernel_cases.build(kernel_cases.Case(**change))
    with pytest.raises(KernelError, match=words):
        decode_attention(q, kv, positions, options, backend="mosaic_tpu", interpret=True)


def test_an_unknown_name_raises():
    q, kv, positions, options = kernel_cases.build(CASES["gqa"])
    with pytest.raises(KernelError, match="no decode kernel 'mosaic_tpi'"):
        decode_attention(q, kv, positions, options, backend="mosaic_tpi")
