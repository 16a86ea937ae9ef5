"""Axis A: the attention families, a file each. Importing this registers them; a line here is all that a new one needs
beside its file."""

from kvattn.attention.dispatch import gate
from kvattn.attention.family import Family, Softmax
from kvattn.attention.heads import Heads
from kvattn.attention.none import NoAttention

__all__ = ["Family", "Heads", "NoAttention", "Softmax", "gate"]
