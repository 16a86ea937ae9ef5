"""What a decode kernel is given and what it gives back; every backend keeps to it.

A step of decoding reads the whole cache once: q[B,T,N,H] of T >= 1 new tokens a row against K and V of all tokens so
far, the new ones included (update first, then attend). What differs between stores is a value here, not another
function:

    Leaf      one named leaf as it is held: bf16, f16, f32, int8, int4 or fp8; tokens along rows or along lanes
    KV        K, V (or V as the first columns of K: latent and tied), lengths, a page table, a ring
    Problem   the static part: shapes, dtypes and options, from which a kernel says whether it can serve
    Partial   softmax over the keys seen, with its max and sum, so that splits, chips and pages merge

Learned sink logits need no kernel: they are one more term of the sum (`with_sink_logits`).
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

NEGATIVE = -1e30  # finite, so that a row with nothing visible has max NEGATIVE and sum 0, never NaN


class KernelError(ValueError):
    """One sentence: what the kernel cannot serve, and what can."""


class Partial(NamedTuple):
    """out[B,T,N,V] float32 (normalised by its own sum), max and sum [B,T,N] float32 (natural exponents)."""

    out: jax.Array
    max: jax.Array
    sum: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of a cache. `values`: [B,heads,S,dim], or with `lanes` [B,heads,dim,S]; in pages [pages,heads,P,dim] or
    [pages,heads,dim,P]. `scale`: None, or float32 [B,heads,S] ([pages,heads,P]) that multiplies a token's values, or
    float32 [B,heads,1,dim] (`channel`) that multiplies a channel of all tokens. `encoding`: hashable, where values and
    scale mean something else, which kernels refuse. Slots that hold no token hold finite values."""

    values: Any
    scale: Any = None
    lanes: bool = dataclasses.field(default=False, metadata={"static": True})
    channel: bool = dataclasses.field(default=False, metadata={"static": True})
    encoding: Any = dataclasses.field(default=None, metadata={"static": True})

    @property
    def heads(self) -> int:
        return self.values.shape[1]

    @property
    def slots(self) -> int:
        """S, or P in pages."""
        return self.values.shape[3 if self.lanes else 2]

    @property
    def dim(self) -> int:
        return self.values.shape[2 if self.lanes else 3]

    @property
    def dtype(self) -> Any:
        return self.values.dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KV:
    """K and V of one layer as a kernel reads them.

    `v` None: V is the first `v_dim` columns of K (MLA's latent, tied heads). `length`[B] int32: tokens each row has
    seen. `table`[B,n] int32: page of tokens [i P, (i+1) P); None where slots are contiguous. `start`: int32 scalar,
    position of slot 0 (slots split over chips). `ring` > 0: slots after `ring_sinks` are a ring of that many.
    """

    k: Leaf
    v: Leaf | None
    length: Any
    table: Any = None
    start: Any = None
    v_dim: int = dataclasses.field(default=0, metadata={"static": True})
    ring: int = dataclasses.field(default=0, metadata={"static": True})
    ring_sinks: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def value_dim(self) -> int:
        return self.v_dim if self.v is None else self.v.dim

    @property
    def slots(self) -> int:
        """Slots of one row."""
        return self.k.slots if self.table is None else self.k.slots * self.table.shape[1]


@dataclasses.dataclass(frozen=True)
class Options:
    """Static options of a call. Key position s is visible to a query at p when 0 <= s <= p and, with `window` > 0,
    p - s < window or s < `sinks` (attention-sink tokens). `soft_cap` > 0: c tanh(score / c). `splits` of the keys
    that are computed apart and merged; 0 = the backend's choice."""

    scale: float
    window: int = 0
    sinks: int = 0
    soft_cap: float = 0.0
    splits: int = 0


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static part of a call: what `supports` decides on. dtypes are names; `page` 0 = contiguous slots; `view`: V
    is the first columns of K."""

    batch: int
    tokens: int
    heads: int
    k_heads: int
    v_heads: int
    key_dim: int
    value_dim: int
    slots: int
    dtype: str
    k_dtype: str
    v_dtype: str
    k_lanes: bool
    v_lanes: bool
    page: int
    view: bool
    ring: int
    options: Options

    @property
    def groups(self) -> int:
        """Groups of query heads that share both their K and their V head."""
        return math.lcm(self.k_heads, self.v_heads)

    @property
    def rows(self) -> int:
        """Query rows of one group: heads of the group x tokens."""
        return self.heads // self.groups * self.tokens


def problem(q: jax.Array, kv: KV, options: Options) -> Problem:
    """The Problem of q[B,T,N,H] over `kv`. Raises KernelError for shapes that fit no contract."""
    batch, tokens, heads, dim = q.shape
    v = kv.k if kv.v is None else kv.v
    for name, leaf in (("K", kv.k), ("V", v)):
        if leaf.encoding is not None:
            raise KernelError(
                f"{name} is held in an encoding of its own ({leaf.encoding}), which no kernel reads; use xla."
            )
        if heads % leaf.heads:
            raise KernelError(f"{name} has {leaf.heads} heads, which do not divide the {heads} query heads.")
        if leaf.slots != kv.k.slots:
            raise KernelError(f"{name} has {leaf.slots} slots and K {kv.k.slots}; give them the same.")
        if leaf.channel and leaf.scale is not None and name == "V":
            raise KernelError("V has a scale per channel; only keys can have one, values take one per token and head.")
    if dim != kv.k.dim:
        raise KernelError(f"q has head_dim {dim} and K {kv.k.dim}; make them equal.")
    if kv.v is None and not 0 < kv.v_dim <= dim:
        raise KernelError(f"v_dim is {kv.v_dim}; V as a view of K takes between 1 and {dim} of its columns.")
    if kv.table is not None and kv.ring:
        raise KernelError("a ring has no pages; use contiguous slots for rings.")
    return Problem(
        batch,
        tokens,
        heads,
        kv.k.heads,
        v.heads,
        dim,
        kv.value_dim,
        kv.slots,
        q.dtype.name,
        kv.k.dtype.name,
        v.dtype.name,
        kv.k.lanes,
        v.lanes,
        0 if kv.table is None else kv.k.slots,
        kv.v is None,
        kv.ring,
        options,
    )


# --- which key a slot holds, and who sees it --------------------------------------------------------------------


def key_positions(slot: Any, length: Any, ring: int = 0, ring_sinks: int = 0) -> Any:
    """Position of the token in each slot (int32, any shapes that broadcast), -1 where there is none, for rows that have
    seen `length` tokens. Element-wise without division by element, so that kernels use it as it is."""
    if not ring:
        return jnp.where(slot < length, slot, -1)
    newest = length - ring_sinks - 1  # index of the newest token after the sinks
    turn = jax.lax.rem(jnp.maximum(newest, 0), jnp.int32(ring))  # ring slot of the newest
    behind = turn - (slot - ring_sinks)
    index = newest - jnp.where(behind < 0, behind + ring, behind)
    turned = jnp.where((newest >= 0) & (index >= 0) & (slot < ring_sinks + ring), ring_sinks + index, -1)
    return jnp.where(slot < ring_sinks, jnp.where(slot < length, slot, -1), turned)


def visible(query: Any, key: Any, window: int = 0, sinks: int = 0) -> Any:
    """bool: may a query at position `query` see a key at position `key` (-1 = nothing there)?"""
    seen = (key >= 0) & (key <= query)
    if window:
        near = query - key < window
        seen = seen & (near | (key < sinks) if sinks else near)
    return seen


# --- partial softmax --------------------------------------------------------------------------------------------


def combine(acc: jax.Array, top: jax.Array, total: jax.Array) -> Partial:
    """Joins splits: acc[splits,B,T,N,V] = sum of 2^(s - top) v and total[splits,B,T,N] of 2^(s - top), with scores and
    `top` in powers of two (an empty split: top NEGATIVE or less, total 0) -> Partial in natural exponents."""
    best = jnp.maximum(top.max(0), NEGATIVE)
    weight = jnp.where(total > 0, jnp.exp2(top - best[None]), 0.0)
    joined = (total * weight).sum(0)
    out = (jnp.where(weight[..., None] > 0, acc, 0.0) * weight[..., None]).sum(0)
    out = out / jnp.where(joined == 0, 1.0, joined)[..., None]
    return Partial(out, jnp.where(joined == 0, NEGATIVE, best * math.log(2)), joined)


def with_sink_logits(part: Partial, logits: jax.Array) -> Partial:
    """Adds exp(logits[n]) to the sum of every row: a learned sink per head, which takes weight and gives no value."""
    top = jnp.maximum(part.max, logits[None, None, :])
    held = part.sum * jnp.exp(part.max - top)
    total = held + jnp.exp(logits[None, None, :] - top)
    return Partial(part.out * (held / total)[..., None], top, total)
