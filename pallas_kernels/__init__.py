"""Decode attention kernels for TPU and GPU behind one contract; see README.md and contract.py."""

from pallas_kernels.contract import KV, KernelError, Leaf, Options, Partial, Problem, problem, with_sink_logits
from pallas_kernels.decode import BACKENDS, decode_attention, why_not

__all__ = [
    "BACKENDS",
    "KV",
    "KernelError",
    "Leaf",
    "Options",
    "Partial",
    "Problem",
    "decode_attention",
    "problem",
    "why_not",
    "with_sink_logits",
]
