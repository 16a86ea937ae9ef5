"""The kernel benchmark and the full-size decode benchmark, as far as a CPU goes: what they measure, count, keep, refuse
and print. No figure here is a result."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import sizes
from experiments.bench import comparison, kernel_rows
from experiments.bench import decode_shapes as decode_bench
from experiments.bench import kernel_candidates as kernel_bench_candidates
from experiments.bench import kernel_plot as kernel_bench_plot
from experiments.bench import kernel_report as report
from experiments.bench import kernels as kernel_bench
from experiments.bench.kernel_candidates import Candidate
from experiments.bench.kernel_shapes import MOST_BYTES, STORES, SWEEPS, Shape, cache_bytes, inputs, latent, sweep
from experiments.bench.kernels import Torch
from experiments.common.child import ChildError
from experiments.common.paths import RESULTS
from kvattn import cache, model, spec
from kvattn.errors import UserError
from pallas_kernels import KernelError, codes, reference
from pallas_kernels.gpu import aot
from tests.helpers import tiny
from tests.helpers.paths import ROOT
from tests.helpers.tolerances import CLOSED_FORM, EXACT, KERNEL_BF16, KERNEL_STATS, close

SMALL = Shape(2, 48, k_heads=2, heads=6, head_dim=16, v_dim=8)
NO_TORCH = Torch(None, "left out of this test")


def start(name, *args):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    line = [sys.executable, "-m", f"experiments.{name}", *map(str, args)]
    return subprocess.Popen(line, env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process):
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


# --- the command ------------------------------------------------------------------------------------------------


def test_a_quick_sweep_and_what_it_leaves(tmp_path):
    """Rows, JSON and plots on a CPU; the same command goes on with the rows that are missing and keeps the others."""
    file = tmp_path / "out.json"
    code, out, err = finish(start("bench_kernels", "--only=S128 bfloat16", "--rounds=2", f"--output={file}"))
    assert (code, err) == (0, "")
    first = json.loads(file.read_text())
    wanted = [shape for shape in sweep("quick") if "S128 bfloat16" in shape.name]
    assert list(first["rows"]) == [shape.name for shape in wanted] and len(wanted) == 5
    assert "not a result: no accelerator" in out and f"5 rows measured, 0 kept from before; written to {file}" in out
    assert first["accelerator"] is False and first["platform"] == "cpu"
    assert first["versions"]["jax"] == jax.__version__ and "experiments.bench_kernels --only=" in first["command"]
    assert first["missing"] == {"torch": "not asked on a cpu"}
    for shape in wanted:
        row = first["rows"][shape.name]
        xla = row["kernels"]["xla"]
        assert Shape(**row["shape"]) == shape and row["ours"] is None and row["speed_over"] == {}
        assert row["cache_bytes"] == shape.token_bytes * shape.lengths.sum() and row["calls"] % kernel_bench.UNROLL == 0
        assert xla["min"] <= xla["seconds"] <= xla["max"] and len(xla["all"]) == 2
        assert 0 < xla["relative_error"] < kernel_bench.WRONG
        close(xla["fraction"], row["cache_bytes"] / xla["seconds"] / first["copy"]["bytes_per_second"], CLOSED_FORM)
        assert row["kernels"]["mosaic_gpu"]["refused"] == "a kernel for gpu, and this is a cpu"
        assert f"\n{shape.name}   " in out
    for name in ("fraction", "speed"):
        assert (tmp_path / f"out_{name}.png").read_bytes()[:4] == b"\x89PNG"

    code, out, err = finish(start("bench_kernels", "--only=B2 S128", "--rounds=1", f"--output={file}"))
    assert (code, err) == (0, "")
    second = json.loads(file.read_text())
    assert "4 rows measured, 5 kept from before" in out
    assert list(second["rows"]) == [*first["rows"], *(s.name for s in sweep("quick") if s not in wanted)]
    assert {name: second["rows"][name] for name in first["rows"]} == first["rows"]


def test_bad_flags_are_one_sentence_and_exit_code_2():
    default = RESULTS / "bench_kernels.json"
    existed = default.exists()
    calls = {
        ("bench_kernels", "--sweep=quik"): "--sweep is 'quik'; choose one of bars, default, full, quick.",
        ("bench_kernels", "--sweeps=quick"): "--sweeps is no flag of this command (nearest valid: sweep)",
        ("bench_kernels", "--sweep=bars"): "--sweep=bars needs a GPU or TPU and this is a cpu; use --sweep=quick",
        ("bench_kernels", f"--output={default}"): "which holds figures of accelerators, and this is a cpu",
        ("bench_decode", "--shapes=llama9"): "size is 'llama9'; choose one of",
    }
    running = {args: start(*args) for args in calls}
    for args, process in running.items():
        code, out, err = finish(process)
        assert code == 2 and out == "", args
        assert calls[args] in err and err.startswith("error: ") and err.count("\n") == 1, err
    assert default.exists() == existed


def test_what_the_libraries_refuse():
    with pytest.raises(UserError, match="README.md is no record of bench_kernels"):
        report.read(ROOT / "README.md")
    with pytest.raises(UserError, match="--candidates has 'xla/f8'; write KERNEL/STORE"):
        decode_bench.run({}, default="x.json", candidates=["xla/f8"])
    with pytest.raises(UserError, match="--new=64 --context=8 .*give fewer new tokens than the context has"):
        decode_bench.run({}, default="x.json", context=8)
    with pytest.raises(UserError, match="--rounds is 0"):
        kernel_bench.run("quick", default="x.json", rounds=0, torch=NO_TORCH)


def test_rows_of_other_versions_and_failed_rows_are_measured_again(tmp_path, capsys, monkeypatch):
    file = tmp_path / "out.json"
    about = NO_TORCH.about()
    rows = kernel_rows.Rows(file, about)
    good, bad = {"kernels": {"xla": {"seconds": 1.0}}}, {"kernels": {"xla": {"error": "wrong"}}}
    monkeypatch.setattr(report, "bars", lambda record: [])
    rows.add("a", good)
    rows.add("b", bad)
    assert list(json.loads(file.read_text())["rows"]) == ["a", "b"]
    assert list(kernel_rows.Rows(file, about).record["rows"]) == ["a"]
    assert "1 of 2 rows" in capsys.readouterr().out
    with monkeypatch.context() as other:
        other.setattr(kernel_rows, "versions", lambda: {"pallas_kernels": "x"})
        changed = kernel_rows.Rows(file, about)
        assert changed.record["rows"] == {}
        changed.add("a", good | {"calls": 2})
    assert kernel_rows.Rows(file, about).record["rows"] == {}  # the last measurement of each name counts
    with monkeypatch.context() as other:
        here = kernel_rows.machine.accelerator()
        other.setattr(kernel_rows.machine, "accelerator", lambda: here | {"device_kind": "TPU v5 lite"})
        assert kernel_rows.Rows(file, about).record["rows"] == {}


def test_files_that_are_no_record_or_an_older_one_are_refused(tmp_path):
    file, about = tmp_path / "out.json", NO_TORCH.about()
    file.write_text(json.dumps({"benchmark": "bench_kernels", "rows": {"a": {}}}))
    before = file.read_bytes()
    with pytest.raises(UserError, match="another version .*no out.jsonl beside it.*; use another --output"):
        kernel_rows.Rows(file, about)
    assert file.read_bytes() == before and not (tmp_path / "out.jsonl").exists()
    file.write_text("{")
    with pytest.raises(UserError, match="no record of bench_kernels"):
        kernel_rows.Rows(file, about)


# --- a row ------------------------------------------------------------------------------------------------------


def test_what_is_wrong_or_fails_is_an_error_and_no_figure(monkeypatch):
    """Planted candidates: the last key left out, NaN, one that raises, one that refuses, one that fails half way."""
    right = kernel_bench_candidates.xla

    def planted(shape, q, kv, options):
        def short(q, kv, positions):
            return right(q, dataclasses.replace(kv, length=kv.length - 9), positions, options)

        def refuses(q, kv, positions):
            raise KernelError("not here")

        return {
            "xla": Candidate(lambda q, kv, positions: right(q, kv, positions, options)),
            "short": Candidate(short),
            "nan": Candidate(lambda q, kv, positions: right(q, kv, positions, options) * jnp.nan),
            "raises": Candidate(lambda q, kv, positions: q.nothing),
            "refuses": Candidate(refuses),
        }

    monkeypatch.setattr(kernel_bench, "candidates", planted)
    row = kernel_bench.measure_row(SMALL, 1e10, 2, NO_TORCH)
    kernels = row["kernels"]
    assert "error" not in kernels["xla"] and len(kernels["xla"]["all"]) == 2
    for name, words in (("short", "wrong: "), ("nan", "wrong: "), ("raises", "AttributeError")):
        assert words in kernels[name]["error"] and "seconds" not in kernels[name], name
    assert kernels["refuses"] == {"refused": "not here"}
    assert kernels["torch"] == {"refused": "left out of this test"}
    text = report.lines(SMALL.name, row, 0)
    assert re.search(r"short +error: wrong", text) and re.search(r"xla +[\d.]+ us", text)


def test_candidates_take_turns_and_one_that_dies_is_left_out():
    said, entries = [], {"a": {}, "b": {}, "c": {}}

    def turn(name):
        said.append(name)
        if name == "b" and said.count("b") == 2:
            raise RuntimeError("gone")
        return float(len(said))

    times = kernel_bench.alternate({name: lambda name=name: turn(name) for name in entries}, 3, entries)
    assert said == ["a", "b", "c", "c", "b", "a", "a", "c"]
    assert times == {"a": [1.0, 6.0, 7.0], "c": [3.0, 4.0, 8.0]} and entries["b"]["error"] == "RuntimeError: gone"


def test_no_call_of_a_loop_is_hoisted_or_merged():
    """Every call has its two matmuls in the compiled program, on a CPU and (where its compiler is) for an H200."""
    q, kv, positions, options = inputs(Shape(3, 128, k_heads=2, heads=16, head_dim=64, v_dim=64, store="int8"))
    call = kernel_bench_candidates.candidates(SMALL, q, kv, options)["xla"].call
    loop = kernel_bench.chained(call, 8 * kernel_bench.UNROLL)
    text = jax.jit(loop).lower(q, kv, positions).compile().as_text()
    assert len(re.findall(r" dot\(", text)) == 2 * kernel_bench.UNROLL
    assert '"known_trip_count":{"n":"8"}' in text
    try:
        chip = aot.h200()
    except KernelError:
        assert jax.__version__.startswith("0.10")
        return
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip), (q, kv, positions))
    text = jax.jit(loop, out_shardings=chip).lower(*abstract).compile().as_text()
    body = re.search(r"while\(.*body=%?([\w.-]+)", text)[1]
    inside = re.search(rf"^%?{re.escape(body)} .*?^}}", text, re.MULTILINE | re.DOTALL)[0]
    assert len(re.findall(r"gemm_fusion\S* = ", inside)) == 2 * kernel_bench.UNROLL
    assert not re.search(r"s8\[[\d,]+\]\S* copy\(", text)


def test_inputs_of_the_next_call_are_equal_bit_by_bit(rng):
    q, kv, positions, _ = inputs(SMALL)
    out = jnp.asarray(rng.normal(size=(2, 1, 6, 8)), jnp.float32)
    for a, b in zip(
        jax.tree.leaves(kernel_bench.after(out, q, kv, positions)), jax.tree.leaves((q, kv, positions)), strict=True
    ):
        close(a, b, EXACT)
        assert a.dtype == b.dtype


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"store": "int4", "page": 16, "ragged": True},
        {"store": "float8_e4m3fn"},
        {"store": "int8", "ragged": True},
        {"k_heads": 1, "head_dim": 24, "view": True, "page": 16},
    ],
    ids=str,
)
def test_the_float32_result_is_that_of_the_loops(change):
    """truth() and the xla candidate against reference.py, over every form of a cache."""
    shape = dataclasses.replace(SMALL, **change)
    q, kv, positions, options = inputs(shape)
    want = reference.decode_attention(q, kv, positions, options).out
    close(kernel_bench_candidates.truth(q, kv, positions, options), want, KERNEL_STATS)
    close(kernel_bench_candidates.xla(q, kv, positions, options), want, KERNEL_BF16)


def test_bytes_are_those_of_the_arrays():
    for shape in (*sweep("quick"), dataclasses.replace(SMALL, ragged=True, store="int8")):
        _, kv, positions, _ = inputs(shape)
        assert np.asarray(positions)[:, 0].tolist() == [n - 1 for n in shape.lengths.tolist()]
        arrays = [x for leaf in (kv.k, kv.v) if leaf is not None for x in (leaf.values, leaf.scale) if x is not None]
        held = sum(x.size // 2 if x.dtype == jnp.int4 else x.nbytes for x in arrays)
        assert cache_bytes(kv) == shape.token_bytes * shape.lengths.sum()
        if not shape.ragged and not shape.page:
            assert cache_bytes(kv) == held
        if shape.page:
            table = np.asarray(kv.table)
            assert sorted(table.ravel()) == list(range(1, 1 + table.size)) and kv.slots >= shape.context
        if shape.store in codes.LIMITS:
            largest = np.abs(np.asarray(kv.k.values).astype(np.float32)).max()
            assert 0.9 * codes.LIMITS[shape.store] <= largest <= codes.LIMITS[shape.store]
            assert kv.v is None or kv.v.lanes
    assert Shape(32, 8192).token_bytes * 32 * 8192 == 2 * 2 * 32 * 4 * 8192 * 128
    assert Shape(1, 1, k_heads=1, store="int4").token_bytes == 2 * (64 + 4)
    assert latent(16, 1, 1).token_bytes == 1152


def test_sweeps_have_what_they_promise():
    with pytest.raises(UserError, match="--sweep is 'all'; choose one of bars, default, full, quick"):
        sweep("all")
    for name in SWEEPS:
        shapes = sweep(name)
        assert len({shape.name for shape in shapes}) == len(shapes)
        assert all(shape.batch * shape.context * shape.token_bytes <= MOST_BYTES for shape in shapes)
    bars, usual, full = map(sweep, ("bars", "default", "full"))
    large = [s for s in bars if s.store == "bfloat16" and s.batch * s.context * s.token_bytes >= report.LARGE]
    assert {"GQA-8", "MQA", "latent-16", "latent-64"} <= {shape.kind for shape in large}
    assert {s.store for s in bars} == set(STORES) and any(s.batch == 1 and s.context == 131072 for s in bars)
    assert {s.heads // s.k_heads for s in usual if not s.view} == {1, 4, 8, 16, 32} and len(usual) <= 40
    assert {s.batch for s in usual} >= {1, 64} and {s.context for s in usual} >= {1024, 131072}
    assert {s.page for s in usual} == {0, 64, 128} and any(s.ragged for s in usual)
    kinds = ("MHA", "GQA-4", "GQA-8", "GQA-16", "MQA")
    assert {(s.kind, s.store) for s in full} >= {(kind, store) for kind in kinds for store in STORES}


# --- what a record says -----------------------------------------------------------------------------------------


def row(shape, fraction, peers=(), **kernels):
    """A row in which our kernel reached `fraction` of a copy of 4e12 bytes/s; peers: name -> seconds over ours."""
    size, limit = shape.token_bytes * int(shape.lengths.sum()), 4e12
    seconds = size / limit / fraction
    entries = {
        name: kernel_bench.figures([s], size, shape.batch, limit) | {"relative_error": 1e-3}
        for name, s in {"mosaic_gpu": seconds, **{p: seconds * x for p, x in dict(peers).items()}}.items()
    }
    entries |= kernels
    return {
        "shape": dataclasses.asdict(shape),
        "cache_bytes": size,
        "calls": 8,
        "kernels": entries,
        **report.against(entries, ["mosaic_tpu", "mosaic_gpu"]),
    }


@pytest.fixture
def record():
    """An H200's, made up."""
    base, mqa, long = Shape(32, 8192), Shape(64, 16384, k_heads=1), Shape(1, 131072)
    peers = {"xla": 5.0, "cudnn": 1.5, "cudnn_grouped": 1.2, "torch_sdpa": 3.0, "torch_flex": 0.9}
    rows = {
        base: row(base, 0.93, peers),
        mqa: row(mqa, 0.89, {"cudnn": 1.0}),
        long: row(long, 0.8),
        dataclasses.replace(base, store="int8"): row(dataclasses.replace(base, store="int8"), 0.85),
        dataclasses.replace(base, store="int4"): row(dataclasses.replace(base, store="int4"), 0.6),
        dataclasses.replace(mqa, store="int4"): row(
            dataclasses.replace(mqa, store="int4"), 0.9, mosaic_gpu={"error": "wrong"}
        ),
        latent(16, 64, 8192): row(latent(16, 64, 8192), 0.86),
        latent(128, 64, 8192): row(latent(128, 64, 8192), 0.5),
        dataclasses.replace(base, page=64): row(dataclasses.replace(base, page=64), 0.5),
        Shape(1, 1024): row(Shape(1, 1024), 0.1, {"cudnn": 0.5}),
    }
    return {
        "benchmark": "bench_kernels",
        "date": "2026-11-21 10:00:00",
        "device_kind": "NVIDIA H200",
        "accelerator": True,
        "l2_bytes": 60 << 20,
        "rows": {shape.name: r for shape, r in rows.items()},
    }


def test_every_bar_is_read_off_its_rows(record):
    base, mqa, long = Shape(32, 8192).name, Shape(64, 16384, k_heads=1).name, Shape(1, 131072).name
    int8, int4 = (base.replace("bfloat16", store) for store in ("int8", "int4"))
    found = {
        (bar["bar"], bar["row"]): (None if bar["figure"] is None else round(bar["figure"], 3), bar["met"])
        for bar in report.bars(record)
    }
    assert found == {
        ("fraction of the copy", base): (0.93, True),
        ("fraction of the copy", mqa): (0.89, False),
        ("speed over cudnn_grouped", base): (1.2, True),
        ("speed over torch_flex", base): (0.9, False),
        ("speed over cudnn", mqa): (1.0, True),
        ("speed over torch", mqa): (None, None),
        ("batch 1: time over the limit", long): (1.25, True),
        ("speed over cudnn", long): (None, None),
        ("speed over torch", long): (None, None),
        ("int8: tokens/s over bf16", int8): (round(512 / 264 * 0.85 / 0.93, 3), True),
        ("int4: tokens/s over bf16", int4): (round(512 / 136 * 0.6 / 0.93, 3), False),
        ("int4: tokens/s over bf16", mqa.replace("bfloat16", "int4")): (None, None),
        ("latent: fraction of the copy", latent(16, 64, 8192).name): (0.86, True),
    }
    text = report.bars_table(record).splitlines()
    assert re.search(r"fraction of the copy +0\.930 +>=0\.9 +met +GQA-8 ", text[1])
    assert re.search(r"batch 1: time over the limit +1\.250 +<=1\.3 +met", "\n".join(text))
    assert text[-1] == "6 met, 3 not met, 4 not measured"
    assert report.bars_table(record | {"rows": {}}) == "no row that a bar speaks of"


def test_lines_of_a_row_say_who_was_faster_and_what_fits_the_l2(record):
    base = record["rows"][Shape(32, 8192).name]
    text = report.lines("x", base, record["l2_bytes"])
    assert re.search(r"mosaic_gpu .* 3720 GB/s +93\.0% of copy", text) and "ours is 1.50x as fast" in text
    assert "536.9 MB" in text and "L2" not in text
    assert "under twice the L2" in report.lines("x", record["rows"][Shape(1, 1024).name], record["l2_bytes"])


def test_plots_show_every_row(record, tmp_path):
    files = kernel_bench_plot.draw(record, tmp_path / "bench.json")
    assert [file.name for file in files] == ["bench_fraction.png", "bench_speed.png"]
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in files)
    axes = kernel_bench_plot.fraction(record).axes[0]
    marks = [line for line in axes.lines if line.get_marker() not in ("None", None) and len(line.get_xdata())]
    timed = [r for r in record["rows"].values() if r["ours"]]
    assert sorted(line.get_xdata()[0] for line in marks) == sorted(r["cache_bytes"] for r in timed) and len(timed) == 9
    assert sum(line.get_markerfacecolor() == "white" for line in marks) == 1
    labels = axes.get_legend_handles_labels()[1]
    assert labels == ["bfloat16", "int8", "int4", "contiguous", "latent", "paged", "under twice the L2"]
    axes = kernel_bench_plot.speed(record).axes[0]
    assert axes.get_legend_handles_labels()[1] == ["xla", "cudnn", "cudnn_grouped", "torch_sdpa", "torch_flex"]
    cudnn = next(line for line in axes.lines if line.get_label() == "cudnn")
    assert sorted(cudnn.get_ydata()) == pytest.approx([0.5, 1.0, 1.5])
    empty = record | {"rows": {}, "accelerator": False}
    assert "no accelerator" in kernel_bench_plot.fraction(empty).axes[0].get_title(loc="left")
    assert kernel_bench_plot.speed(empty).axes[0].texts


# --- torch's worker ---------------------------------------------------------------------------------------------


class Dying:
    """A worker that answers `about` and ends at the next question."""

    def ask(self, op, **request):
        if op == "about":
            return {"versions": {"torch": "2"}, "missing": {}}
        raise ChildError("ended with code 1 during " + op)


def test_torch_may_be_absent_or_die():
    assert NO_TORCH.about() == {"versions": {}, "missing": {"torch": "left out of this test"}}
    torch = Torch(Dying())
    assert torch.about()["versions"] == {"torch": "2"}
    assert torch.prepare(SMALL, 4) == {"torch": {"error": "torch's worker ended: ended with code 1 during prepare"}}
    assert torch.child is not None  # asked anew for the next row
    torch = Torch(comparison.worker("torch_attention_worker", "no/such/interpreter"))
    assert "no/such/interpreter" in torch.about()["missing"]["torch"] and torch.child is None
    assert "no/such/interpreter" in torch.prepare(SMALL, 4)["torch"]["refused"]


def test_the_real_worker_says_what_it_lacks():
    """In this interpreter: torch is not installed, or sees no GPU."""
    torch = Torch(comparison.worker("torch_attention_worker"))
    missing = torch.about()["missing"]
    torch.close()
    assert missing["torch"] in ("not installed", "installed, but it sees no GPU") and torch.child is None
    assert missing["flash_mla"] == "not installed"


@pytest.mark.peers
@pytest.mark.parametrize(
    "shape",
    [
        Shape(2, 128, k_heads=2, heads=8, head_dim=32, v_dim=32),
        Shape(3, 128, k_heads=4, heads=4, head_dim=32, v_dim=32, ragged=True),
    ],
    ids=str,
)
def test_torchs_candidates_equal_float32(shape, monkeypatch):
    """The worker's inputs and candidates on a CPU, where nothing can be timed."""
    from experiments.bench.peers import torch_attention_worker as worker

    torch = pytest.importorskip("torch")
    monkeypatch.setattr(worker, "DEVICE", "cpu")
    monkeypatch.setattr(worker, "timer_of", lambda call, calls: (lambda: 1.0, ""))
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setitem(worker.CANDIDATES, "torch_flex", lambda s: "left out")
    monkeypatch.setitem(worker.CANDIDATES, "off", lambda s: lambda: worker.truth(s) * 1.1)
    request = dataclasses.asdict(shape) | {"lengths": shape.lengths.tolist(), "scale": shape.scale}
    entries = worker.prepare(request, 4, kernel_bench.WRONG)
    assert 0 < entries["torch_sdpa"]["relative_error"] < kernel_bench.WRONG and "error" not in entries["torch_sdpa"]
    assert ("refused" in entries["torch_sdpa_grouped"]) == (shape.k_heads == shape.heads)
    assert "wrong" in entries["off"]["error"] and "off" not in worker.HELD["turns"]
    assert entries["flashinfer"] == {"refused": "not installed"}
    assert worker.turn("torch_sdpa") == {"seconds": 1.0}


# --- decoding at full size --------------------------------------------------------------------------------------


def test_shapes_are_decoded_with_every_store(tmp_path, capsys):
    cfg = tiny.config(n_layers=2, n_heads=4, n_k_heads=2, n_v_heads=2, head_dim=64, v_head_dim=64)
    file, names = tmp_path / "d.json", ["xla/bfloat16", "xla/int8", "xla/bfloat16/paged", "mosaic_gpu/bfloat16"]
    decode_bench.run(
        {"small": cfg},
        default="x.json",
        output=str(file),
        candidates=names,
        batch=3,
        context=130,
        steps=4,
        rounds=2,
        layers=1,
    )
    record = json.loads(file.read_text())
    found = record["results"]["small"]
    assert found["setting"] == {"batch": 3, "context": 130, "steps": 4, "rounds": 2, "layers": 1}
    cfg = dataclasses.replace(cfg, n_layers=1)
    unread = 0 if cfg.tied_embeddings else (cfg.vocab_size - 3) * cfg.d_model
    weights = 2 * (spec.count(model.param_specs(cfg)) - unread)
    for name in names[:3]:
        entry = found["candidates"][name]
        token = 2 * 2 * (64 + 4) if "int8" in name else 2 * 2 * 64 * 2
        assert entry["kv_bytes"] == 3 * 128 * token and entry["weight_bytes"] == weights, name
        limit = (weights + entry["kv_bytes"]) / record["copy"]["bytes_per_second"]
        close(entry["of_roofline"], limit / entry["step_seconds"], CLOSED_FORM)
        close(entry["tokens_per_second"], 3 / entry["step_seconds"], CLOSED_FORM)
    refused = found["candidates"]["mosaic_gpu/bfloat16"]["refused"]
    assert "cpu" in refused or "Mosaic GPU" in refused
    out = capsys.readouterr().out
    assert "not a result: no accelerator" in out and "at least 80% of the roofline: not measured" in out


@pytest.mark.parametrize("name", ["xla/bfloat16", "xla/int4", "xla/float8_e4m3fn/paged"])
def test_caches_are_filled_and_grow_by_the_tokens_drawn(name):
    cfg = tiny.config(n_layers=1)
    trial = decode_bench.trial_of(cfg, name, batch=3, context=64, steps=5)
    held = decode_bench.filled_caches(trial)
    abstract = decode_bench.abstract_caches(trial)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), held) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    _, positions = cache.read(held[0])
    assert np.asarray(positions >= 0).sum((1, 2)).tolist() == [59] * 3
    params = model.init(jax.random.key(0), cfg, jnp.bfloat16)
    seconds, tokens = decode_bench.turn(trial, decode_bench.compiled(trial, params), params)
    tokens = np.asarray(tokens)
    assert seconds > 0 and tokens.shape == (3, 6) and (tokens[:, 0] == -1).all()
    assert ((tokens[:, 1:] >= 0) & (tokens[:, 1:] < cfg.vocab_size)).all()


def test_the_bar_of_the_8b_shape():
    def said(fraction, **setting):
        entry = {"of_roofline": fraction, "tokens_per_second": 1.0}
        setting = {"batch": 32, "context": 8192, "layers": 32} | setting
        found = {"setting": setting, "candidates": {"mosaic_gpu/bfloat16": entry, "xla/bfloat16": {"of_roofline": 0.9}}}
        return decode_bench.bar({"results": {"llama3-8b": found}}).split(": ")[-1]

    assert said(0.81) == "mosaic_gpu/bfloat16 81.0%, met"
    assert said(0.79) == "mosaic_gpu/bfloat16 79.0%, NOT MET"
    assert said(0.81, layers=1) == said(0.81, batch=8) == "not measured"
    with pytest.raises(UserError, match="size is 'x'"):
        sizes.named("x")
    assert sizes.named("smollm2_1_7b")[0] == "smollm2-1.7b" and sizes.named("llama3-8b")[1] == sizes.SIZES["llama3-8b"]
