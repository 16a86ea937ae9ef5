"""The study on a tiny model: phases, resuming, changed configs, the report, the picture."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.study import phases as study_phases
from experiments.study import plot as study_plot
from experiments.study import report as study_report
from experiments.study import run as study
from kvattn import account, formats, model
from kvattn import config as c
from kvattn.data.tokenizer import ByteTokenizer
from kvattn.errors import UserError
from kvattn.evaluate import perplexity as evaluate
from kvattn.train import loop as train
from tests.helpers import tiny
from tests.helpers.paths import ROOT
from tests.helpers.tolerances import EXACT, close

MODEL = tiny.config(vocab_size=258, n_layers=2)
ROWS = (
    c.VariantConfig("base"),
    c.VariantConfig("mqa", (c.Conversion.of("gqa", k_heads=1),)),
    c.VariantConfig("rings", (c.Conversion.of("window", window=7, sinks=2),), c.CacheConfig(kinds=("ring",))),
)
COUNT = 7  # reference, three before, three after


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file whose tail is held out: words in no order, so that there is something to learn but not by heart."""
    rng = np.random.default_rng(3)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(rng.choice(words, 3000)) + "\n")
    return str(path)


@pytest.fixture
def checkpoint(monkeypatch):
    """A random tiny checkpoint behind formats.load; the list counts how often it was read."""
    reads = []
    params = model.init(jax.random.key(5), MODEL)

    def load(path, dtype="float32"):
        reads.append(path)
        return formats.Loaded(MODEL, params, ByteTokenizer(), source="a tiny checkpoint")

    monkeypatch.setattr(study_phases.formats, "load", load)
    return reads


def experiment(text, workdir, **changes):
    fields = {
        "name": "tiny_study",
        "workdir": str(workdir),
        "checkpoint": c.CheckpointConfig(path="tiny"),
        "data": c.DataConfig(source="text_files", paths=(text,), batch_size=4, seq_len=24),
        "optimizer": c.OptimizerConfig(learning_rate=1e-2),
        "train": c.TrainConfig(steps=3, checkpoint_every=1, log_every=1, distill=c.DistillConfig(1.0, 0.5, 0.1)),
        "eval": c.EvalConfig(context=40, stride=20, max_tokens=120),
        "study": c.StudyConfig(rows=ROWS, decode_tokens=5),
    }
    return c.Experiment(**fields | changes)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]


def test_a_study_from_start_to_end_and_again(text, tmp_path, checkpoint, capsys):
    cfg = experiment(text, tmp_path / "w")
    records = study.run(cfg)
    assert records == lines(tmp_path / "w") and len(records) == 1 + COUNT
    assert [r["phase"] for r in records[1:]] == ["reference"] + ["before"] * 3 + ["after"] * 3
    by = {(r["phase"], r.get("row")): r for r in records}
    # Every figure against the module that owns it.
    params = study_phases.formats.load("tiny").params
    ids = np.asarray(ByteTokenizer().encode(evaluate.evaluation_text(cfg)))[:120]
    own = evaluate.perplexity(params, MODEL, ids, context=40, stride=20, cache_cfg=c.CacheConfig())
    for key in (("reference", None), ("before", "base")):
        close(by[key]["nll"], own.nll_mean, EXACT)
        close(by[key]["stderr"], own.stderr, EXACT)
    assert by["before", "base"]["kl"] == 0.0 and by["before", "mqa"]["kl"] > 1e-4
    assert by["before", "base"]["exact"] and not by["before", "mqa"]["exact"]
    for row in ROWS:
        before, after = by["before", row.name], by["after", row.name]
        assert after["nll"] < before["nll"] - 0.1 and after["steps"] == 3 and after["train_tokens"] == 3 * 4 * 24
        assert before["tokens_per_second"] > 0 and before["text"] and before["cache_bytes"] > 0
        assert before["kv_bytes_per_token_at_context"] == after["kv_bytes_per_token_at_context"]
    size = account.kv_bytes_per_token(MODEL, c.CacheConfig())
    assert by["before", "base"]["kv_bytes_per_token_at_context"] == size
    assert by["before", "mqa"]["kv_bytes_per_token_at_context"] == size / 3
    assert by["before", "rings"]["kv_bytes_per_token_at_context"] == size * 9 / 40
    assert not list((tmp_path / "w").glob("rows/*/checkpoints"))  # finished rows keep no optimizer state
    out = capsys.readouterr().out
    assert out.count("before") >= 3 and "mqa" in out and "report.md" in out
    check_report(tmp_path / "w", by)
    # Nothing is left to do: no checkpoint is read, the files are made again.
    checkpoint.clear()
    (tmp_path / "w" / "pareto.png").unlink()
    assert study.run(cfg) == records and not checkpoint
    assert (tmp_path / "w" / "pareto.png").exists()


def check_report(workdir, by):
    report = (workdir / "report.md").read_text()
    table = [line for line in report.splitlines() if line.startswith("| ")][2:]
    cells = {row[0]: row for row in ([cell.strip() for cell in line.strip("|").split("|")] for line in table)}
    assert list(cells) == ["base", "mqa", "rings"]
    assert cells["mqa"][2] == "0.333" and cells["base"][5] == "-"
    ours, theirs = (np.load(workdir / "nll" / f"{name}.after-3.npy") for name in ("mqa", "base"))
    gap = (ours - theirs)[~np.isnan(ours)]
    assert cells["mqa"][5] == f"{gap.mean():+.3f} ± {gap.std(ddof=1) / len(gap) ** 0.5:.3f}"
    assert cells["rings"][3] == study_plot.number(by["before", "rings"]["ppl"])
    assert "3 of 3 rows finished" in report and "a tiny checkpoint" in report


def test_a_killed_study_goes_on(text, tmp_path, checkpoint, monkeypatch):
    """Stopped in the middle of a training and with a torn line, it ends with the figures of an undisturbed one."""
    cfg = experiment(text, tmp_path / "w", study=c.StudyConfig(rows=ROWS[:2], decode_tokens=5))
    whole = study.run(dataclasses.replace(cfg, workdir=str(tmp_path / "whole")))
    fit, steps = train.fit, []

    def dying(config, *, on_step, **kw):
        def step(number, record):
            steps.append((config.name, number))
            on_step(number, record)
            if steps == [("tiny_study/base", 1), ("tiny_study/base", 2)]:
                raise SystemExit(9)

        return fit(config, on_step=step, **kw)

    monkeypatch.setattr(study_phases.train, "fit", dying)
    with pytest.raises(SystemExit):
        study.run(cfg)
    assert [r["phase"] for r in lines(tmp_path / "w")[1:]] == ["reference", "before", "before"]
    with open(tmp_path / "w" / "results.jsonl", "a") as handle:
        handle.write('{"phase": "after", "row": "ba')
    resumed = study.run(cfg)
    assert steps.count(("tiny_study/base", 1)) == 1  # the training went on from its own checkpoint
    for a, b in zip(whole[1:], resumed[1:], strict=True):
        for key in ("phase", "row", "nll", "kl", "text", "train_loss"):
            assert a.get(key) == b.get(key), key


def test_rows_can_be_added_and_other_changes_are_named(text, tmp_path, checkpoint):
    base = experiment(text, tmp_path / "w", study=c.StudyConfig(rows=ROWS[:1], decode_tokens=5))
    quick = dataclasses.replace(base, train=dataclasses.replace(base.train, steps=0))
    assert len(study.run(quick)) == 3
    more = dataclasses.replace(quick, study=dataclasses.replace(base.study, rows=ROWS[:2]))
    assert [r["row"] for r in study.run(more)[2:]] == ["base", "mqa"]
    other = c.StudyConfig(rows=(c.VariantConfig("base", ROWS[1].convert),), decode_tokens=5)
    for changed, message in (
        (dataclasses.replace(more, seed=7), "config.seed=0 and this run has 7"),
        (dataclasses.replace(quick, study=other), r"config.study.rows\[base\].convert"),
    ):
        with pytest.raises(UserError, match=message):
            study.run(changed)
    assert len(lines(tmp_path / "w")) == 4
    (tmp_path / "w" / "results.jsonl").write_text("not json\n")
    with pytest.raises(UserError, match="not a study's results"):
        study.run(quick)


def test_the_report_names_the_command_that_made_it(monkeypatch):
    cfg = experiment("x", "w")
    monkeypatch.setattr(
        sys, "argv", [str(ROOT / "experiments/study/__main__.py"), "--config=a b.py", "--config.steps=2"]
    )
    assert study_report.command(cfg) == "python -m experiments.study '--config=a b.py' --config.steps=2"
    monkeypatch.setattr(sys, "argv", ["/usr/bin/pytest", "x"])
    assert study_report.command(cfg) == "experiments.study.run.run(cfg)  # workdir w"


def test_results_of_an_older_version_are_refused_with_what_to_do(text, tmp_path):
    """The shipped results were written before the journal had a format."""
    (tmp_path / "results.jsonl").write_bytes((ROOT / "experiments/results/study_smollm2/results.jsonl").read_bytes())
    before = (tmp_path / "results.jsonl").read_bytes()
    with pytest.raises(
        UserError, match="another version of kvattn .it has no format.*; use another config.workdir, or"
    ):
        study.run(experiment(text, tmp_path))
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_other_step_counts_extend_a_study(text, tmp_path, checkpoint, monkeypatch):
    """config.steps may change in one workdir: what was measured without training stays, training is per count."""
    base = experiment(text, tmp_path / "w", study=c.StudyConfig(rows=ROWS[:1], decode_tokens=5))
    one, two = (dataclasses.replace(base, train=dataclasses.replace(base.train, steps=n)) for n in (1, 2))
    first = study.run(one)
    second = study.run(two)
    assert second[:3] == first[:3] and [r["steps"] for r in (first[3], second[3])] == [1, 2]
    assert first[3]["nll"] != second[3]["nll"]
    monkeypatch.setattr(study_phases.train, "fit", None)
    assert study.run(one) == first and len(lines(tmp_path / "w")) == 5
    assert not list((tmp_path / "w" / "rows").glob("*/checkpoints"))


def test_rows_from_scratch_are_trained_on_equal_tokens(text, tmp_path):
    rows = (
        c.VariantConfig("mha", model=MODEL.replace(n_k_heads=6, n_v_heads=6)),
        c.VariantConfig("mqa", model=MODEL.replace(n_k_heads=1, n_v_heads=1)),
    )
    cfg = experiment(
        text,
        tmp_path / "w",
        checkpoint=c.CheckpointConfig(),
        study=c.StudyConfig(rows=rows, decode_tokens=5),
        data=c.DataConfig(source="text_files", paths=(text,), batch_size=4, seq_len=24, tokenizer="bytes"),
        train=c.TrainConfig(steps=2, log_every=1, checkpoint_every=1),
    )
    records = study.run(cfg)
    assert [(r["phase"], r["row"]) for r in records[1:]] == [("after", "mha"), ("after", "mqa")]
    assert {r["train_tokens"] for r in records[1:]} == {2 * 4 * 24}
    assert "kl" not in records[1]
    report = (tmp_path / "w" / "report.md").read_text()
    assert "trained from random weights" in report and "more than `mha`" in report


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"study": c.StudyConfig()}, "study.rows is"),
        ({"workdir": ""}, "workdir is empty"),
        ({"checkpoint": c.CheckpointConfig()}, "'base' has no model"),
        ({"study": c.StudyConfig(rows=(c.VariantConfig("x", model=MODEL),))}, "its own model beside"),
    ],
)
def test_bad_studies_are_named(text, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        study.run(dataclasses.replace(experiment(text, tmp_path), **changes))


def test_paired_errors_are_of_the_difference():
    rng = np.random.default_rng(0)
    a = np.concatenate([[np.nan], rng.normal(3, 2, 999)])
    b = a + np.concatenate([[0.0], rng.normal(0.5, 0.1, 999)])
    mean, stderr = study_report.paired(b, a)
    assert abs(mean - 0.5) < 0.02 and 0.002 < stderr < 0.005 < study_report.summary(a)["stderr"]
    assert study_report.paired(a, None) is None


def test_labels_cover_neither_marks_nor_each_other(tmp_path, monkeypatch):
    """Seven rows as the study makes them, two pairs of equal size: the drawn boxes are pairwise apart."""
    sizes = {
        "base": (46080, 3.2, 2.9),
        "mqa": (15360, 7.6, 4.7),
        "cla2": (23040, 6.9, 4.4),
        "cla3": (15360, 7.5, 4.75),
        "mlkv": (5120, 10.4, 5.9),
        "mqa_cla2": (7680, 9.3, 5.6),
        "window_sinks": (23280, 3.22, 2.95),
    }
    rows = []
    for name, (size, before, after) in sizes.items():
        phases = {
            p: {"nll": y, "stderr": 0.05, "kv_bytes_per_token_at_context": size}
            for p, y in (("before", before), ("after", after))
        }
        rows.append({"name": name, **phases, "last": phases["after"]})
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: figures.append(self))
    study_plot.draw(experiment("", tmp_path), rows, {"nll": 3.2}, tmp_path / "x.png")
    axes, renderer = figures[0].axes[0], figures[0].canvas.get_renderer()
    labels = [text for text in axes.texts if "\n" in text.get_text()]
    assert [text.get_text().split("\n")[0] for text in labels] == list(sizes)
    boxes = [text.get_window_extent(renderer) for text in labels]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])
        for row, x in zip(rows, study_plot._dodge([r["last"]["kv_bytes_per_token_at_context"] for r in rows])):
            for phase in ("before", "after"):
                assert not box.contains(*axes.transData.transform((x, row[phase]["nll"])))
