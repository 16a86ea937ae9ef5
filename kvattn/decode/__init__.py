"""Decoding: generation on one device (generation.py), sampling, and passes over a torus of chips (partitioned.py)."""

from kvattn.decode.generation import Generated, decode_step, encode_prompt, generate, prefill

__all__ = ["Generated", "decode_step", "encode_prompt", "generate", "prefill"]
