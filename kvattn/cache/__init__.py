"""Axis D: caches as values, leaves x an address. `create`, `append`, `read`, `truncate`: store.py; `settle`, what a
keep-policy leaves after a prefill: keep/."""

from kvattn.cache.address import Address, Full, Kept, Paged, Ring
from kvattn.cache.keep import Observed, Policy, Queries, settle, settled_specs
from kvattn.cache.leaf import LeafSpec
from kvattn.cache.leaf import per_sequence as states
from kvattn.cache.leaf import per_token as token_leaves
from kvattn.cache.store import (
    Cache,
    Groups,
    append,
    apply_pages,
    axes,
    check_store,
    create,
    is_paged,
    kind_of,
    layout,
    nbytes,
    parts,
    pool_pages,
    read,
    slots_for,
    specs,
    stored,
    truncate,
)

__all__ = [
    "Address",
    "Cache",
    "Full",
    "Groups",
    "Kept",
    "LeafSpec",
    "Observed",
    "Paged",
    "Policy",
    "Queries",
    "Ring",
    "append",
    "apply_pages",
    "axes",
    "check_store",
    "create",
    "is_paged",
    "kind_of",
    "layout",
    "nbytes",
    "parts",
    "pool_pages",
    "read",
    "slots_for",
    "settle",
    "settled_specs",
    "specs",
    "states",
    "stored",
    "token_leaves",
    "truncate",
]
