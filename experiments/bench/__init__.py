"""Benchmarks of kernels and of decoding, and the peers beside them."""
