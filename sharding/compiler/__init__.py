"""Compilers asked without hardware: TPU programs compiled ahead of time, read and diagnosed."""
