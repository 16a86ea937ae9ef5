"""The planner: the paper's layouts in its eight measured configurations, honest refusals, and the command."""

import dataclasses
import io
import itertools
import json
import math
import os
import subprocess
import sys

import pytest
from rich.console import Console

from configs.sizes import SIZES, size
from kvattn import account, plan
from kvattn.config import CacheConfig
from kvattn.errors import UserError
from sharding import ShardingError, cost
from sharding.layout.torus_layouts import FFN_LAYOUTS, GATHERED, parse
from tests.helpers import tiny
from tests.helpers.paths import ROOT

BF16 = CacheConfig(dtype="bfloat16")


def planned(
    name="palm-540b",
    chips=64,
    batch=64,
    phase="decode",
    weights="bfloat16",
    context=2048,
    chip="v4",
    fields=None,
    **more,
):
    return plan.plan(
        size(name, **fields or {}),
        BF16,
        chip=chip,
        chips=chips,
        batch=batch,
        context=context,
        phase=phase,
        weights=weights,
        **more,
    )


# --- the paper's choices -------------------------------------------------------------------------------

HEAD, BATCH = "replicated", "by_batch:xyz"  # one K, V head: head-sharded queries mean K, V on every chip
MEASURED = [
    ("palm-540b", 64, 1, "prefill", "int8", "ws_2d", HEAD),
    ("palm-540b", 64, 64, "decode", "int8", "ws_2d", BATCH),
    ("palm-540b", 64, 512, "prefill", "bfloat16", "wg_xyz", BATCH),
    ("palm-540b", 64, 512, "decode", "bfloat16", "ws_2d", BATCH),
    ("palm-62b", 16, 1, "prefill", "int8", "ws_2d", HEAD),
    ("palm-62b", 16, 32, "decode", "int8", "ws_2d", BATCH),
    ("palm-62b", 32, 512, "prefill", "bfloat16", "wg_xyz", BATCH),
    ("palm-62b", 8, 512, "decode", "bfloat16", "ws_2d", BATCH),
]


@pytest.mark.parametrize("name, chips, batch, phase, weights, ffn, attention", MEASURED)
def test_the_papers_layout_is_picked(name, chips, batch, phase, weights, ffn, attention):
    """Section 8's eight configurations: of five FFN layouts x {head, batch} the first is the paper's.

    Assumption: full overlap, the largest of compute, HBM and links time, which is what the paper's looped
    collectives are built for; equal times go to less memory. Mesh: the paper's for the chip count. In the two
    throughput prefills all layouts that fit hide behind compute and memory decides (no gathered activations); in
    62B's decode on 8 chips ws_1d ties too and loses by its K, V weights, which ws_2d splits over x.
    """
    layouts = [parse(f"{f}/{kv}") for f in FFN_LAYOUTS for kv in (HEAD, BATCH)]
    heads = {"n_heads": {"palm-540b": 64, "palm-62b": 32}[name]}  # the paper pads 540B's 48 for all of its runs
    for fields in (heads, {}):
        p = planned(
            name, chips, batch, phase, weights, fields=fields, layouts=layouts, meshes=[plan.default_mesh(chips)]
        )
        assert p.best.layout.name == f"{ffn}/{attention}"


@pytest.mark.parametrize("name, chips, batch, phase, weights, ffn, attention", MEASURED)
def test_without_overlap_two_of_eight_differ(name, chips, batch, phase, weights, ffn, attention):
    """All in turn: 540B's large prefill would take wg_xy (4 % ahead: the gated MLP gathers three matrices, so XYZ
    pays from 1.2M tokens) and 62B's decode on 8 chips ws_1d (3 % ahead; 2D pays from 16 chips). Six are the same."""
    layouts = [parse(f"{f}/{kv}") for f in FFN_LAYOUTS for kv in (HEAD, BATCH)]
    meshes = [plan.default_mesh(chips)]
    p = planned(name, chips, batch, phase, weights, layouts=layouts, meshes=meshes, overlap="none")
    other = {("palm-540b", "prefill", 512): "wg_xy", ("palm-62b", "decode", 512): "ws_1d"}.get((name, phase, batch))
    assert p.best.layout.name == f"{other or ffn}/{attention}"
    if other:
        first, paper = p.best, next(c for c in p.feasible if c.layout.name == f"{ffn}/{attention}")
        assert first.seconds < paper.seconds < 1.05 * first.seconds


def test_free_choice_of_mesh_and_layout_in_decode():
    """Every layout on every factorisation: still 2D with the batch over all chips, on the authors' mesh."""
    for overlap in ("full", "none"):
        best = planned(weights="int8", overlap=overlap).best
        assert (best.layout.name, best.mesh) == ("ws_2d/by_batch:xyz", (4, 4, 4))


def test_one_long_sequence_is_split_by_context():
    """Batch 1, 128k tokens of a GQA-8 model on 64 chips: heads over eight, context over the rest, or all of it."""
    p = planned("llama3-70b", batch=1, context=131072, chip="v5e")
    assert p.best.layout.kv_seq and not p.best.layout.kv_batch
    assert all("batch" not in c.layout.name for c in p.feasible)


def test_prefill_goes_from_stationary_to_gathered_with_tokens():
    """Section 7: more tokens gather over more axes (collectives in turn, 540B, 64 chips)."""
    got = [
        planned(
            batch=b,
            phase="prefill",
            overlap="none",
            meshes=[(4, 4, 4)],
            layouts=[parse(f"{f}/{BATCH}") for f in FFN_LAYOUTS],
        ).best.layout.ffn
        for b in (64, 128, 512)
    ]
    assert got == sorted(got, key=FFN_LAYOUTS.index)
    small = planned(batch=64, context=128, phase="prefill", overlap="none", meshes=[(4, 4, 4)]).best.layout.ffn
    assert (small, got[-1]) == ("ws_2d", "wg_xy")


# --- the workload --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_workload_counts_every_parameter(name):
    work = plan.workload(SIZES[name], BF16)
    assert work.n_params == account.param_count(SIZES[name])
    assert sum(layer.count for layer in work.layers) == SIZES[name].n_layers


def test_workload_reads_every_axis():
    cfg = tiny.CASES["mqa_cla2_pattern"]
    got = [
        (layer.count, layer.owner, layer.visible, layer.slots, layer.read_into("k_heads") > 0)
        for layer in plan.workload(cfg, CacheConfig(kinds=("by_mask",))).layers
    ]
    assert got == [(1, True, 7, 7, True), (1, False, 7, 7, False), (1, True, 0, 0, True), (1, False, 0, 0, False)]
    assert plan.workload(tiny.config(residual="parallel_palm"), BF16).residual == "parallel"
    assert plan.workload(tiny.config(residual="serial"), BF16, weights="int8").weight_bytes == 1
    gelu = plan.workload(tiny.config(mlp="gelu"), BF16).layers[0]
    assert gelu.read_into("mlp") == gelu.written_from("mlp")
    (tied,) = plan.workload(tiny.CASES["tied_kv"], BF16).layers[0].leaves
    assert (tied.shape, tied.role, tied.per) == ((3, 10), "both", "token")


# --- meshes, candidates --------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 12, 64, 30])
def test_factorisations(n):
    brute = [m for m in itertools.product(range(1, n + 1), repeat=3) if math.prod(m) == n]
    assert list(plan.factorisations(n)) == brute
    assert plan.default_mesh(n) in brute


def test_default_meshes():
    assert [plan.default_mesh(n) for n in (8, 16, 32, 64)] == [(2, 2, 2), (2, 4, 2), (4, 2, 4), (4, 4, 4)]
    assert [plan.default_mesh(n) for n in (1, 4, 27)] == [(1, 1, 1), (1, 2, 2), (3, 3, 3)]
    assert all(math.prod(mesh) == n for n, mesh in plan.DEFAULT_MESHES.items())


def test_every_program_is_tried_once():
    """On each mesh, what the axes of more than one chip do (gathered, heads, batch, context) is met once, and every
    such assignment that by_head's order allows is met."""

    def program(layout, mesh):
        sides = dict(zip("xyz", mesh, strict=True))
        real = [a for a in "xyz" if sides[a] > 1]
        gone = tuple(a for a in real if a in GATHERED[layout.ffn])
        ffn = "wg" if gone else "ws_1d" if layout.ffn == "ws_1d" or sides["x"] == 1 else "ws_2d"
        kinds = {"h": layout.kv_heads, "b": layout.kv_batch, "s": layout.kv_seq}
        return mesh, ffn, gone, tuple(next((k for k, axes in kinds.items() if a in axes), "-") for a in real)

    # so large that batch, heads and slots always divide, so nothing but repetition is left out
    cfg = tiny.config(n_heads=8, n_k_heads=8, n_v_heads=8, d_model=64, d_ff=64, vocab_size=64)
    p = plan.plan(cfg, BF16, chip="v4", chips=8, batch=8, context=64, phase="decode")
    met = [program(c.layout, c.mesh) for c in p.candidates]
    assert len(met) == len(set(met))
    every = {
        program(layout, mesh)
        for layout in plan.all_layouts()
        for mesh in plan.factorisations(8)
        if not any(a in layout.kv_heads and b not in layout.kv_heads for a, b in (("y", "z"), ("x", "y")))
    }
    assert set(met) == every
    assert not p.infeasible


def test_order_is_by_time_then_memory():
    p = planned("palm-62b", 32, 512, "prefill")
    keys = [(float(f"{c.seconds:.5e}"), c.prediction.memory_bytes) for c in p.feasible]
    assert keys == sorted(keys) and len(keys) > 30
    assert len({c.layout for c in p.feasible}) == len(p.feasible)
    for c in p.feasible:
        same = [o.seconds for o in p.candidates if o.layout == c.layout and not o.reason]
        assert c.seconds <= min(same) * 1.05


def test_head_padding_is_shown_and_paid_for():
    """48 heads on 64 chips: padded to 64, counted in weights, not in MFU; refused without padding."""
    layouts, meshes = [parse("ws_2d/by_batch:xyz"), parse("wg_xyz/by_batch:xyz")], [(4, 4, 4)]
    c = planned(layouts=layouts, meshes=meshes).best
    assert c.n_heads == 64
    assert c.prediction.counted_params == account.param_count(size("palm-540b"))
    assert c.prediction.weight_memory * 64 > 2 * account.param_count(size("palm-540b", n_heads=64))
    bare = planned(layouts=layouts, meshes=meshes, pad_heads=False)
    assert [c.layout.ffn for c in bare.feasible] == ["wg_xyz"]
    assert "n_heads is 48, not divisible by the 64 chips" in bare.infeasible[0].reason


def test_padded_heads_stay_a_multiple_of_the_kv_heads():
    cfg = tiny.config(n_heads=6, n_k_heads=3, n_v_heads=3, d_model=64, d_ff=64, vocab_size=64)
    p = plan.plan(cfg, BF16, chip="v4", chips=8, batch=8, context=64, phase="decode", meshes=[(2, 2, 2)])
    assert {c.n_heads for c in p.candidates if c.layout.ffn == "ws_2d"} == {24}  # of 8 and 3
    assert {c.n_heads for c in p.candidates if c.layout.ffn == "wg_xyz"} == {12}  # of 4 and 3


def test_reasons_are_sentences():
    p = planned("llama3-70b", 64, 6, chip="v5e", context=2000, latency=0.0045)
    assert p.infeasible and all(c.reason.endswith(".") and "\n" not in c.reason for c in p.infeasible)
    kinds = (
        "batch is 6, not divisible",
        "n_k_heads is 8, not divisible by the",
        "slots is 2000, not divisible",
        "above the latency of 4.5 ms",
    )
    for kind in kinds:
        assert any(kind in c.reason for c in p.infeasible), kind
    assert all(c.seconds <= 0.0045 for c in p.feasible)


# --- what would fit ------------------------------------------------------------------------------------


def test_the_nearest_changes_fit_and_half_of_them_do_not():
    """PaLM 540B, batch 512, 65536 tokens: 59 GiB of cache a chip."""
    p = planned(batch=512, context=65536)
    assert not p.feasible
    assert p.changes == ("batch 128 instead of 512", "int4 cache", "context 16384 instead of 65536")
    meshes = [(4, 4, 4)]
    for fits, fails in (
        ({"batch": 128, "context": 65536}, {"batch": 256, "context": 65536}),
        ({"batch": 512, "context": 16384}, {"batch": 512, "context": 32768}),
        ({"batch": 512, "context": 65536, "kv": "int4"}, {"batch": 512, "context": 65536, "kv": "int8"}),
    ):
        assert planned(**fits, meshes=meshes).feasible and not planned(**fails, meshes=meshes).feasible
    with pytest.raises(ShardingError, match="no layout fits. What would fit: batch 128 instead of 512, or int4 cache"):
        _ = p.best


def test_weights_too_large_ask_for_chips_or_int8():
    p = planned("llama3-70b", 8, 8, chip="v5e", context=1024)
    assert p.changes == ("16 chips instead of 8", "int8 weights")
    assert "of v5e's 14.9" in p.infeasible[0].reason or "not divisible" in p.infeasible[0].reason


def test_half_is_tried_first():
    assert "batch 128 instead of 256" in planned(batch=256, context=65536).changes


def test_a_prompt_too_long_is_shortened_whole():
    """The prompt is the context: both are halved, until weights, cache and activations fit."""
    p = planned(batch=512, phase="prefill", context=16384)
    assert p.changes == ("batch 64 instead of 512", "context 2048 instead of 16384")
    assert planned(batch=512, phase="prefill", context=2048).feasible


def test_a_latency_out_of_reach():
    p = planned(batch=64, weights="int8", latency=0.005)
    assert not p.feasible and p.changes == ("128 chips instead of 64",)
    assert planned(batch=64, weights="int8", latency=0.005, chips=128).best.seconds < 0.005


def test_a_plan_shows_itself():
    console = Console(record=True, width=160, file=io.StringIO())
    console.print(planned(weights="int8").table(3))
    console.print(planned(batch=512, context=65536).refused(2))
    text = console.export_text()
    assert "ws_2d/by_batch:xyz N=64" in text and "4x4x4" in text and "padded from 48" in text
    assert "needs 75.0 GiB a chip" in text and text.count("by_batch") >= 5
    row = planned(weights="int8").as_dict(1)["feasible"][0]
    assert row["seconds"]["none"] == pytest.approx(
        row["compute_seconds"] + row["hbm_seconds"] + row["interconnect_seconds"]
    )
    assert set(row["interconnect_bytes"]) == set(cost.PURPOSES)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"chip": "v9"}, "chip is 'v9'; choose one of v4"),
        ({"phase": "train"}, "phase is 'train'; choose one of prefill, decode"),
        ({"overlap": "half"}, "overlap is 'half'"),
        ({"links": "some"}, "links is 'some'"),
        ({"weights": "int4"}, "weights is 'int4'; choose one of bfloat16, int8"),
        ({"kv": "int3"}, "kv is 'int3'; choose one of float32"),
        ({"chips": 0}, "chips is 0"),
        ({"batch": -1}, "batch is -1"),
        ({"context": 0}, "context is 0"),
        ({"tokens": 4096}, "tokens is 4096, more than the context of 2048"),
        ({"latency": -1.0}, "latency is -1.0"),
        ({"chip": "H100"}, "chips is 64, but the links of H100 join 8"),
        ({"meshes": [(2, 4, 4)]}, "mesh is 2x4x4 = 32 chips, but chips is 64"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        planned(**changes)
    assert str(caught.value).endswith(".")


def test_a_gpu_node_and_other_requests():
    p = planned("llama3-70b", 8, 16, chip="H200", context=8192)
    assert p.best.prediction.chip.name == "H200"
    with pytest.raises(ShardingError, match="write it as ffn/kv"):
        plan.parse_layouts(["ws_2d/foo"])
    with pytest.raises(UserError, match="mesh is '4x4'; write it as XxYxZ"):
        plan.parse_mesh("4x4")
    chunk = planned(batch=64, phase="prefill", tokens=64, context=2048)  # 64 new tokens on 1984 cached ones
    assert chunk.request.tokens == 64 and chunk.best.prediction.tokens == 64 * 64


# --- the command ---------------------------------------------------------------------------------------


def command(*args):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    line = [sys.executable, "-m", "experiments.plan", *args]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=env)


def test_command_json():
    done = command("--size=palm-540b", "--slice=v4:4x4x4", "--batch=64", "--weights=int8", "--rows=2", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    got = json.loads(done.stdout)
    assert got["request"]["chips"] == 64 and len(got["feasible"]) == 2
    assert got["feasible"][0]["layout"] == "ws_2d/by_batch:xyz"
    want = planned(weights="int8").best
    assert got["feasible"][0]["seconds"]["full"] == want.seconds


def test_command_says_what_would_fit():
    done = command("--size=palm-540b", "--chips=64", "--batch=512", "--context=65536")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines()[-1].startswith("No layout fits. What would fit: batch 128 instead of 512, or")


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--size=palm-1b", "size is 'palm-1b'; choose one of"),
        ("--slice=v4:4x4", "--slice=v4:4x4"),
        ("--phase=both", "phase is 'both'; choose one of prefill, decode."),
        ("--rows=0", "rows is 0; it must be at least 1."),
    ],
)
def test_command_refuses_in_one_line(flag, message):
    done = command(flag)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


def test_command_help():
    done = command("--help")
    assert done.returncode == 0 and "--latency_ms" in done.stdout and "every factorisation" in done.stdout


def test_requests_are_values():
    ask = planned(meshes=[(4, 4, 4)], layouts=[parse("ws_2d/by_batch:xyz")]).request
    assert dataclasses.replace(ask, batch=ask.batch) == ask
