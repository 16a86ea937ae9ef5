"""The sharding study on tiny models: figures against the cost model and hand counts; resuming; failures."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from configs.sizes import SIZES, size
from experiments.common import cli
from experiments.sharding_study import answers, cells
from experiments.sharding_study import cut as cut_lib
from experiments.sharding_study import plot as sharding_study_plot
from experiments.sharding_study import program as program_lib
from experiments.sharding_study import report as sharding_study_report
from experiments.sharding_study import run as sharding_study
from kvattn import config as c
from kvattn import int8_weights as weights
from kvattn import plan
from kvattn.attention.heads import heads_model
from kvattn.config import plain
from kvattn.decode import partitioned as sharded
from kvattn.errors import UserError
from sharding import ShardingError, cost
from sharding.compiler.aot import Compiler
from sharding.layout import torus_layouts
from tests.helpers.paths import ROOT
from tests.helpers.tolerances import CLOSED_FORM, close

BF16 = c.CacheConfig(dtype="bfloat16")
# 8 chips: W 1000 -> 1024, N 6 -> 8.
MQA = heads_model(
    vocab_size=1000,
    d_model=256,
    n_layers=2,
    n_heads=6,
    n_k_heads=1,
    n_v_heads=1,
    head_dim=128,
    v_head_dim=128,
    d_ff=1024,
    residual="parallel_palm",
    norm="layernorm",
)
GQA = MQA.replace(n_k_heads=3, n_v_heads=3, residual="serial", norm="rmsnorm")
LAYOUTS = ("ws_2d/by_batch:xyz", "ws_1d/replicated", "wg_xyz/by_batch:xyz")


def experiment(workdir, model=MQA, **changes) -> c.Experiment:
    fields = {
        "rows": (c.VariantConfig("mqa", model=model, cache=BF16),),
        "slices": ("v4:2x2x2",),
        "batches": (16,),
        "contexts": (128,),
        "layouts": LAYOUTS,
        "meshes": ("default",),
        "compile": "none",
        "measure": False,
    }
    return c.Experiment(name="tiny", workdir=str(workdir), sharding_study=c.ShardingStudyConfig(**fields | changes))


def lines(workdir):
    return [json.loads(line) for line in (Path(workdir) / "results.jsonl").read_text().splitlines()]


def of(records, kind):
    return [r for r in records if r["kind"] == kind]


# --- one study, all four answers -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Decode predicted, compiled and measured, with a paper figure for a row that is not the best."""
    paper = c.ShardingCellConfig(batch=16, context=128, paper_layout=LAYOUTS[1], paper_seconds=0.0123, paper_source="x")
    cfg = experiment(tmp_path_factory.mktemp("study"), batches=(), cells=(paper,), compile="best", measure=True)
    c.validate(cfg)
    return cfg, sharding_study.run(cfg)


def test_predicted_is_the_cost_model_of_the_padded_model(done):
    cfg, records = done
    rows = of(records, "predicted")
    assert [r["rank"] for r in rows] == [0, 1, 2] and {r["layout"] for r in rows} == set(LAYOUTS)
    padded = MQA.replace(vocab_size=1024, n_heads=8)
    work = plan.workload(padded, BF16)
    for r in rows:
        assert r["padded"] == ["W 1000 -> 1024", "N 6 -> 8"] and r["mesh"] == [2, 2, 2] and not r["reason"]
        p = cost.predict(
            work, torus_layouts.parse(r["layout"]), (2, 2, 2), "v4", phase="decode", batch=16, tokens=1, context=128
        )
        assert r["seconds"] == {name: p.step_seconds(name) for name in cost.OVERLAPS}
        assert sum(r["memory_bytes"].values()) == p.memory_bytes
        assert r["interconnect_bytes"] == p.interconnect_bytes
        # MFU by hand, of the model without its padding: per layer q, o, k, v, three MLP matrices and two norm vectors
        D, F, N, H = 256, 1024, 6, 128
        params = 1000 * D + 2 * (2 * D * N * H + 2 * D * H + 3 * D * F + 2 * D) + 2 * D
        close(r["mfu"], 2 * params * 16 / (p.step_seconds("full") * 8 * 275e12), CLOSED_FORM)
        close(r["chip_seconds_per_token"], 8 * p.step_seconds("full") / 16, CLOSED_FORM)
    seconds = [r["seconds"]["full"] for r in rows]
    assert seconds == sorted(seconds)


def test_compiled_is_the_compilers_answer(done):
    _, records = done
    best, paper = sorted(of(records, "compiled"), key=lambda r: r["layout"] != of(records, "predicted")[0]["layout"])
    assert best["layout"] == of(records, "predicted")[0]["layout"] and paper["layout"] == LAYOUTS[1]
    weights_of = {r["layout"]: r for r in of(records, "predicted")}
    for r in (best, paper):
        p = weights_of[r["layout"]]
        assert "failure" not in r and r["seconds"] > 0 and r["compile_seconds"] > 0
        close(r["interconnect_seconds"], p["interconnect_seconds"], CLOSED_FORM)
        close(r["total_seconds"], max(r["seconds"], p["hbm_seconds"]) + p["interconnect_seconds"], CLOSED_FORM)
        close(r["mfu"], p["mfu"] * p["seconds"]["full"] / r["total_seconds"], CLOSED_FORM)
        held = p["memory_bytes"]["weights"] + p["memory_bytes"]["cache"]
        own = 2 * 4 * 16 + 2 * 4 * 16  # tokens, positions; the caches' lengths (over-counted where they are split)
        assert held <= r["memory"]["arguments"] <= held + own + 2**16, "padding to tiles is small"
        assert r["memory"]["total"] >= r["memory"]["arguments"]
        assert r["collective_bytes"] == sum(row[4] for row in r["collectives"]) > 0
        assert not [f for f in r["first_findings"] if "unexpected" in f and "all-to-all" in f]


def test_measured_says_that_it_is_a_cut_and_equals_the_unsharded_model(done):
    _, records = done
    rows = of(records, "measured")
    assert len(rows) == 2
    for r in rows:
        assert r["what"] == "cut on 8 fake CPU devices" and r["mesh"] == [2, 2, 2] and r["layers"] == 2
        assert 0 <= r["worst"] < 1e-5 and r["milliseconds"] > 0


def test_report_and_plots_hold_the_numbers(done):
    cfg, records = done
    folder = Path(cfg.workdir)
    for name in ("frontier", "context", "memory"):
        picture = (folder / f"{name}.png").read_bytes()
        assert picture[:4] == b"\x89PNG" and len(picture) > 9000
    report = (folder / "report.md").read_text()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.splitlines() if "| mqa" in line]
    best, paper = of(records, "predicted")[0], next(r for r in of(records, "predicted") if r["layout"] == LAYOUTS[1])
    for row, p in zip(table, (best, paper), strict=True):
        compiled = next(r for r in of(records, "compiled") if r["layout"] == p["layout"])
        assert row[0] == "mqa v4:2x2x2 decode B16 S128 bf16 (W 1000 -> 1024, N 6 -> 8)" and row[1] == p["layout"]
        fast, slow = (sharding_study_report.ms(p["seconds"][name]) for name in ("full", "none"))
        assert row[3] == f"{fast} - {slow}" and row[7] == sharding_study_report.ms(compiled["total_seconds"])
        assert row[11].startswith("cut: ")
    assert [row[12] for row in table] == ["-", "12.3"]
    assert "fake CPU devices" in report and "jax" in report


def test_the_same_command_redoes_nothing(done, monkeypatch, capsys):
    cfg, records = done
    monkeypatch.setattr(Compiler, "compile", None)
    monkeypatch.setattr(answers.Cuts, "run", None)
    monkeypatch.setattr(answers, "predict", None)
    assert sharding_study.run(cfg) == records == lines(cfg.workdir)
    shown = capsys.readouterr().out
    assert "ws_1d/replicated" in shown and "12.3" in shown and "is padded: W 1000 -> 1024" in shown


def test_expected_collectives_are_those_of_the_program(done):
    """The doctor's expectations add up to the cost model's bytes on the wire; batch and D of the residual stream are
    gathered apart, with the same bytes. Gathered weights are not held against it."""
    cfg, _ = done
    (cell,) = cells.cells_of(cfg)
    for layout in LAYOUTS:
        p = cell.predict(layout, (2, 2, 2))
        wanted = program_lib.expectations(cell.padded[0], BF16, p, 16, 128, "none")
        if "wg" in layout:
            assert wanted.collectives is None
            continue
        wire = sum(size * (1 - 0.5 ** len(axes)) for (_, axes), size in wanted.collectives.items())
        close(wire, sum(p.interconnect_bytes.values()), CLOSED_FORM)
        split = 8 if "by_batch" in layout else 1
        assert wanted.caches == (((16 // split, 1, 128, 128), "bf16"),)
        assert program_lib.expectations(cell.padded[0], BF16, p, 16, 128, "one_way").collectives is None


# --- killed, failed, refused ---------------------------------------------------------------------------


def fake(calls, fail=()):
    def compiled(cfg, cell, row, compiler):
        calls.append(cell.id)
        if len(calls) in fail:
            raise SystemExit(9)
        memory = {"arguments": 1, "outputs": 1, "temporaries": 1, "aliased": 0, "code": 0, "total": 3}
        return {"total_seconds": 1e-3, "memory": memory, "mfu": 0.1, "findings": {"warning": 2}, "first_findings": []}

    return compiled


def test_a_killed_study_goes_on(tmp_path, monkeypatch):
    cfg = experiment(tmp_path / "w", batches=(8, 16, 32), compile="best")
    calls = []
    monkeypatch.setattr(answers, "compiled", fake(calls, fail=(2,)))
    with pytest.raises(SystemExit):
        sharding_study.run(cfg)
    assert len(of(lines(tmp_path / "w"), "planned")) == 3 and len(of(lines(tmp_path / "w"), "compiled")) == 1
    with open(tmp_path / "w" / "results.jsonl", "a") as handle:
        handle.write('{"kind": "compiled", "cell": "mqa v4')
    records = sharding_study.run(cfg)
    assert calls == [calls[0], calls[1], calls[1], calls[3]] and len(set(calls)) == 3
    assert records == lines(tmp_path / "w") and len(of(records, "compiled")) == 3
    # killed while a cell's predictions were written: they are written anew, once
    kept = [r for r in records if r["kind"] in ("setup", "model")] + of(records, "predicted")[:2]
    (tmp_path / "w" / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    again = sharding_study.run(cfg)
    assert of(again, "predicted") == of(records, "predicted") and len(of(again, "planned")) == 3


def test_more_questions_extend_a_study_and_other_changes_are_named(tmp_path):
    first = sharding_study.run(experiment(tmp_path / "w"))
    more = sharding_study.run(experiment(tmp_path / "w", batches=(16, 32), weights=("bfloat16", "int8")))
    assert more[: len(first)] == first and len(of(more, "planned")) == 4
    other = dataclasses.replace(MQA, d_ff=2048)
    for changed, message in (
        (experiment(tmp_path / "w", rank="none"), "sharding_study.rank='full' and this run has 'none'"),
        (experiment(tmp_path / "w", model=other), "mqa.model.d_ff=1024 and this run has 2048"),
    ):
        with pytest.raises(UserError, match=message):
            sharding_study.run(changed)
    assert lines(tmp_path / "w") == more
    old = [{k: v for k, v in more[0].items() if k != "format"}, *more[1:]]
    (tmp_path / "w" / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in old))
    with pytest.raises(UserError, match="another version of kvattn .it has no format"):
        sharding_study.run(experiment(tmp_path / "w"))
    (tmp_path / "w" / "results.jsonl").write_text('{"phase": 1}\n')
    with pytest.raises(UserError, match="not a sharding study's results"):
        sharding_study.run(experiment(tmp_path / "w"))


def test_a_program_that_does_not_compile_is_a_row_and_the_study_goes_on(tmp_path, capsys):
    cfg = experiment(tmp_path / "w", batches=(8, 16), compile="best", timeout=0.3)
    records = sharding_study.run(cfg)
    rows = of(records, "compiled")
    assert [r["failure_kind"] for r in rows] == ["timeout"] * 2 and all("0.3 s" in r["failure"] for r in rows)
    report = (tmp_path / "w" / "report.md").read_text()
    assert "## Failures" in report and "did not finish within 0.3 s" in report and "failed: timeout" in report
    assert "failed: timeout" in capsys.readouterr().out
    assert sharding_study.run(cfg) == records


@pytest.mark.parametrize(
    "model, changes, reasons",
    [
        (
            MQA,
            {"batches": (2,), "layouts": LAYOUTS[:1]},
            {LAYOUTS[0]: "batch is 2, not divisible by the 8 chips of x.y.z"},
        ),
        (GQA, {"layouts": LAYOUTS[1:2]}, {LAYOUTS[1]: "model.n_heads is 6, not divisible by the 8 chips"}),
        (
            MQA,
            {"layouts": ("ws_2d/by_head:z",)},
            {"ws_2d/by_head:z": "model.n_k_heads is 1, not divisible by the 2 chips"},
        ),
        (size("palm-540b"), {"layouts": LAYOUTS[:1]}, {LAYOUTS[0]: "GiB a chip .* of v4's 32.0; take more chips"}),
    ],
)
def test_what_does_not_fit_is_a_row_with_its_reason(tmp_path, model, changes, reasons, capsys):
    records = sharding_study.run(experiment(tmp_path / "w", model=model, **changes))
    rows = of(records, "predicted")
    assert {r["layout"] for r in rows} == set(reasons)
    report = (tmp_path / "w" / "report.md").read_text()
    for r in rows:
        assert re.search(reasons[r["layout"]], r["reason"]) and r["reason"] in report
    (planned,) = of(records, "planned")
    assert planned["verdict"].startswith("No layout fits.") and planned["fit"] == 0 and planned["verdict"] in report
    shown = " ".join(capsys.readouterr().out.split())
    assert "none fits" in shown and planned["verdict"] in shown and rows[0]["reason"][:60] in shown
    assert not (tmp_path / "w" / "frontier.png").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"slices": ("v9:2x2",)}, "sharding_study.slices has v9:2x2 names no chip"),
        ({"slices": ("v4:3x2x2",)}, "v4:3x2x2"),
        ({"meshes": ("2x2x4",)}, "2x2x4 = 16 chips but v4:2x2x2 has 8; make the product 8"),
        ({"meshes": ("8",)}, "write it as XxYxZ"),
        ({"layouts": ("ws_3d/replicated",)}, "layout is 'ws_3d'"),
        ({"phases": ("prefill",), "tokens": (256,)}, "tokens has 256, above a context of 128"),
        ({"batches": ()}, "asks nothing"),
        ({"cells": (c.ShardingCellConfig(variant="mqq"),)}, "names row 'mqq'; rows are mqa"),
    ],
)
def test_bad_questions_are_one_sentence(tmp_path, changes, message):
    with pytest.raises((UserError, ShardingError)) as caught:
        sharding_study.run(experiment(tmp_path / "w", **changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"compile": "some"}, "sharding_study.compile"),
        ({"rank": "half"}, "sharding_study.rank"),
        ({"overlap": "half"}, "sharding_study.overlap"),
        ({"phases": ("train",)}, "sharding_study.phases"),
        ({"weights": ("float32",)}, "sharding_study.weights"),
        ({"batches": (0,)}, "sharding_study.batches"),
        ({"contexts": (0,)}, "sharding_study.contexts"),
        ({"timeout": 0.0}, "sharding_study.timeout"),
        ({"rows": (c.VariantConfig("a"), c.VariantConfig("a"))}, "'a' twice"),
        ({"rows": (c.VariantConfig("a", (c.Conversion.of("cla", factor=2),)),)}, "has convert"),
        ({"rows": (c.VariantConfig("a", model=MQA.replace(n_k_heads=4)),)}, "model.n_k_heads"),
        ({"cells": (c.ShardingCellConfig(tokens=4096),)}, "cells[0].tokens"),
    ],
)
def test_illegal_configs_name_the_field(changes, field):
    with pytest.raises(UserError) as caught:
        c.from_config_dict(c.to_config_dict(experiment("w", **changes)))
    assert field in str(caught.value)


def test_missing_libtpu_is_said_before_anything_is_written(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "libtpu" else real(name, *a))
    with pytest.raises(ShardingError, match="libtpu is not installed; pip install") as caught:
        sharding_study.run(experiment(tmp_path / "w", compile="best"))
    assert cli.explain(caught.value) and not (tmp_path / "w").exists()
    assert of(sharding_study.run(experiment(tmp_path / "w")), "planned")  # to predict, it is not needed


@pytest.mark.parametrize(
    "flags, code, message",
    [
        (["--slices=v4:9x9"], 2, "error: sharding_study.slices has v4:9x9"),
        (["--compile=most"], 2, "error: sharding_study.compile is 'most'; choose one of none, best, all."),
        (
            [
                "--slices=v4:2x2x1",
                "--compile=none",
                "--nomeasure",
                "--batches=4",
                "--contexts=2048",
                "--variants=palm-8b",
            ],
            0,
            "report, plots and results.jsonl are in",
        ),
    ],
)
def test_command(tmp_path, flags, code, message):
    argv = [sys.executable, "-m", "experiments.sharding_study", f"--workdir={tmp_path / 'w'}", *flags]
    done = subprocess.run(
        argv, cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    assert done.returncode == code, done.stderr
    text = done.stderr if code else done.stdout
    assert message in text and (not code or text.count("\n") == 1)


# --- programs and cuts ---------------------------------------------------------------------------------


def test_padding_is_the_papers_and_says_so():
    cfg, notes = program_lib.padded(size("palm-540b"), 64)
    assert (cfg.vocab_size, cfg.attention(0).n_heads) == (262144, 64) and notes == ("W 256128 -> 262144", "N 48 -> 64")
    same, notes = program_lib.padded(size("smollm2-1.7b"), 8)
    assert same == size("smollm2-1.7b") and notes == ()
    cfg, notes = program_lib.padded(GQA, 8)  # a new query head would need a K/V group
    assert cfg.attention(0).n_heads == 6 and notes == ("W 1000 -> 1024",)


@pytest.mark.parametrize("name", sorted(SIZES))
def test_cuts_are_small_legal_and_keep_the_variant(name):
    cfg = SIZES[name]
    job = {
        "model": plain(cfg),
        "cache": plain(BF16),
        "layout": "ws_2d/by_batch:xyz",
        "phase": "decode",
        "batch": 512,
        "context": 2048,
        "tokens": 0,
        "weights": "bfloat16",
        "overlap": "none",
        "mesh": [4, 4, 4],
    }
    small, mesh = cut_lib.cut(json.loads(json.dumps(job)))
    got = c.from_config_dict(small["model"], c.ModelConfig)
    assert mesh == (2, 2, 2) and small["batch"] == 16 and got.attention(0).n_heads % 8 == 0
    mine, whole = got.attention(0), cfg.attention(0)
    for one in ("n_k_heads", "n_v_heads"):
        assert (getattr(mine, one) == 1) == (getattr(whole, one) == 1)
        assert (getattr(mine, one) == mine.n_heads) == (getattr(whole, one) == whole.n_heads)
    assert (got.owners != tuple(range(got.n_layers))) == (cfg.owners != tuple(range(cfg.n_layers)))
    assert (got.mlp, got.residual, got.norm, got.tied_embeddings) == (
        cfg.mlp,
        cfg.residual,
        cfg.norm,
        cfg.tied_embeddings,
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(weights.abstract(got, "bfloat16"))) < 5e6


@pytest.mark.parametrize(
    "mesh, want", [((1, 8, 8), (1, 2, 4)), ((1, 1, 64), (1, 1, 8)), ((8, 2, 4), (2, 2, 2)), ((2, 2, 1), (2, 2, 1))]
)
def test_cut_meshes_have_at_most_eight_devices_and_no_new_axis(mesh, want):
    job = {
        "model": plain(MQA),
        "cache": plain(BF16),
        "layout": "ws_1d/replicated",
        "phase": "decode",
        "batch": 3,
        "weights": "int8",
        "overlap": "none",
        "mesh": mesh,
    }
    small, got = cut_lib.cut(job)
    assert all(a <= b for a, b in zip(got, mesh)) and got == want and small["batch"] == 3


def test_the_cut_that_runs_wrong_shows(monkeypatch):
    """The error of a measurement is that of the sharded program: a wrong program does not pass for a right one."""
    model = plain(dataclasses.replace(MQA, n_layers=1))
    job = {
        "model": model,
        "cache": plain(BF16),
        "layout": LAYOUTS[0],
        "batch": 16,
        "phase": "decode",
        "weights": "int8",
        "overlap": "none",
        "mesh": [2, 2, 2],
    }
    assert cut_lib.measure_cut(job)["worst"] < 3e-2  # bf16 activations
    real = sharded.build

    def wrong(*args, **kwargs):
        made = real(*args, **kwargs)
        return dataclasses.replace(made, fn=lambda p, ids, at, caches: made.fn(p, ids + 1, at, caches))

    monkeypatch.setattr(program_lib.sharded, "build", wrong)
    assert cut_lib.measure_cut(job)["worst"] > 0.1


def test_a_cut_that_fails_is_an_answer(monkeypatch):
    """In the child's own process, and where the child itself ends."""
    with answers.Cuts() as cuts:
        assert "KeyError" in cuts.run({"model": {}})["failure"] or "model" in cuts.run({"model": {}})["failure"]
        cuts._process.kill()
        cuts._process.wait()
        assert "ended" not in cuts.run({"model": {}})["failure"]  # a new process answered
        monkeypatch.setattr(cuts, "_line", [sys.executable, "-c", "import os; os._exit(7)"])
        cuts.kill()
        assert cuts.run({}) == {"failure": "the process with fake devices: cut ended with code 7 during measure"}


@pytest.mark.parametrize("model, layout", [(MQA, LAYOUTS[2]), (GQA, "ws_2d/by_head:z+by_batch:xy")])
def test_the_cut_of_a_prefill_equals_the_unsharded_model(model, layout):
    model = model.replace(n_layers=3, n_k_heads=2 * (model is GQA) or 1, n_v_heads=2 * (model is GQA) or 1)
    job = {
        "model": plain(model),
        "cache": plain(BF16),
        "layout": layout,
        "batch": 16,
        "phase": "prefill",
        "weights": "bfloat16",
        "overlap": "none",
        "mesh": [2, 2, 2],
    }
    got = cut_lib.measure_cut(job)
    assert got["worst"] < 1e-5 and got["context"] == cut_lib.CUT_CONTEXT


@pytest.mark.parametrize("phase", cost.PHASES)
def test_on_the_slice_itself_the_true_program_is_measured(tmp_path, monkeypatch, phase):
    """With this process's 8 devices taken for the slice."""
    monkeypatch.setattr(answers, "is_slice", lambda cell: True)
    cfg = experiment(tmp_path / "w", measure=True, phases=(phase,), contexts=(16,), layouts=LAYOUTS[:1])
    (record,) = of(sharding_study.run(cfg), "measured")
    assert "failure" not in record and record["what"] == "8 x cpu" and record["milliseconds"] > 0
    assert "the true program on 8 x cpu" in (tmp_path / "w" / "report.md").read_text()


def test_context_lines_end_where_memory_does():
    cfg = experiment("w", model=size("palm-8b"), batches=(64,), contexts=(2048,))
    (cell,) = cells.cells_of(cfg)
    drawn = sharding_study_plot.context_lines(cell, "ws_2d", (2, 2, 2), "full")
    found = {name: (xs, ys) for name, xs, ys in drawn}
    work = plan.workload(cell.padded[0], BF16)
    assert set(found) == {"replicated", "by_batch:z", "by_batch:yz", "by_batch:xyz", "by_seq:xyz"}
    for name, (xs, ys) in found.items():
        last, over = (
            cost.predict(
                work,
                torus_layouts.parse(f"ws_2d/{name}"),
                (2, 2, 2),
                "v4",
                phase="decode",
                batch=64,
                tokens=1,
                context=length,
            )
            for length in (xs[-1], 2 * xs[-1])
        )
        assert last.memory_bytes <= last.chip.hbm_bytes < over.memory_bytes and last.step_seconds() == ys[-1]
