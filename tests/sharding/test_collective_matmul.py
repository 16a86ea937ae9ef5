"""Collective matmuls against one matmul on one device, and what their programs consist of.

A ring must give what the blocking collective gives, with permutes in its place; weights that it gathers are never
whole. Below that, what blocks and attention of a decode step send, counted in the traced program.
"""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from experiments.sharding_study import program as program_lib
from kvattn.config import CacheConfig
from kvattn.decode import partitioned as sharded
from sharding.layout import collective_matmul
from sharding.layout.apply import multiply
from sharding.layout.collective_matmul import OVERLAPS
from tests.helpers import tiny
from tests.helpers.models import lively, run, tokens_of
from tests.helpers.tolerances import F32_MODEL, F32_OP, close

MESH = jax.make_mesh((2, 2, 2), ("x", "y", "z"), axis_types=(AxisType.Auto,) * 3)
SIZES = {"x": 2, "y": 2, "z": 2}
ZY, ZYX, XYZ = ("z", "y"), ("z", "y", "x"), ("x", "y", "z")
IN, OUT = (("x",), ZY), (ZY, ("x",))  # E_x F_yz, as input and as output projection
B, T, D, F, H = 8, 3, 16, 48, 5

# name: (split of x[B,T,*in], of w[*in,*out], of the result, sizes of in, of out)
MATMULS = {
    "ws_2d in": (((), (), ("x",)), IN, ((), (), ZYX), (D,), (F,)),
    "ws_2d out": (((), (), ZYX), OUT, ((), (), ("x", *ZY)), (F,), (D,)),
    "ws_2d out, rows": (((), (), ZYX), OUT, (("z",), (), ("x", "y")), (F,), (D,)),
    "ws_2d queries": (((), (), ("x",)), (*IN, ()), ((), (), ZYX, ()), (D,), (F, H)),
    "ws_2d out of heads": (((), (), ZYX, ()), (ZY, (), ("x",)), ((), (), ("x", *ZY)), (F, H), (D,)),
    "ws_2d in, odd widths": (((), (), ("x",)), IN, ((), (), ZYX), (D,), (40,)),
    "ws_1d in": (((), (), ()), ((), ZYX), ((), (), ZYX), (D,), (F,)),
    "gather 4 chips": (((), (), XYZ), (("x",), ()), ((), (), ("x",)), (D,), (F,)),
    "scatter 8 chips": (((), (), XYZ), (XYZ, ()), ((), (), XYZ), (F,), (D,)),
    "wg_x in": ((("x",), (), ()), IN, (("x",), (), ZY), (D,), (F,)),
    "wg_x out": ((("x",), (), ZY), OUT, (("x",), (), ZY), (F,), (D,)),
    "wg_xy in": ((("x", "y"), (), ()), IN, (("x", "y"), (), ("z",)), (D,), (F,)),
    "wg_xy out of heads": ((("x", "y"), (), ("z",), ()), (ZY, (), ("x",)), (("x", "y"), (), ("z",)), (F, H), (D,)),
    "wg_xyz in": ((XYZ, (), ()), IN, (XYZ, (), ()), (D,), (F,)),
    "wg_xyz queries, odd widths": ((XYZ, (), ()), (*IN, ()), (XYZ, (), (), ()), (D,), (12, H)),
    "wg_xyz out": ((XYZ, (), ()), OUT, (XYZ, (), ()), (F,), (D,)),
}


def spec(split):
    return PartitionSpec(*(axes or None for axes in split))


def program(name, overlaps):
    """(jitted function of x and w to a tuple, one result for each overlap; x and w)."""
    have, w_split, want, ins, outs = MATMULS[name]
    rng = np.random.default_rng(11)
    x = rng.normal(size=(B, T, *ins)).astype(np.float32)
    w = rng.normal(size=(*ins, *outs)).astype(np.float32)

    def body(x, w):
        return tuple(
            collective_matmul.matmul(
                x,
                w,
                lambda a, b: multiply(a, b, len(ins)),
                w_split=w_split,
                have=have,
                want=want,
                mesh=SIZES,
                overlap=overlap,
            )
            for overlap in overlaps
        )

    fn = jax.shard_map(
        body, mesh=MESH, in_specs=(spec(have), spec(w_split)), out_specs=(spec(want),) * len(overlaps), check_vma=False
    )
    place = [jax.device_put(a, NamedSharding(MESH, spec(s))) for a, s in ((x, have), (w, w_split))]
    return jax.jit(fn), place


def check(name, overlaps):
    """Every chip holds its part of x @ w."""
    fn, (x, w) = program(name, overlaps)
    whole = np.tensordot(np.asarray(x, np.float64), np.asarray(w, np.float64), len(MATMULS[name][3]))
    for overlap, got in zip(overlaps, fn(x, w), strict=True):
        assert len(got.addressable_shards) == 8
        for shard in got.addressable_shards:
            close(shard.data, whole[shard.index], F32_OP, f"{name} {overlap} on chip {shard.device.id}")


@pytest.mark.parametrize("name", MATMULS)
def test_every_overlap_is_one_matmul(name):
    check(name, OVERLAPS)


@pytest.mark.parametrize("name", ["gather 4 chips", "wg_xyz in", "wg_xyz out"])
def test_a_long_ring_is_a_loop(monkeypatch, name):
    """What rings of more than 16 chips run, on 4 and on 8."""
    monkeypatch.setattr(collective_matmul, "UNROLLED", 1)
    fn, (x, w) = program(name, ("one_way",))
    assert any(e.primitive.name in ("scan", "while") for e in equations(fn, x, w))
    check(name, ("one_way", "two_way"))


# --- what a program consists of ------------------------------------------------------------------------------


def equations(fn, *args):
    """All equations of the traced program, those of inner programs too."""

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            yield eqn
            for value in eqn.params.values():
                for item in value if isinstance(value, tuple | list) else (value,):
                    inner = getattr(item, "jaxpr", item)
                    if hasattr(inner, "eqns"):
                        yield from walk(inner)

    return list(walk(jax.make_jaxpr(fn)(*args).jaxpr))


def hlo(name, overlap):
    fn, (x, w) = program(name, (overlap,))
    return fn.lower(x, w).compile().as_text()


def count(text, op):
    return text.count(f" {op}(") + text.count(f" {op}-start(")


@pytest.mark.parametrize(
    "name, blocking, stays",
    [
        ("ws_2d in", "reduce-scatter", ()),
        ("ws_2d out", "all-gather", ("reduce-scatter",)),
        ("wg_x in", "all-gather", ()),
        ("wg_xyz in", "all-gather", ()),
        ("wg_xyz out", "all-gather", ()),
    ],
)
def test_a_ring_compiles_to_permutes(name, blocking, stays):
    """None of the collectives that it replaces is left; the blocking program has them and no permute."""
    whole, ring = hlo(name, "none"), hlo(name, "one_way")
    assert count(whole, blocking) and not count(whole, "collective-permute")
    assert count(ring, "collective-permute")
    for op in ("all-gather", "reduce-scatter", "all-reduce", "all-to-all"):
        assert bool(count(ring, op)) == (op in stays), op


@pytest.mark.parametrize(
    "name, gathered",
    [
        ("wg_x in", (D, F // 4)),
        ("wg_xy in", (D, F // 2)),
        ("wg_xyz in", (D, F)),
        ("wg_xyz out", (F, D)),
        ("wg_xy out of heads", (F // 2, H, D)),
    ],
)
def test_a_ring_never_holds_the_gathered_weight(name, gathered):
    """No array of the traced program, nor of the compiled one, has its shape; the blocking program's does."""
    for overlap in OVERLAPS:
        fn, (x, w) = program(name, (overlap,))
        inner = [e for e in equations(fn, x, w) if e.primitive.name not in ("shard_map", "pjit", "jit")]
        shapes = {v.aval.shape for e in inner for v in (*e.invars, *e.outvars)}
        text = hlo(name, overlap)
        assert (gathered in shapes) == (overlap == "none")
        assert (f"f32[{','.join(map(str, gathered))}]" in text) == (overlap == "none")


# --- a decode step -------------------------------------------------------------------------------------------

BASE = {"vocab_size": 64, "d_model": 48, "n_heads": 8, "n_k_heads": 1, "n_v_heads": 1, "d_ff": 40}


def step(layout, layers=2, batch=8, **changes):
    cfg = tiny.config(**(BASE | {"n_layers": layers} | changes))
    return sharded.build(cfg, CacheConfig(), layout, MESH, phase="decode", batch=batch, context=16, weights="float32")


def per_layer(layout, **changes):
    """{(operation, mesh axes): how many a layer has}: those of three layers without those of two."""

    def collect(layers):
        p = step(layout, layers, **changes)
        found = collections.Counter()
        for e in equations(p.fn, *p.args):
            axes = e.params.get("axis_name", e.params.get("axes"))
            if e.primitive.name in ("all_gather", "reduce_scatter", "all_to_all", "psum", "ppermute"):
                found[e.primitive.name, tuple(axes) if isinstance(axes, tuple | list) else (axes,)] += 1
        return found

    return collect(3) - collect(2)


def test_a_parallel_block_has_half_the_pairs_of_a_serial_one():
    """In ws_2d a block gathers E/yz before and scatters it after; a parallel one once for attention and FFN."""
    found = {kind: per_layer("ws_2d/by_batch:xyz", residual=kind) for kind in ("serial", "parallel_palm")}
    pairs = [(op, (axis,)) for op in ("all_gather", "reduce_scatter") for axis in ZY]
    assert [found["serial"].pop(pair) for pair in pairs] == [2] * 4
    assert [found["parallel_palm"].pop(pair) for pair in pairs] == [1] * 4
    assert found["serial"].pop(("psum", ("x", "y"))) == 2 and found["parallel_palm"].pop(("psum", ("x", "y"))) == 1
    assert found["serial"] == found["parallel_palm"]  # but for a norm less, the rest is alike


@pytest.mark.parametrize("kv, heads, exchanges", [("by_batch:xyz", 1, 2), ("replicated", 1, 0), ("by_head:xyz", 8, 0)])
def test_two_all_to_alls_where_attention_is_split_by_batch(kv, heads, exchanges):
    """One before and one after, for queries and results; K and V are projected where the cache keeps them."""
    for residual in ("serial", "parallel_palm"):
        found = per_layer(f"ws_2d/{kv}", n_k_heads=heads, n_v_heads=heads, residual=residual)
        assert sum(n for (op, _), n in found.items() if op == "all_to_all") == exchanges


def test_a_cache_split_by_batch_is_an_nth_of_one_on_every_chip():
    """Of multi-query attention, whose one head cannot be split (and of MHA: split by head or by batch alike)."""

    def held(kv, heads):
        caches = step(f"ws_2d/{kv}", n_k_heads=heads, n_v_heads=heads).args[3]
        return sum(np.prod(s.sharding.shard_shape(s.shape)) for c in caches for s in jax.tree.leaves(c.leaves))

    assert held("replicated", 1) == 8 * held("by_batch:xyz", 1)
    assert held("by_head:xyz", 8) == held("by_batch:xyz", 8) == 8 * held("by_batch:xyz", 1)


def test_zero_query_heads_and_zero_words_change_nothing():
    """Padding 6 query heads of one K/V head to 8, with output rows of zero; the padding's queries are anything."""
    cfg = tiny.config(n_k_heads=1, n_v_heads=1, n_layers=2, tied_embeddings=False)
    wide, notes = program_lib.padded(cfg, 8)
    assert (wide.attention(0).n_heads, wide.vocab_size) == (8, 1024) and len(notes) == 2
    params, more = lively(cfg), lively(wide, seed=9)

    def pad(path, small, big):
        if small.shape == big.shape:
            return small
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        filler = big if name.endswith("attn.q") else jnp.zeros_like(big)
        return filler.at[tuple(slice(0, n) for n in small.shape)].set(small)

    padded = jax.tree_util.tree_map_with_path(pad, params, more)
    tokens = tokens_of(cfg)
    got = run(padded, wide, tokens)
    close(got[..., : cfg.vocab_size], run(params, cfg, tokens), F32_MODEL, "logits")
    assert not np.asarray(got[..., cfg.vocab_size :]).any()
