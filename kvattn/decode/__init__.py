"""Decoding: generation on one device (generate.py), sampling, and passes over a torus of chips (partitioned.py)."""
