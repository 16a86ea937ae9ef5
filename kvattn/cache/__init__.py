"""Axis D: caches as values. `create`, `append`, `read`; see base.py for the contract."""

from kvattn.cache.base import Cache, append, axes, create, is_paged, kv, layout, nbytes, pool_pages, read, specs, stored

__all__ = [
    "Cache",
    "append",
    "axes",
    "create",
    "is_paged",
    "kv",
    "layout",
    "nbytes",
    "pool_pages",
    "read",
    "specs",
    "stored",
]
