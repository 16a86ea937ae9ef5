"""Applies a rule table: shardings of trees of specs, and the layout of activations inside traced functions.

A model names the layout of its activations where it changes, and no more:

    h = reshard(norm(x), RESIDUAL, BLOCK)               # from one tuple of logical axes to another
    y = matmul(h, w, ("embed", "mlp"), BLOCK, HIDDEN)   # w's axes, x's, and what y shall have
    y = reduce(y, "mlp", RESIDUAL)                      # of a matmul that was asked to leave its sum open

What that means is decided by the context the function is traced in. Without one: nothing, plain arrays. In
`use_rules(mesh, table)`: sharding constraints, and the compiler inserts the collectives. In
`use_manual(mesh, table)`, inside `jax.shard_map`: the collectives of sharding/layout/manual.py, written out.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.layout import collective_matmul, manual, torus_layouts
from sharding.layout.moves import Axes, Names, Split, any_order
from sharding.layout.rules import Rules, ShardingError, mesh_axes

_LOOKUP = 1 << 27  # elements of looked-up rows a chip may hold at once


@dataclasses.dataclass(frozen=True)
class _Context:
    mesh: Any  # a Mesh; for manual code {axis: size}
    rules: Rules
    overlap: str | None = None  # None: the compiler partitions

    def split(self, names: Names) -> Split:
        return tuple(() if n is None else mesh_axes(self.rules, n) for n in names)

    def orders(self, have: Names, want: Names) -> dict[int, Axes]:
        return any_order(self.rules, self.mesh, have, want)


_ACTIVE: contextvars.ContextVar[_Context | None] = contextvars.ContextVar("kvattn_rules", default=None)


def partition_spec(axes: Names, rules: Rules, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The PartitionSpec of an array with logical `axes`.

    Raises ShardingError for an unknown name, a mesh axis used twice, or a dim its mesh axes do not divide.
    """
    out, used = [], set()
    for name, size in zip(axes, shape, strict=True):
        target = () if name is None else mesh_axes(rules, name)
        for mesh_axis in target:
            if mesh_axis not in mesh.shape:
                raise ShardingError(
                    f"logical axis {name!r} maps to {mesh_axis!r}, which the mesh lacks; "
                    f"its axes are {', '.join(mesh.axis_names)}."
                )
            if mesh_axis in used:
                raise ShardingError(f"axes {axes} put two dims on mesh axis {mesh_axis!r}; change one row.")
            used.add(mesh_axis)
        parts = torus_layouts.parts(target, mesh.shape)
        if size % parts:
            raise ShardingError(
                f"{name} is {size}, not divisible by {parts}, the size of mesh axes {target}; "
                "change the mesh, or take a rule table that replicates it."
            )
        out.append(None if not target else target[0] if len(target) == 1 else target)
    return PartitionSpec(*out)


def named(specs: Any, mesh: Mesh, rules: Rules) -> Any:
    """NamedShardings of a tree whose leaves have `.shape` and `.axes` (kvattn.spec.ParamSpec)."""
    return jax.tree.map(
        lambda s: NamedSharding(mesh, partition_spec(s.axes, rules, s.shape, mesh)),
        specs,
        is_leaf=lambda s: hasattr(s, "axes") and hasattr(s, "shape"),
    )


@contextlib.contextmanager
def use_rules(mesh: Mesh, rules: Rules):
    """The compiler partitions: makes the layouts below constraints while a function is traced. Jit the function
    inside the same context."""
    token = _ACTIVE.set(_Context(mesh, rules))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


@contextlib.contextmanager
def use_manual(mesh: Mapping[str, int], rules: Rules, overlap: str = "none"):
    """The layouts below are collectives: for tracing the body of a `jax.shard_map` over a mesh of these sizes.
    Raises ShardingError for an unknown overlap."""
    if overlap not in collective_matmul.OVERLAPS:
        raise ShardingError(f"overlap is {overlap!r}; choose one of {', '.join(collective_matmul.OVERLAPS)}.")
    token = _ACTIVE.set(_Context(dict(mesh), rules, overlap))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def _manual() -> _Context | None:
    active = _ACTIVE.get()
    return active if active is not None and active.overlap is not None else None


# --- layouts of activations --------------------------------------------------------------------------------


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins x to the layout its logical axes have in the active table; identity when the compiler does not
    partition."""
    active = _ACTIVE.get()
    if active is None or active.overlap is not None:
        return x
    spec = partition_spec(axes, active.rules, x.shape, active.mesh)
    return lax.with_sharding_constraint(x, NamedSharding(active.mesh, spec))


def reshard(x: jax.Array, have: Names, want: Names) -> jax.Array:
    """x with logical axes `have` gets those of `want`. Raises ShardingError for an impossible move."""
    active = _manual()
    if active is None:
        return constrain(x, *want)
    return manual.reshard(x, active.split(have), active.split(want), active.mesh, active.orders(have, want))


def settle(x: jax.Array) -> jax.Array:
    """In manual code, makes x[B,T,D] once for all the matmuls that read it when it is long: a TPU compiler would repeat
    what made it (a norm) inside each of them."""
    return x if _manual() is None or x.shape[1] == 1 else lax.optimization_barrier(x)


def mean(x: jax.Array, axes: tuple[int, ...], name: str | None) -> jax.Array:
    """Mean over the dims `axes`, of which the first is the logical axis `name`; dims are kept."""
    active = _manual()
    over = () if active is None or name is None else mesh_axes(active.rules, name)
    if not over:
        return x.mean(axes, keepdims=True)
    return lax.pmean(x.mean(axes, keepdims=True), over)


def offset(name: str, local: int) -> Any:
    """Index, in the whole dim `name`, of this chip's first of `local` entries; 0 where it is not split."""
    active = _manual()
    over = () if active is None else mesh_axes(active.rules, name)
    return lax.axis_index(over) * local if over else 0


def whole(name: str, local: int) -> int:
    """Size of the dim `name` of which a chip holds `local`."""
    active = _manual()
    return local if active is None else local * torus_layouts.parts(mesh_axes(active.rules, name), active.mesh)


def merge_softmax(out: jax.Array, top: jax.Array, total: jax.Array, name: str, have: Names, want: Names) -> jax.Array:
    """Joins partial softmax results over the chips that `name` is split over (flash decoding across chips).

    out[B,T,N,V] normalised by its own sum, top and total [B,T,N] (max and sum), all float32 and with axes `have`;
    returns out with axes `want`: reduce-scattered into its heads, so that every chip keeps a few.
    """
    active = _manual()
    over = () if active is None else mesh_axes(active.rules, name)
    if not over:
        return reshard(out, have, want)
    best = lax.pmax(top, over)
    weight = total * jnp.exp(top - best)
    everything = lax.psum(weight, over)
    share = weight / jnp.where(everything == 0, 1.0, everything)
    return manual.reduce(
        out * share[..., None], over, active.split(have), active.split(want), active.mesh, active.orders(have, want)
    )


def own_group(kv: jax.Array, q_heads: int, name: str) -> jax.Array:
    """Takes, of kv[B,K,S,H] with all K heads here, the heads that this chip's `q_heads` query heads, split as `name`,
    read."""
    active = _manual()
    over = () if active is None else mesh_axes(active.rules, name)
    heads = kv.shape[1]
    if not over or heads == 1:
        return kv
    total = q_heads * torus_layouts.parts(over, active.mesh)
    group = total // heads  # query heads that read one K head
    if q_heads % group and group % q_heads:
        raise ShardingError(
            f"{q_heads} query heads a chip straddle groups of {group} that read one K/V head; split "
            "the heads over fewer or more chips."
        )
    first = lax.axis_index(over) * q_heads // group
    return lax.dynamic_slice_in_dim(kv, first, max(1, q_heads // group), axis=1)


# --- matmuls -----------------------------------------------------------------------------------------------


def multiply(
    x: jax.Array, w: Any, inner: int = 1, flat: bool = False, out_dtype: Any = None, transposed: bool = False
) -> jax.Array:
    """x[..., *in] @ w[*in, *out] for an array or an int8 weight, whose scale multiplies the product. `flat`: as one
    [rows, in] x [in, out] matmul, which XLA:CPU runs faster; TPUs would copy a weight to flatten it. `transposed`: w
    is [out, in]."""
    scale = getattr(w, "scale", None)
    values = getattr(w, "values", w)
    values = values.astype(x.dtype) if values.dtype == jnp.int8 else values
    if flat and not transposed:
        lead, out, size = x.shape[: x.ndim - inner], w.shape[inner:], math.prod(w.shape[:inner])
        y = jnp.matmul(x.reshape(-1, size), values.reshape(size, -1), preferred_element_type=out_dtype)
        y = y.reshape(lead + out)
    else:
        over = (1,) if transposed else tuple(range(inner))
        dims = ((tuple(range(x.ndim - inner, x.ndim)), over), ((), ()))
        y = lax.dot_general(x, values, dims, preferred_element_type=out_dtype)
    return y if scale is None else _scaled(y, scale)


def _scaled(y: jax.Array, scale: jax.Array) -> jax.Array:
    return y * scale.astype(y.dtype).reshape((1,) * (y.ndim - scale.ndim) + scale.shape)


def matmul(
    x: jax.Array,
    w: Any,
    w_axes: Names,
    have: Names,
    want: Names | None,
    out_dtype: Any = None,
    transposed: bool = False,
) -> jax.Array:
    """x[B,T,*in] (axes `have`) times w[*in,*out] (axes `w_axes`) -> [B,T,*out] with axes `want`. `transposed`: w is
    given as [out,in], an embedding table; XLA:CPU would turn it round in every step.

    `want=None` leaves the sum over the mesh axes that split w's first dim open, for `reduce` to end later: two
    such results may be added before. w: an array or an int8 weight. Only the first of the in and out dims
    may be split. Raises ShardingError for an impossible layout.
    """
    active = _manual()
    inner = len(have) - 2
    if active is None:
        one_device = _ACTIVE.get() is None or _ACTIVE.get().mesh.size == 1
        y = multiply(x, w, inner, one_device, out_dtype, transposed)
        return y if want is None else constrain(y, *want)
    w = w.T if transposed else w
    have_split, w_split = active.split(have), active.split(w_axes)
    want_split = None if want is None else active.split(want)
    values, scale = getattr(w, "values", w), getattr(w, "scale", None)
    y = collective_matmul.matmul(
        x,
        values,
        lambda a, b: multiply(a, b, inner, False, out_dtype),
        w_split=w_split,
        have=have_split,
        want=want_split,
        mesh=active.mesh,
        overlap=active.overlap,
    )
    if scale is None:
        return y
    # Scaling and summing commute: the scale meets the result where it is smallest.
    gone = have_split[0]
    left = tuple(tuple(a for a in axes if a not in gone) for axes in w_split[inner:])
    ends = left if want_split is None else want_split[2:]
    return _scaled(y, manual.reshard(scale, w_split[inner:], ends, active.mesh))


def reduce(x: jax.Array, name: str, have: Names, want: Names) -> jax.Array:
    """Ends the sum that `matmul(..., want=None)` left open over the mesh axes of weight axis `name`; x is then
    [B,T,D] with D split as the weight's (`have`)."""
    active = _manual()
    if active is None:
        return constrain(x, *want)
    gone = mesh_axes(active.rules, have[0])
    partial = tuple(a for a in mesh_axes(active.rules, name) if a not in gone)
    split = active.split(have)
    split = (*split[:2], tuple(a for a in split[2] if a not in gone))
    return manual.reduce(x, partial, split, active.split(want), active.mesh)


def once(bias: jax.Array, name: str, batch: str = "act_batch") -> jax.Array:
    """A bias to add to a sum left open over the axes that split a weight's `name`: itself on one of the summed chips,
    zero on the others. Axes of `batch` are not summed: the weight is gathered over them."""
    active = _manual()
    if active is None:
        return bias
    over = tuple(a for a in mesh_axes(active.rules, name) if a not in mesh_axes(active.rules, batch))
    return jnp.where(lax.axis_index(over) == 0, bias, jnp.zeros_like(bias)) if over else bias


def take_rows(table: Any, tokens: jax.Array, want: Names) -> jax.Array:
    """Rows of an embedding table [W,D] (axes vocab, embed) at tokens[B,T] (not split) -> [B,T,D], axes `want`."""
    active = _ACTIVE.get()
    if active is None:
        return _rows(table, tokens)
    if active.overlap is not None:
        return _take_local_rows(active, table, tokens, want)
    if _apart("vocab", "res_embed"):
        # From a table split in D, XLA would replicate the result before it is split by batch.
        table = constrain(table, "vocab", "res_embed") if not hasattr(table, "scale") else table
        return constrain(_rows(table, tokens), *want)
    # D split more finely than the table's: XLA's partitioner fails a check on such a gather, so it is written out.
    vocab, embed = active.split(("vocab", "embed"))
    places = jax.tree.map(lambda a: PartitionSpec(vocab, embed) if a.ndim == 2 else PartitionSpec(vocab), table)
    inside = dataclasses.replace(active, mesh=dict(active.mesh.shape), overlap="none")
    return jax.shard_map(
        lambda table, tokens: _take_local_rows(inside, table, tokens, want),
        mesh=active.mesh,
        in_specs=(places, PartitionSpec()),
        out_specs=PartitionSpec(*active.split(want)),
        check_vma=False,
    )(table, tokens)


def _take_local_rows(active: _Context, table: Any, tokens: jax.Array, want: Names) -> jax.Array:
    vocab, embed = active.split(("vocab", "embed"))
    local = table.shape[0]
    row = tokens - (lax.axis_index(vocab) * local if vocab else 0)
    here = (row >= 0) & (row < local)

    def look(part):
        row, here = part
        x = _rows(table, jnp.where(here, row, 0))
        x = jnp.where(here[..., None], x, jnp.zeros_like(x))
        return manual.reduce(x, vocab, ((), (), embed), active.split(want), active.mesh)

    # Before it is summed over the vocabulary's chips a chip holds [B, T, D/X]: in pieces, where that is much.
    length, pieces = tokens.shape[1], 1
    while tokens.size // pieces * table.shape[1] > _LOOKUP and length % (2 * pieces) == 0:
        pieces *= 2
    if pieces == 1:
        return look((row, here))
    cut = [a.reshape(a.shape[0], pieces, -1).swapaxes(0, 1) for a in (row, here)]
    out = lax.map(look, tuple(cut)).swapaxes(0, 1)
    return out.reshape(out.shape[0], length, out.shape[-1])


def _apart(*names: str) -> bool:
    axes = [a for n in names for a in mesh_axes(_ACTIVE.get().rules, n)]
    return len(axes) == len(set(axes))


def _rows(table: Any, tokens: jax.Array) -> jax.Array:
    scale = getattr(table, "scale", None)
    if scale is None:
        return jnp.take(table, tokens, axis=0)
    rows = jnp.take(table.values, tokens, axis=0).astype(scale.dtype)
    return rows * jnp.take(scale, tokens, axis=0)[..., None]


# --- kernels -----------------------------------------------------------------------------------------------


def one_chip() -> bool:
    """Whether the arrays being traced are one chip's part: inside a shard_map of `use_manual`."""
    return _manual() is not None


def partitioned() -> bool:
    """Whether the compiler partitions what is being traced over several chips."""
    active = _ACTIVE.get()
    return active is not None and active.overlap is None and active.mesh.size > 1


def per_chip(f: Callable, have: tuple[Names, ...], want: Names) -> Callable:
    """f on each chip's part, for kernels that a compiler cannot partition. `have`: logical axes of each argument,
    `want`: of the result. Without a context, and in manual code, f itself."""
    active = _ACTIVE.get()
    if active is None or active.overlap is not None:
        return f

    def call(*args):
        rules, mesh = active.rules, active.mesh
        into = tuple(partition_spec(names, rules, a.shape, mesh) for names, a in zip(have, args, strict=True))
        out = PartitionSpec(*(axes or None for axes in active.split(want)))
        return jax.shard_map(f, mesh=mesh, in_specs=into, out_specs=out, check_vma=False)(*args)

    return call
