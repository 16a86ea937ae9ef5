"""Workloads: what a model asks of a machine, as numbers; the input of the cost model, free of arrays and configs.

    one = layer_of(specs, leaves, n_heads=64, score_dim=128, value_dim=128)      # of a layer's parameters and cache
    work = Workload(d_model=4096, vocab=64000, layers=(dataclasses.replace(one, count=32),))

`layer_of` asks parameters and cache leaves for their logical axes, never for their names, so that any family of
attention can be costed: a weight whose first axis is `embed` reads the residual stream, a weight whose last axis is
`embed` writes it, any other stands in between; the other axes say over which mesh axes it is split. Letters as in the
design: D model width, N query heads, F MLP width, W vocabulary.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from sharding.layout.rules import ShardingError
from sharding.layout.torus_layouts import CACHE_AXES, PARAMETER_AXES

RESIDUALS = ("serial", "parallel", "ladder")
PER = ("token", "sequence")
ROLES = ("key", "value", "both", "state")
# Bits per element, and bytes of the scale that each token and head of a leaf carries.
KV_TYPES = {"float32": (32, 0), "bfloat16": (16, 0), "fp8": (8, 2), "int8": (8, 2), "int4": (4, 2)}
WEIGHT_BYTES = {"bfloat16": 2, "int8": 1}  # int8: one scale per output channel, under 0.1 % of the bytes


@dataclasses.dataclass(frozen=True)
class Weight:
    """A matrix: its shape, and the logical axis of every dim."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def reads(self) -> bool:
        """Whether it projects the residual stream."""
        return self.axes[0] == "embed"

    @property
    def writes(self) -> bool:
        """Whether it projects back to the residual stream."""
        return not self.reads and self.axes[-1] == "embed"

    @property
    def heads(self) -> str:
        """The axis at its inner end: what an input projection leads to, what an output projection comes from."""
        return self.axes[min(1, len(self.axes) - 1)] if self.reads else self.axes[0]

    @property
    def width(self) -> int:
        """Elements per token at its inner end."""
        return self.size // (self.shape[0] if self.reads else self.shape[-1])


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What one token (or one sequence) leaves in a cache. `axes`: a logical axis per dim of `shape`; `role`: one of
    ROLES; `dtype`: a key of KV_TYPES, or empty for the workload's."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    per: str = "token"
    role: str = "both"
    dtype: str = ""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def heads(self) -> int:
        """Heads that it keeps apart; 1 where it has no axis of heads."""
        return math.prod(n for n, axis in zip(self.shape, self.axes, strict=True) if axis == "cache_heads")


@dataclasses.dataclass(frozen=True)
class Layer:
    """`count` layers that are alike.

    weights      its matrices; `extra` elements (norms, biases) are held by every chip
    leaves       of the cache that it reads, its own or its owner's
    n_heads      query heads that attend over keys, each multiplying `score_dim` and `value_dim` numbers a key (C + R
                 and C for an absorbed latent); 0 = no attention
    token_flops  FLOPs per token beside weights and keys, such as the update and the reading of a state
    visible      keys that a query sees, window and sinks together; 0 = all
    slots        tokens the owner's cache holds at most, a ring's; 0 = all
    norms        norms over D; `kv_norm`: one of them is in front of k and v alone
    """

    weights: tuple[Weight, ...]
    leaves: tuple[Leaf, ...] = ()
    count: int = 1
    owner: bool = True
    n_heads: int = 0
    score_dim: int = 0
    value_dim: int = 0
    token_flops: float = 0
    visible: int = 0
    slots: int = 0
    extra: int = 0
    norms: int = 2
    kv_norm: bool = False

    @property
    def elements(self) -> int:
        """Scalar parameters of one such layer."""
        return sum(w.size for w in self.weights) + self.extra

    @property
    def mixers(self) -> tuple[Weight, ...]:
        """The matrices outside the MLP."""
        return tuple(w for w in self.weights if "mlp" not in w.axes)

    @property
    def mlp(self) -> tuple[Weight, ...]:
        return tuple(w for w in self.weights if "mlp" in w.axes)

    def read_into(self, axis: str) -> int:
        """Elements per token that the input projections leading to `axis` make."""
        return sum(w.width for w in self.weights if w.reads and w.heads == axis)

    def written_from(self, axis: str) -> int:
        """Elements per token that the output projections coming from `axis` take."""
        return sum(w.width for w in self.weights if w.writes and w.heads == axis)

    def stored(self, per: str) -> tuple[Leaf, ...]:
        """The leaves that are one per token, or one per sequence."""
        return tuple(leaf for leaf in self.leaves if leaf.per == per)

    def held(self, context: int) -> int:
        """Slots of the owner's cache at `context` tokens."""
        return min(self.slots or context, context)

    def seen(self, context: int) -> int:
        """Keys that one query is charged for."""
        return min(self.visible or context, context)


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model. `residual`: serial, parallel (attention and MLP read one input and add into one sum) or ladder (a
    module's reduction is awaited only after the next module). `counted_params`: N of the 2N FLOPs per token in MFU,
    without padded heads (0 = all parameters). `norm_means`: means over D in a norm, 1 (RMS) or 2."""

    d_model: int
    vocab: int
    layers: tuple[Layer, ...]
    tied: bool = True
    residual: str = "serial"
    extra: int = 0
    weight_bytes: float = 2
    act_bytes: float = 2
    kv_bits: int = 16
    kv_scale_bytes: int = 0
    counted_params: int = 0
    norm_means: int = 1

    @property
    def n_params(self) -> int:
        """Scalar parameters."""
        tables = self.vocab * self.d_model * (1 if self.tied else 2)
        return tables + self.extra + sum(layer.count * layer.elements for layer in self.layers)

    @property
    def k_heads(self) -> int:
        """Heads of the keys, or of the states where nothing keeps keys; 0 = no cache. Raises ShardingError where
        layers differ."""
        return self._cache_heads("key", "both") or self._cache_heads("state")

    @property
    def v_heads(self) -> int:
        """Heads of the values; those of the keys where a key is also the value. Raises ShardingError where layers
        differ."""
        return self._cache_heads("value") or self.k_heads

    def _cache_heads(self, *roles: str) -> int:
        found = sorted({leaf.heads for one in self.layers for leaf in one.leaves if leaf.role in roles})
        if len(found) > 1:
            raise ShardingError(
                f"leaves of role {' or '.join(roles)} have {', '.join(map(str, found))} heads; one rule table splits "
                "them all, so give every layer as many."
            )
        return found[0] if found else 0

    def dims(self) -> dict[str, int]:
        """Sizes of the dims that a rule table splits; 0 where the model has no such dim. Where layers differ, what
        divides all of them."""
        sizes = {"mlp": 0, "q_heads": 0}
        for weight in (w for one in self.layers for w in one.weights):
            for size, axis in zip(weight.shape, weight.axes, strict=True):
                if axis in sizes:
                    sizes[axis] = math.gcd(sizes[axis], size)
        return {"embed": self.d_model, "vocab": self.vocab, **sizes, "k_heads": self.k_heads, "v_heads": self.v_heads}

    def leaf_bytes(self, leaf: Leaf) -> float:
        """Bytes that one token (or one sequence) has in a leaf: codes, and a scale per head."""
        bits, scale = KV_TYPES[leaf.dtype] if leaf.dtype else (self.kv_bits, self.kv_scale_bytes)
        return leaf.size * bits / 8 + leaf.size // leaf.shape[-1] * scale


# --- from parameters and leaves --------------------------------------------------------------------------


def layer_of(specs: Any, leaves: Mapping[str, Any], **numbers: Any) -> Layer:
    """A Layer from a tree of parameter specs (`shape`, `axes`, `fan_in`: 0 for what is no matrix) and from the leaves
    of the cache that it reads (`shape`, `axes`, `per`, `role`, `dtype` or None). `numbers`: the other fields of Layer,
    which no parameter tells.

    Raises ShardingError, naming it: an axis, a role or a type that is unknown, a weight with D in its middle.
    """
    weights, extra = [], 0
    for path, spec in jax.tree_util.tree_flatten_with_path(specs, is_leaf=_is_spec)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        _known("weight", name, spec.axes, PARAMETER_AXES)
        if not spec.fan_in:
            extra += math.prod(spec.shape)
            continue
        if "embed" in spec.axes[1:-1]:
            raise ShardingError(f"weight {name} has axes {', '.join(spec.axes)}; put embed first or last.")
        weights.append(Weight(tuple(spec.shape), tuple(spec.axes)))
    kept = tuple(_leaf(name, one) for name, one in leaves.items())
    return Layer(tuple(weights), kept, extra=extra, **numbers)


def _is_spec(x: Any) -> bool:
    return hasattr(x, "axes") and hasattr(x, "shape")


def _leaf(name: str, leaf: Any) -> Leaf:
    _known("leaf", name, (axis for axis in leaf.axes if axis is not None), CACHE_AXES)  # None: never split
    dtype = "" if leaf.dtype is None else str(leaf.dtype)
    for field, value, valid in (("per", leaf.per, PER), ("role", leaf.role, ROLES), ("dtype", dtype, ("", *KV_TYPES))):
        if value not in valid:
            raise ShardingError(f"leaf {name} has {field} {value!r}; choose one of {', '.join(filter(None, valid))}.")
    return Leaf(tuple(leaf.shape), tuple(leaf.axes), leaf.per, leaf.role, dtype)


def _known(kind: str, name: str, axes: Iterable[str], valid: tuple[str, ...]) -> None:
    for axis in axes:
        if axis not in valid:
            raise ShardingError(
                f"{kind} {name} has axis {axis!r}, which the cost model cannot place; its axes are {', '.join(valid)}."
            )
