"""Every tolerance of the tests, once, with its reason. A test imports a name from here; none writes a number.

`close(got, want, TOLERANCE)` is the one comparison. float32 has 24 bits (6e-8 relative), bfloat16 8 (4e-3).
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """|got - want| <= atol + rtol * |want|, element by element."""

    atol: float
    rtol: float
    reason: str


EXACT = Tolerance(0.0, 0.0, "the same operations in the same order; any difference is a bug")
F32_OP = Tolerance(1e-5, 1e-5, "one float32 operator against a float64 loop: sums of some tens of terms, ~100 ulp")
F32_MODEL = Tolerance(5e-5, 5e-5, "float32 forward of a few layers summed in another order")
F32_DECODE = Tolerance(1e-4, 1e-4, "prefill + decode against one forward: softmax over another number of slots")
F32_GRAD = Tolerance(1e-4, 1e-3, "float32 gradients: two passes, reductions over batch and positions")
F32_SHARDED = Tolerance(1e-4, 1e-4, "the same float32 sums split over 8 devices and reduced in another order")
LOSS_SHARDED = Tolerance(2e-5, 2e-5, "a mean over hundreds of float32 tokens, several optimizer steps in")
BF16_CACHE = Tolerance(5e-2, 5e-2, "K and V rounded to bfloat16 (8 bits) at unit scale, a few layers deep")
F16_CACHE = Tolerance(
    1e-2, 1e-2, "K and V less their mean rounded to float16 (11 bits) at unit scale, a few layers deep"
)
CODES_STEP = Tolerance(0.0, 5e-3, "relative RMS: float32 noise moves a value over a rounding edge")
INT8_CACHE = Tolerance(0.0, 5e-2, "relative RMS of logits, random weights: K and V within 1/254 of a token's largest")
FP8_CACHE = Tolerance(0.0, 2e-1, "relative RMS of logits: K and V in 3 bits of mantissa, random weights")
INT4_CACHE = Tolerance(0.0, 6e-1, "relative RMS of logits: K and V within 1/14 of each token's largest, random weights")
BF16_MODEL = Tolerance(1e-1, 1e-1, "bfloat16 activations throughout, a few layers deep")
HF_TINY = Tolerance(1e-4, 1e-4, "acceptance: random-weight transformers models, float32, prefill and decode")
HF_SMOLLM2 = Tolerance(2e-3, 2e-3, "acceptance: SmolLM2-135M on 512 tokens against transformers, logits up to ~30")
ACCOUNT_FLOPS = Tolerance(0.0, 2e-2, "the ledger counts matmuls; XLA's count adds norms, softmax and rotary")
CLOSED_FORM = Tolerance(0.0, 1e-12, "the same float64 formula, its terms added in another order")
AOT_LOOP = Tolerance(0.0, 3e-2, "estimated cycles: a scan's entry and exit copies, other prefetching when unrolled")
AOT_CLOCK = Tolerance(0.0, 3e-2, "a matmul of another shape than the one the clock was calibrated on")
KERNEL_BF16 = Tolerance(1e-2, 1e-2, "probabilities rounded to bfloat16 before the second matmul; float32 sums")
KERNEL_F16 = Tolerance(2e-3, 2e-3, "probabilities rounded to float16 before the second matmul; float32 sums")
KERNEL_MODEL = Tolerance(5e-2, 5e-2, "a bfloat16 model of two layers, probabilities rounded at another place")
KERNEL_STATS = Tolerance(1e-3, 5e-3, "max and sum of the softmax, float32, of bfloat16 products; exp2 for exp")
KERNEL_DIGITS = Tolerance(5e-5, 5e-5, "q and probabilities in integer digits, 18 bits or more; int32 and float32 sums")


def close(got, want, tolerance: Tolerance, what: str = "") -> None:
    """Asserts `got` is `want` within `tolerance`; shapes must agree, NaN anywhere fails."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape, f"{what} shape {got.shape} != {want.shape}"
    if got.dtype.kind not in "fiub":
        got = got.astype(np.float32)
    if want.dtype.kind not in "fiub":
        want = want.astype(np.float32)
    assert not np.isnan(got).any(), f"{what} has NaN"
    np.testing.assert_allclose(
        got, want, atol=tolerance.atol, rtol=tolerance.rtol, err_msg=f"{what} ({tolerance.reason})"
    )


def apart(got, want):
    """Relative RMS."""
    got, want = np.asarray(got), np.asarray(want)
    return np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))
