"""What the cost model says crosses the links, and is multiplied, against the written-out program itself, traced.

`kvattn.decode.partitioned.build(overlap="none")` is a shard_map whose collectives are operations of its jaxpr, with
shapes per chip: they are counted here for every layout, phase and variant, without compiling anything.
"""

import collections
import math

import jax
import pytest

from kvattn import plan
from kvattn.attention.heads import heads_model
from kvattn.config import CacheConfig, MaskConfig, ModelConfig
from kvattn.decode import partitioned as sharded
from sharding import cost
from sharding.cost import traffic
from sharding.layout import torus_layouts
from tests.helpers.tolerances import CLOSED_FORM, close

BF16 = CacheConfig(dtype="bfloat16")
KINDS = {
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "all_to_all": "all_to_all",
    "psum": "all_reduce",
    "psum_invariant": "all_reduce",
    "pmax": "all_reduce",
}
DTYPES = {"act": "bfloat16", "weight": "bfloat16", "float32": "float32"}
BATCH, CONTEXT = 16, 24


def config(kv_heads: int, residual: str, **changes) -> ModelConfig:
    """Every dim divisible by the 8 chips, else pairwise different."""
    return heads_model(
        vocab_size=8 * 23,
        d_model=8 * 10,
        n_layers=3,
        n_heads=16,
        n_k_heads=kv_heads,
        n_v_heads=kv_heads,
        head_dim=6,
        v_head_dim=10,
        d_ff=8 * 11,
        residual=residual,
        **changes,
    )


def traced(program) -> tuple[dict, float]:
    """((kind, dtype) -> elements that cross one chip's links, matmul FLOPs of one chip)."""
    wire: dict = collections.Counter()
    flops, loops = 0.0, 0

    def walk(jaxpr, sizes):
        nonlocal flops, loops
        for e in jaxpr.eqns:
            loops += e.primitive.name in ("scan", "while")
            inside = dict(e.params["mesh"].shape) if e.primitive.name == "shard_map" else sizes
            assert not loops or e.primitive.name not in (*KINDS, "dot_general"), "in a loop: count its trips"
            if e.primitive.name in KINDS:
                axes = e.params.get("axis_name", e.params.get("axes"))
                chips = math.prod(sizes[a] for a in ((axes,) if isinstance(axes, str) else axes))
                kind = KINDS[e.primitive.name]
                for i, o in zip(e.invars, e.outvars, strict=True):
                    aval = o.aval if kind == "all_gather" else i.aval
                    twice = 2 if kind == "all_reduce" else 1
                    wire[kind, str(aval.dtype)] += twice * math.prod(aval.shape) * (chips - 1) / chips
            elif e.primitive.name == "dot_general":
                (contracted, _), _ = e.params["dimension_numbers"]
                depth = math.prod(e.invars[0].aval.shape[i] for i in contracted)
                flops += 2 * depth * math.prod(e.outvars[0].aval.shape)
            for value in e.params.values():
                for part in value if isinstance(value, (tuple, list)) else (value,):
                    if hasattr(part, "jaxpr"):
                        walk(part.jaxpr, inside)
                    elif hasattr(part, "eqns"):
                        walk(part, inside)
            loops -= e.primitive.name in ("scan", "while")

    walk(jax.make_jaxpr(program.fn)(*program.args).jaxpr, {})
    return {key: value for key, value in wire.items() if value}, flops


def repeated(cfg: ModelConfig, work: cost.Workload, p: cost.Prediction, phase: str) -> float:
    """FLOPs by which a K, V projection of the whole batch exceeds one of the rows that a chip keeps."""
    table = sharded.rules_for(cfg, p.layout, jax.make_mesh(tuple(p.mesh.values()), ("x", "y", "z")), BATCH)
    rows, extra = p.tokens, 0.0
    for layer in work.layers:
        for weight in (w for w in layer.weights if w.reads and w.heads in ("k_heads", "v_heads")):
            one, elements = weight.heads[0], weight.size
            gone = table["act_batch"]
            heads = tuple(a for a in table[f"{one}_heads"] if a not in gone)
            split = math.prod(p.mesh[a] for a in {*gone, *heads, *table["act_embed"]})
            kept = math.prod(p.mesh[a] for a in {*table[f"{one}_batch"], *heads, *table["act_embed"]})
            extra += layer.count * 2 * rows * elements * (1 / split - 1 / kept)
    return extra


def check(cfg: ModelConfig, layout: str, phase: str, shape=(2, 2, 2), cache=BF16):
    mesh = jax.make_mesh(shape, ("x", "y", "z"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    wire, flops = traced(sharded.build(cfg, cache, layout, mesh, phase=phase, batch=BATCH, context=CONTEXT))
    work = plan.workload(cfg, cache)
    tokens = 1 if phase == "decode" else CONTEXT
    p = cost.predict(
        work, torus_layouts.parse(layout), shape, "v4", phase=phase, batch=BATCH, tokens=tokens, context=CONTEXT
    )
    want: dict = collections.Counter()
    for c in p.collectives:
        want[c.kind, DTYPES[c.dtype]] += c.wire
    assert wire.keys() == want.keys()
    for key in want:
        close(wire[key], want[key], CLOSED_FORM, f"{layout} {phase} {key}")
    more = repeated(cfg, work, p, phase)
    assert min(abs(flops - p.flops), abs(flops - p.flops - more)) <= 1e-9 * flops, (flops, p.flops, more)


DECODE = ["replicated", "by_batch:xyz", "by_batch:z", "by_batch:yz", "by_seq:xyz", "by_seq:x", "by_batch:xy+by_seq:z"]


@pytest.mark.parametrize("kv", DECODE)
@pytest.mark.parametrize("ffn", torus_layouts.FFN_LAYOUTS)
def test_decode_of_multi_query_attention(ffn, kv):
    check(config(1, "parallel_palm", norm="layernorm"), f"{ffn}/{kv}", "decode")


@pytest.mark.parametrize("kv", ["by_head:z+by_batch:xy", "by_head:yz", "by_head:z+by_seq:xy", "by_batch:xyz"])
@pytest.mark.parametrize("ffn", torus_layouts.FFN_LAYOUTS)
def test_decode_of_grouped_query_attention(ffn, kv):
    check(config(4, "serial"), f"{ffn}/{kv}", "decode")


@pytest.mark.parametrize(
    "ffn, kv, kv_heads, residual",
    [
        ("ws_1d", "by_batch:xyz", 1, "serial"),
        ("ws_2d", "replicated", 1, "parallel_palm"),
        ("ws_2d", "by_batch:xyz", 4, "serial"),
        ("ws_2d", "by_seq:xyz", 1, "ladder"),
        ("wg_x", "by_batch:xyz", 2, "serial"),
        ("wg_xy", "by_head:z+by_batch:xy", 4, "parallel_neox"),
        ("wg_xyz", "by_batch:xyz", 1, "parallel_palm"),
    ],
)
def test_prefill(ffn, kv, kv_heads, residual):
    check(config(kv_heads, residual), f"{ffn}/{kv}", "prefill")


@pytest.mark.parametrize("shape", [(1, 2, 4), (4, 2, 1), (8, 1, 1), (1, 1, 1)])
def test_other_meshes(shape):
    check(config(1, "serial"), "ws_2d/by_batch:xyz", "decode", shape)


@pytest.mark.parametrize(
    "name, changes, cache",
    [
        ("cross-layer", {"kv_source": (0, 0, 2), "kv_norm": True}, BF16),
        ("plain mlp", {"mlp": "gelu"}, BF16),
        ("post norms", {"norm_placement": "both"}, BF16),
        ("untied", {"tied_embeddings": False}, BF16),
        (
            "window in a ring",
            {"masks": (MaskConfig(window=6, sinks=2),)},
            CacheConfig(kinds=("ring",), dtype="bfloat16"),
        ),
        ("tied K = V", {"tied_kv": True, "v_head_dim": 6}, BF16),
    ],
)
def test_variants(name, changes, cache):
    check(config(2, "serial").replace(**changes), "ws_2d/by_head:z+by_batch:xy", "decode", cache=cache)


def test_purposes_add_up():
    work = plan.workload(config(1, "serial"), BF16)
    p = cost.predict(
        work, torus_layouts.parse("ws_2d/by_batch:xyz"), (2, 2, 2), "v4", phase="decode", batch=16, tokens=1, context=24
    )
    by_kind = sum(c.wire * p.element_bytes[c.dtype] for c in p.collectives)
    close(sum(p.interconnect_bytes.values()), by_kind, CLOSED_FORM)
    assert set(p.interconnect_bytes) == set(traffic.PURPOSES)
