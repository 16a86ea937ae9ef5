"""Experiment configs: one file each, loaded by path (`--config=configs/x.py`) or imported by another."""
