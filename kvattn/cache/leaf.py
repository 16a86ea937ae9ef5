"""What a family leaves in a cache, declared: `{name: LeafSpec}`. Caches, ledger, sharding and kernels ask these fields,
never a leaf's name. As it is held, a leaf is a `pallas_kernels.Leaf` (values, optional scales, lanes)."""

import dataclasses
import math

from kvattn.config.check import choice, need

PER = ("token", "sequence")
ROLES = ("key", "value", "both", "state")
AXES = ("cache_heads", "cache_dim")  # logical axes that a leaf's dims may have (sharding's tables); None = never split


@dataclasses.dataclass(frozen=True)
class LeafSpec:
    """One leaf. `per` token: shape (heads, dim) of what one token leaves, heads un-repeated; per sequence: the shape of
    a state that every pass rewrites. `role`: key | value | both (K whose columns are V too) | state. `dtype`: "" = the
    store's; a state is float32 unless it says otherwise.

    Raises UserError: an unknown `per`, role or axis, a shape that does not fit its axes.
    """

    shape: tuple[int, ...]
    per: str = "token"
    axes: tuple[str | None, ...] = AXES
    role: str = "both"
    dtype: str = ""

    def __post_init__(self):
        choice(self.per, PER, "leaf.per")
        choice(self.role, ROLES, "leaf.role")
        for axis in self.axes:
            need(axis is None or axis in AXES, f"leaf.axes has {axis!r}; choose from {', '.join(AXES)} and None.")
        need(len(self.axes) == len(self.shape), f"leaf.axes is {self.axes} for shape {self.shape}; name each dim once.")
        need(all(n > 0 for n in self.shape), f"leaf.shape is {self.shape}; every dim must be positive.")
        need(
            (self.role == "state") == (self.per == "sequence"),
            "leaf.role is state where, and only where, per is sequence.",
        )
        need(
            self.per == "sequence" or len(self.shape) == 2, f"leaf.shape is {self.shape}; per token it is (heads, dim)."
        )

    @property
    def size(self) -> int:
        """Numbers held a token, or a sequence."""
        return math.prod(self.shape)


def per_token(leaves: dict[str, LeafSpec]) -> dict[str, LeafSpec]:
    return {name: leaf for name, leaf in leaves.items() if leaf.per == "token"}


def per_sequence(leaves: dict[str, LeafSpec]) -> dict[str, LeafSpec]:
    return {name: leaf for name, leaf in leaves.items() if leaf.per == "sequence"}
