"""Axis D: caches as values. `create`, `append`, `read`; see base.py for the contract."""

from kvattn.cache.base import Cache, append, create, layout, nbytes, read, specs

__all__ = ["Cache", "append", "create", "layout", "nbytes", "read", "specs"]
