"""The list of steps between two layouts: by hand, and against the primitives of the program that runs it."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from sharding import ShardingError
from sharding.cost import traffic
from sharding.layout import manual
from sharding.layout.moves import KINDS, moves
from tests.helpers.tolerances import CLOSED_FORM, close

SIZES = {"x": 2, "y": 2, "z": 2}
X, Y, Z, NONE = ("x",), ("y",), ("z",), ()


def listed(*args, **more):
    return [(s.kind, s.source, s.dim, s.axes) for s in moves(*args, **more)]


@pytest.mark.parametrize(
    "have, want, partial, orders, steps",
    [
        ((X, NONE), (X, NONE), (), {}, []),
        ((X, NONE), (NONE, X), (), {}, [("all_to_all", 0, 1, X)]),
        ((NONE, NONE), (X, Y), (), {}, [("slice", None, 0, X), ("slice", None, 1, Y)]),
        ((NONE, ("z", "y")), (NONE, Z), (), {}, [("all_gather", None, 1, Y)]),
        # neither x nor y continues the other: gathered first, so that rows stay in blocks, unless any order will do
        ((X, NONE), (Y, NONE), (), {}, [("all_gather", None, 0, X), ("slice", None, 0, Y)]),
        ((NONE, Z), (NONE, X), (), {1: ("z", "y", "x")}, [("all_gather", None, 1, Z), ("slice", None, 1, X)]),
        ((NONE, Z), (Z, X), (), {1: ("z", "y", "x")}, [("all_to_all", 1, 0, Z), ("slice", None, 1, X)]),
        ((NONE, NONE), (NONE, Z), ("z", "y"), {}, [("reduce_scatter", None, 1, Z), ("all_reduce", None, None, Y)]),
        ((NONE, NONE), (NONE, ("z", "x")), ("z", "x"), {}, [("reduce_scatter", None, 1, ("z", "x"))]),
        (
            (NONE, NONE),
            (NONE, ("z", "x")),
            ("z", "x"),
            {1: ("z", "y", "x")},  # y stands between the two
            [("reduce_scatter", None, 1, Z), ("reduce_scatter", None, 1, X)],
        ),
        ((X, NONE), (NONE, X), Y, {}, [("all_to_all", 0, 1, X), ("all_reduce", None, None, Y)]),
        ((NONE, NONE), (Y, X), X, {}, [("slice", None, 0, Y), ("reduce_scatter", None, 1, X)]),
    ],
)
def test_by_hand(have, want, partial, orders, steps):
    assert listed(have, want, partial, orders) == steps


def test_steps_follow_one_another():
    found = moves((("x", "y"), ("z",), ()), ((), ("z", "y"), ("x",)))
    assert found[0].have == (("x", "y"), ("z",), ()) and found[-1].then == ((), ("z", "y"), ("x",))
    assert all(a.then == b.have for a, b in zip(found, found[1:], strict=False))


def test_a_sum_that_cannot_end_there():
    with pytest.raises(ShardingError, match="a sum over x cannot end in"):
        moves((Z, NONE), (NONE, ("x", "z")), X)
    with pytest.raises(ShardingError, match="without moving rows"):
        moves((("y", "z"), ()), (("z", "y", "x"), ()), ("x",))


PRIMITIVES = {
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "all_to_all": "all_to_all",
    "psum": "all_reduce",
    "psum_invariant": "all_reduce",
    "dynamic_index_in_dim": "slice",  # a function of its own in the trace
}
HEADS = {1: ("z", "y", "x")}
PAIRS = [
    ((("x", "y"), ("z",)), ((), ("z", "y")), (), {}),
    (((), ("z", "y", "x")), (("x", "y"), ("z",)), (), {}),
    ((("x",), ("z", "y")), (("y", "z"), ("x",)), (), HEADS),
    (((), ("z",)), (("x",), ()), ("x",), {}),
    (((), ()), (("y",), ("z", "x")), ("x", "z"), HEADS),
    ((("x",), ()), ((), ("x", "z")), ("y", "z"), {}),
]


@pytest.mark.parametrize("have, want, partial, orders", PAIRS)
def test_the_program_runs_and_the_cost_model_counts_the_list(have, want, partial, orders):
    """One primitive a step, in order; and over the links the bytes of its shapes."""
    mesh = jax.make_mesh((2, 2, 2), ("x", "y", "z"), axis_types=(AxisType.Auto,) * 3)
    into, out = (PartitionSpec(*(axes or None for axes in split)) for split in (have, want))

    def body(x):
        return manual.reduce(x, partial, have, want, SIZES, orders)

    fn = jax.shard_map(body, mesh=mesh, in_specs=(into,), out_specs=out, check_vma=False)
    ran, wire = [], 0.0
    (inner,) = jax.make_jaxpr(fn)(jax.ShapeDtypeStruct((8, 16), jnp.float32)).jaxpr.eqns
    for e in inner.params["jaxpr"].eqns:
        kind = PRIMITIVES.get(e.params.get("name", e.primitive.name))
        if kind is None:
            continue
        ran.append(kind)
        if kind != "slice":
            axes = e.params.get("axis_name", e.params.get("axes"))
            chips = math.prod(SIZES[a] for a in ((axes,) if isinstance(axes, str) else axes))
            shape = (e.outvars if kind == "all_gather" else e.invars)[0].aval.shape
            wire += (2 if kind == "all_reduce" else 1) * math.prod(shape) * (chips - 1) / chips
    steps = moves(have, want, partial, orders)
    assert ran == [step.kind for step in steps] and set(ran) <= set(KINDS)
    counted = traffic.count(steps, 8 * 16, SIZES, "kv")
    close(sum(c.wire for c in counted), wire, CLOSED_FORM)
    assert [c.kind for c in counted] == [kind for kind in ran if kind != "slice"]
