"""Axis D, which tokens are kept: a policy a file. Importing this registers them; a line here is all that a new one
needs beside its file."""

from kvattn.cache.keep.all import KeepAll
from kvattn.cache.keep.base import Observed, Policy, Queries, Site
from kvattn.cache.keep.last import KeepLast
from kvattn.cache.keep.settle import settle, settled_specs

__all__ = ["KeepAll", "KeepLast", "Observed", "Policy", "Queries", "Site", "settle", "settled_specs"]
