"""The written-out collectives against the global array: after a move a chip holds what its PartitionSpec says."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sharding import ShardingError
from sharding.layout import manual
from tests.helpers.tolerances import EXACT, close

SIZES = {"x": 2, "y": 2, "z": 2}
MESH = jax.make_mesh((2, 2, 2), ("x", "y", "z"), axis_types=(AxisType.Auto,) * 3)
ORDERS = (("x", "y", "z"), ("z", "y", "x"))  # of a batch, of heads
WHOLE = np.arange(8 * 16 * 3, dtype=np.float32).reshape(8, 16, 3)


def spec(split):
    return PartitionSpec(*(axes or None for axes in split))


def sharded(fn, ins, out):
    body = jax.shard_map(fn, mesh=MESH, in_specs=tuple(map(spec, ins)), out_specs=spec(out), check_vma=False)
    return jax.jit(body)


def pieces(array):
    """What each chip holds, by device id."""
    return {shard.device.id: np.asarray(shard.data) for shard in array.addressable_shards}


def subsets(order):
    return [tuple(a for a in order if a in chosen) for n in range(4) for chosen in itertools.combinations(order, n)]


SPLITS = [(b, h, ()) for b in subsets(ORDERS[0]) for h in subsets(ORDERS[1]) if not set(b) & set(h)]


def moves(pairs):
    """Runs `pairs` of splits in one program: [(got, want) pieces by chip]."""

    def body(*parts):
        return tuple(manual.reshard(x, *pair, SIZES) for x, pair in zip(parts, pairs, strict=True))

    outs = tuple(spec(want) for _, want in pairs)
    ins = tuple(spec(have) for have, _ in pairs)
    fn = jax.shard_map(body, mesh=MESH, in_specs=ins, out_specs=outs, check_vma=False)
    got = jax.jit(fn)(*(jax.device_put(WHOLE, NamedSharding(MESH, one)) for one in ins))
    return [(pieces(g), pieces(jax.device_put(WHOLE, NamedSharding(MESH, s)))) for g, s in zip(got, outs, strict=True)]


@pytest.mark.parametrize("have", SPLITS, ids=lambda s: "-".join("".join(a) or "whole" for a in s[:2]))
def test_reshard_from_every_split_to_every_other(have):
    """Bit for bit on every chip; a move that cannot be says so and does nothing."""
    legal, refused = [], 0
    for want in SPLITS:
        try:
            jax.eval_shape(
                sharded(lambda x, w=want: manual.reshard(x, have, w, SIZES), [have], want),
                jax.ShapeDtypeStruct(WHOLE.shape, jnp.float32),
            )
            legal.append(want)
        except ShardingError as error:
            assert "blocks" in str(error) or "neighbours" in str(error)
            refused += 1
    assert refused == 0 and len(legal) == len(SPLITS)
    for want, (got, right) in zip(legal, moves([(have, want) for want in legal]), strict=True):
        for chip, part in right.items():
            close(got[chip], part, EXACT, f"{have} -> {want} on chip {chip}")
