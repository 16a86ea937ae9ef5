"""Reading compiled TPU programs: golden texts of one 2D weight-stationary FFN (three layers in a scan), and snippets.

FFN: BLE_xyz --AG(yz)--> BLE_x --W_in--> --RS(x)--> BLF_xyz --silu--> --AG(x)--> --W_out--> --RS(yz)--> BLE_xyz. The
bytes below are the paper's formulas for T tokens, bfloat16. The v5e text (JAX 0.10.2, T=64 E=8192 F=32768, mesh
2x4x8) has iota, explicit and mesh replica groups, an all-reduce-scatter fusion, and a reduce-scatter run as an
all-reduce; the tpu7x text (JAX 0.11.2, same sizes, mesh 2x2x2) runs its collectives asynchronously on SparseCores.
"""

import pytest

from sharding import ShardingError
from sharding.compiler import hlo
from sharding.compiler.calibration import Calibration
from sharding.compiler.doctor import Expectations, diagnose, roofline_cycles
from sharding.compiler.hlo_collectives import replica_groups
from sharding.compiler.hlo_costs import analyse
from sharding.cost.hardware import CHIPS
from tests.helpers.paths import GOLDEN
from tests.helpers.tolerances import EXACT, close

T, E, F, LAYERS = 64, 8192, 32768, 3
MESHES = {"v5e": {"x": 2, "y": 4, "z": 8}, "tpu7x": {"x": 2, "y": 2, "z": 2}}
CLOCKS = Calibration("v4", "made up", 1, 1.3e9, 2.6e9, 1, 1.1e9)


def golden(chip: str) -> str:
    return (GOLDEN / f"hlo_ffn_2d_{chip}.txt").read_text()


@pytest.mark.parametrize("chip", MESHES)
def test_ffn_collectives_are_the_formulas(chip):
    mesh = MESHES[chip]
    X, YZ = mesh["x"], mesh["y"] * mesh["z"]
    found = {(c.op, c.axes): (c.bytes, c.runs, c.dtype, c.group) for c in analyse(golden(chip), mesh).collectives}
    assert found == {
        ("all-gather", ("y", "z")): (2 * T * E // X, LAYERS, "bf16", YZ),
        ("reduce-scatter", ("x",)): (2 * T * F // YZ, LAYERS, "bf16", X),
        ("all-gather", ("x",)): (2 * T * F // YZ, LAYERS, "bf16", X),
        ("reduce-scatter", ("y", "z")): (2 * T * E // X, LAYERS, "bf16", YZ),
    }


def test_rewritten_reduce_scatter_is_seen():
    collectives = analyse(golden("v5e"), MESHES["v5e"]).collectives
    rewritten = [c for c in collectives if c.lowered != c.op]
    assert [(c.op, c.lowered, c.axes, c.wire_bytes // c.bytes) for c in rewritten] == [
        ("reduce-scatter", "all-reduce", ("y", "z"), 2)
    ]


@pytest.mark.parametrize("chip", MESHES)
def test_source_lines(chip):
    where = {(c.op, c.axes): c.source for c in analyse(golden(chip), MESHES[chip]).collectives}
    # the lines of the matmuls, the activation and the constraint in the program that made the text
    assert where[("reduce-scatter", ("x",))] in ("ffn.py:29", "ffn.py:30")
    assert where[("all-gather", ("x",))] == "ffn.py:30"
    assert where[("reduce-scatter", ("y", "z"))] in ("ffn.py:31", "ffn.py:32")


def test_cycles_multiply_loops_and_skip_fused_bodies():
    # the entry has none; the body: two matmul fusions, the activation, and three small operations (see the text)
    body = 27276 + 25389 + 2295
    total = analyse(golden("v5e"), MESHES["v5e"]).cycles()
    assert total["compute"] >= LAYERS * body
    text = golden("v5e").replace('"estimated_cycles":"27276"', '"estimated_cycles":"28276"')
    assert analyse(text, MESHES["v5e"]).cycles()["compute"] - total["compute"] == LAYERS * 1000


def test_flops_and_slices_of_stacked_weights():
    matmuls = [o for o in analyse(golden("v5e"), MESHES["v5e"]).operations if o.flops]
    X, YZ = 2, 32
    weight = 2 * (E // X) * (F // YZ)  # one layer's shard, not the stack of three
    for o in matmuls:
        assert o.flops == 2 * T * (E // X) * (F // YZ)
        assert weight <= o.read <= weight + 2 * T * (E // X + F // YZ)


def test_wrong_mesh_is_refused():
    with pytest.raises(ShardingError, match="64 devices and the mesh .* has 8"):
        analyse(golden("v5e"), MESHES["tpu7x"])


def test_not_hlo_is_refused():
    with pytest.raises(ShardingError, match="no ENTRY"):
        hlo.parse("hello\n")


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1,2},{3,4,5}}, x", [[0, 1, 2], [3, 4, 5]]),
        ("replica_groups=[2,3]<=[6], x", [[0, 1, 2], [3, 4, 5]]),
        ("replica_groups=[3,2]<=[2,3]T(1,0), x", [[0, 3], [1, 4], [2, 5]]),
        ("replica_groups=mesh['x'=2,'y'=3] {'y'}, x", [[0, 1, 2], [3, 4, 5]]),
        ("replica_groups=mesh['x'=2,'y'=3] {'x'}, x", [[0, 3], [1, 4], [2, 5]]),
        ("replica_groups=mesh['a'=1,'b'=3,'c'=2], device_ids=([2,3]T(1,0)) {'c'}, x", [[0, 3], [1, 4], [2, 5]]),
        ("replica_groups={}, x", [[0, 1, 2, 3, 4, 5]]),
    ],
)
def test_replica_groups(text, groups):
    assert replica_groups(text, 6) == groups


def test_unknown_replica_groups_raise():
    with pytest.raises(ShardingError, match="replica_groups=somehow"):
        replica_groups("replica_groups=somehow", 6)


LOOP = """HloModule loop, num_partitions=1

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %p = (s32[], f32[8]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %v = f32[8]{{0}} get-tuple-element(%p), index=1
  %step = s32[] constant({step})
  %next = s32[] add(%i, %step)
  %w = f32[8]{{0}} negate(%v), metadata={{op_name="neg" source_file="model.py" source_line=7}}, \
backend_config={{"window_config":{{"estimated_cycles":"11"}}}}
  ROOT %t = (s32[], f32[8]{{0}}) tuple(%next, %w)
}}

%cond (q: (s32[], f32[8])) -> pred[] {{
  %q = (s32[], f32[8]{{0}}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %limit = s32[] constant({limit})
  ROOT %go = pred[] compare(%j, %limit), direction={direction}, \
backend_config={{"window_config":{{"estimated_cycles":"2"}}}}
}}

ENTRY %main (a: f32[8]) -> f32[8] {{
  %a = f32[8]{{0}} parameter(0)
  %zero = s32[] constant({start})
  %first = (s32[], f32[8]{{0}}) tuple(%zero, %a)
  %loop = (s32[], f32[8]{{0}}) while(%first), condition=%cond, body=%body{extra}
  ROOT %out = f32[8]{{0}} get-tuple-element(%loop), index=1
}}
"""


@pytest.mark.parametrize(
    ("start", "limit", "step", "direction", "extra", "trips"),
    [
        (0, 5, 1, "LT", "", 5),
        (2, 13, 3, "LT", "", 4),
        (2, 14, 3, "LE", "", 5),
        (7, 0, -1, "GT", "", 7),
        (7, 0, -2, "GE", "", 4),
        (0, 5, 1, "LT", ', backend_config={"known_trip_count":{"n":"3"}}', 3),
        (9, 5, 1, "LT", "", 0),
    ],
)
def test_trip_counts(start, limit, step, direction, extra, trips):
    text = LOOP.format(start=start, limit=limit, step=step, direction=direction, extra=extra)
    seen, i = 0, start  # the loop itself, run
    while {"LT": i < limit, "LE": i <= limit, "GT": i > limit, "GE": i >= limit}[direction]:
        seen, i = seen + 1, i + step
    assert extra or seen == trips
    module = hlo.parse(text)
    entry = module.computations["main"]
    assert module.trip_count(entry, entry.instructions["loop"]) == trips
    analysis = analyse(text, {"x": 1})
    assert analysis.cycles()["compute"] == trips * 11 + (trips + 1) * 2  # the condition is asked once more
    assert [o.source for o in analysis.operations if o.op == "negate"] == ["model.py:7"]


def test_unknown_trip_count_is_said():
    text = LOOP.format(start=0, limit=5, step=1, direction="LT", extra="").replace("constant(5)", "custom-call()")
    analysis = analyse(text, {"x": 1})
    assert analysis.unknown_loops == ("loop",)
    assert analysis.cycles()["compute"] == 11 + 2 * 2
    assert any("no trip count" in f.what for f in diagnose(analysis, CHIPS["v4"], CLOCKS))


def test_no_estimate_is_no_cycles():
    # SparseCore operations print -1 as an unsigned number
    text = LOOP.format(start=0, limit=5, step=1, direction="LT", extra="").replace('"11"', f'"{2**64 - 1}"')
    assert analyse(text, {"x": 1}).cycles()["compute"] == 6 * 2


def test_asynchronous_copies_are_counted_by_what_arrives():
    text = """HloModule p, num_partitions=1

ENTRY %main (a: bf16[48,128]) -> bf16[48,128] {
  %a = bf16[48,128]{1,0:T(8,128)(2,1)} parameter(0)
  %s = ((bf16[48,128]{1,0:T(8,128)(2,1)}), bf16[16,128]{1,0:T(8,128)(2,1)S(1)}, s32[]) slice-start(%a), slice={[0:16]}
  %sd = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} slice-done(%s)
  %c = (bf16[48,128]{1,0:T(8,128)(2,1)S(1)}, bf16[48,128]{1,0:T(8,128)(2,1)}, u32[]) copy-start(%a)
  ROOT %cd = bf16[48,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%c)
}
"""
    analysis = analyse(text, {"x": 1})
    assert analysis.prefetched_bytes() == 2 * 128 * (16 + 48)
    # a cache brought on chip piece by piece is read, not copied; copied within HBM it is named
    wanted = Expectations({}, caches=(((48, 128), "bf16"),))
    assert not diagnose(analysis, CHIPS["v4"], CLOCKS, wanted)
    (finding,) = diagnose(analyse(text.replace("S(1)", ""), {"x": 1}), CHIPS["v4"], CLOCKS, wanted)
    assert "copy of the cache: c (copy-start) writes bf16[48,128]" in finding.what
    back = text.replace("%a = bf16[48,128]{1,0:T(8,128)(2,1)}", "%a = bf16[48,128]{1,0:T(8,128)(2,1)S(3)}")
    (finding,) = diagnose(analyse(back.replace("S(1)", ""), {"x": 1}), CHIPS["v4"], CLOCKS, wanted)
    assert finding.severity == "note" and "back whole from on-chip memory" in finding.what


def test_findings_of_unrolled_layers_are_merged():
    lines = PADDED.replace("4096,40", "16384,40").splitlines()
    named = lines[4].replace("ROOT ", "")
    twice = [*lines[:4], named, named.replace("%n", "%n.1"), lines[4].replace("%n", "%n.2"), "}"]
    found = diagnose(analyse("\n".join(twice), {"x": 1}), CHIPS["v4"], CLOCKS)
    (merged,) = [f for f in found if "model.py:3" in f.where]
    assert "and 2 more like it" in merged.what and merged.cost == 3 * 16384 * (128 - 40) * 4


@pytest.mark.parametrize(
    ("text", "data", "padded"),
    [
        ("bf16[3,4096,2048]{2,1,0:T(8,128)(2,1)}", 3 * 4096 * 2048 * 2, 3 * 4096 * 2048 * 2),
        ("f32[5,3]{1,0:T(8,128)}", 60, 8 * 128 * 4),
        ("f32[5,3]{0,1:T(8,128)}", 60, 8 * 128 * 4),
        ("f32[300,5]{0,1:T(8,128)}", 6000, 384 * 8 * 4),
        ("bf16[7,2,256]{2,1,0:T(2,128)(2,1)}", 7 * 2 * 256 * 2, 7 * 2 * 256 * 2),
        ("s4[10,100]{1,0:T(8,128)(4,1)}", 500, 16 * 128 // 2),
        ("pred[]", 1, 1),
    ],
)
def test_padding(text, data, padded):
    (array,) = hlo.arrays(text)
    assert (array.nbytes, array.padded_nbytes) == (data, padded)


def test_expected_collectives_find_the_stray():
    text, mesh = golden("tpu7x"), MESHES["tpu7x"]
    analysis = analyse(text, mesh)
    table = {(c.op, c.axes): c.bytes * c.runs for c in analysis.collectives}
    assert not [f for f in diagnose(analysis, CHIPS["tpu7x"], CLOCKS, Expectations(table)) if f.unit == "bytes"]

    stray = dict(table)
    del stray[("all-gather", ("x",))]
    (finding,) = [f for f in diagnose(analysis, CHIPS["tpu7x"], CLOCKS, Expectations(stray)) if f.unit == "bytes"]
    assert "unexpected all-gather over x" in finding.what and "ffn.py:30" in finding.where
    assert finding.cost == table[("all-gather", ("x",))]

    short = {**table, ("all-gather", ("y", "z")): table[("all-gather", ("y", "z"))] / 3}
    (finding,) = [f for f in diagnose(analysis, CHIPS["tpu7x"], CLOCKS, Expectations(short)) if f.unit == "bytes"]
    assert "all-gather over yz of 1,572,864 bytes where 524,288 are expected" in finding.what

    missing = {**table, ("all-to-all", ("x", "y")): 10**7}
    (finding,) = [f for f in diagnose(analysis, CHIPS["tpu7x"], CLOCKS, Expectations(missing)) if f.unit == "bytes"]
    assert finding.severity == "note" and "no all-to-all over xy" in finding.what


PADDED = """HloModule pad, num_partitions=1

ENTRY %main (w: f32[4096,40]) -> f32[4096,40] {
  %w = f32[4096,40]{1,0:T(8,128)} parameter(0), metadata={op_name="w"}
  ROOT %n = f32[4096,40]{1,0:T(8,128)} negate(%w), metadata={op_name="neg" source_file="model.py" source_line=3}
}
"""


def test_padded_arrays_are_named_above_a_mebibyte():
    big = PADDED.replace("4096,40", "16384,40")
    assert not diagnose(analyse(PADDED, {"x": 1}), CHIPS["v4"], CLOCKS)
    argument, result = sorted(
        diagnose(analyse(big, {"x": 1}), CHIPS["v4"], CLOCKS), key=lambda f: "argument" not in f.where
    )
    assert "f32[16384,40] takes 3.2 times its bytes" in argument.what and "argument w" in argument.where
    assert "model.py:3" in result.where
    assert argument.cost == 16384 * (128 - 40) * 4
    assert not diagnose(analyse(big.replace("16384,40", "16384,100"), {"x": 1}), CHIPS["v4"], CLOCKS)


def test_roofline_by_hand():
    for o in analyse(golden("v5e"), MESHES["v5e"]).operations:
        if o.flops:
            chip = CHIPS["v5e"]
            seconds = (o.read + o.written) / chip.hbm_bandwidth
            assert seconds * 1.3e9 > o.flops / chip.peak_flops * 1.1e9  # decode: the bytes are what it waits for
            close(roofline_cycles(o, chip, CLOCKS), seconds * 1.3e9, EXACT)
