"""Decode kernels for TPU; `supports` says what they serve, `run` runs one; tuning.py says how they are cut."""

from pallas_kernels.tpu.decode import run, supports

__all__ = ["run", "supports"]
