"""The decode step as the TPU compiler sees it: PaLM 540B's shape on 64 v4 chips, a few of its 118 layers.

Every layer is alike and compiled on its own, so four say what 118 do, in seconds. The whole model is compiled by
`python -m experiments.sharding_study --config=configs/sharding_palm540b.py`.
"""

import pytest

from configs.sizes import size
from experiments.sharding_study import program as program_lib
from kvattn import plan
from kvattn.config import CacheConfig, plain
from sharding import cost
from sharding.compiler import aot
from sharding.layout import torus_layouts

SLICE, MESH, CHIPS = "v4:4x4x4", (4, 4, 4), 64
CACHE = CacheConfig(dtype="bfloat16")
CFG = size("palm-540b", n_layers=4)
BATCH, CONTEXT, LAYOUT = 64, 2048, "ws_2d/by_batch:xyz"
TIMES_FLOOR = 1.3  # the step may cost this much of its weight matmuls and cache reads alone


@pytest.fixture(scope="module")
def compiler():
    with aot.Compiler() as one:
        yield one


def _expected(cfg, phase, weights, layout, batch, tokens):
    full, _ = program_lib.padded(cfg, CHIPS)
    work = plan.workload(full, CACHE, weights=weights)
    predicted = cost.predict(
        work,
        torus_layouts.parse(layout),
        dict(zip("xyz", MESH, strict=True)),
        "v4",
        phase=phase,
        batch=batch,
        tokens=tokens,
        context=CONTEXT,
    )
    return program_lib.expectations(full, CACHE, predicted, batch, CONTEXT, "none")


def _job(cfg, **rest):
    return {"model": plain(cfg), "cache": plain(CACHE), "layout": LAYOUT, "batch": BATCH, "context": CONTEXT} | rest


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_a_decode_step_is_near_its_floor_and_the_doctor_names_nothing(compiler, weights):
    """Collectives are those of the cost model, byte for byte; no cache is copied; the step's estimated cycles are at
    most 1.3 times those of its weight matmuls and cache reads compiled alone."""
    wanted = _expected(CFG, "decode", weights, LAYOUT, BATCH, 1)
    step = compiler.compile(
        program_lib.TARGET, _job(CFG, phase="decode", weights=weights), SLICE, MESH, expectations=wanted
    )
    floor = compiler.compile("tests.helpers.aot_targets:decode_floor", _job(CFG, weights=weights), SLICE, MESH)
    assert [str(f) for f in step.findings if f.severity == "warning"] == []
    ratio = sum(step.cycles.values()) / sum(floor.cycles.values())
    assert 1 < ratio <= TIMES_FLOOR, f"{ratio:.3f} times the floor"
    caches = BATCH * CONTEXT * 2 * CFG.attention(0).head_dim * 2 * CFG.n_layers // CHIPS
    assert caches <= step.memory.aliased < 1.01 * caches
    counted = {(c.op, c.axes): c.bytes for c in step.collectives}
    assert counted, "the program must have collectives"


def test_rings_show_permutes_where_the_blocking_program_gathers(compiler):
    """x's reduce-scatter and all-gather around each matmul become permutes; y and z's stay."""
    ops = {}
    for overlap in ("none", "one_way"):
        report = compiler.compile(
            program_lib.TARGET,
            _job(size("palm-540b", n_layers=1), phase="decode", weights="bfloat16", overlap=overlap),
            SLICE,
            MESH,
        )
        ops[overlap] = {(c.op, c.axes): c.count for c in report.collectives}
    assert not any(op == "collective-permute" for op, _ in ops["none"])
    assert ops["one_way"]["collective-permute", ("x",)] >= 3 * 4  # q, up, gate, down and o, three steps each
    assert ops["one_way"].get(("all-gather", ("x",)), 0) < ops["none"]["all-gather", ("x",)]
    assert ops["one_way"].get(("reduce-scatter", ("x",)), 0) < ops["none"]["reduce-scatter", ("x",)]
