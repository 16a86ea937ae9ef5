"""The study: phases, resumption after a stop anywhere, refusal of another study's workdir, report and picture."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from kvattn import config, decode, evaluate, study, study_report, train
from kvattn.config import (
    CacheConfig,
    CheckpointConfig,
    ConvertConfig,
    DataConfig,
    DistillConfig,
    EvalConfig,
    Experiment,
    MaskConfig,
    StudyConfig,
    TrainConfig,
    VariantConfig,
)  # fmt: skip
from kvattn.errors import UserError
from tests import tiny

VOCAB = 259


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 5)) for _ in range(40)]
    for i in range(4):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(words, 300)))
    return str(folder / "*.txt")


def _common(corpus, workdir, **fields):
    base = Experiment(
        name="tiny",
        workdir=str(workdir),
        data=DataConfig(source="text_files", paths=(corpus,), tokenizer="bytes", batch_size=2, seq_len=16),
        train=TrainConfig(steps=2, log_every=1, checkpoint_every=1),
        eval=EvalConfig(context=24, stride=12, max_tokens=61),
        study=StudyConfig(prompt_tokens=7, decode_tokens=5),
    )
    return dataclasses.replace(base, **fields)


@pytest.fixture(scope="module")
def checkpoint(corpus, tmp_path_factory):
    """A tiny trained model as a kvattn checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoint")
    cfg = _common(corpus, folder, model=tiny.config(vocab_size=VOCAB, n_layers=2), study=StudyConfig())
    train.fit(cfg, workdir=str(folder), verbose=False)
    return str(folder)


@pytest.fixture
def converted(corpus, checkpoint, tmp_path):
    """A study of three rows of that checkpoint, distilled."""
    rows = (
        VariantConfig("base"),
        VariantConfig("mqa", (ConvertConfig(kind="gqa", k_heads=1),)),
        VariantConfig("ring", (ConvertConfig(kind="window", window=6, sinks=2),), CacheConfig(("ring",), "bfloat16")),
    )
    cfg = _common(corpus, tmp_path / "work", checkpoint=CheckpointConfig(path=checkpoint))
    distill = DistillConfig(0.5, 1.0, 1.0)
    return dataclasses.replace(
        cfg, study=dataclasses.replace(cfg.study, rows=rows), train=dataclasses.replace(cfg.train, distill=distill)
    )


def _lines(cfg):
    return [json.loads(x) for x in (pathlib.Path(cfg.workdir) / "results.jsonl").read_text().splitlines()]


def _plain(lines):
    """Lines without their times."""
    return [{k: v for k, v in x.items() if "second" not in k} for x in lines]


def test_a_study_end_to_end(converted, capsys):
    records = study.run(converted)
    lines = _lines(converted)
    assert [(x["row"], x["phase"]) for x in lines] == [
        ("base", "before"), ("mqa", "before"), ("ring", "before"),
        ("base", "after"), ("base", "decode"), ("mqa", "after"), ("mqa", "decode"),
        ("ring", "after"), ("ring", "decode"),
    ]  # fmt: skip
    base, mqa, ring = records
    # bytes per token: 2 layers x 3 heads x (10 + 14) x 4 bytes, a third of it, and half of it in bf16
    assert [r["before"]["bytes_per_token"] for r in records] == [576, 192, 288]
    assert ring["decode"]["cache_bytes"] == 2 * 3 * 24 * 2 * 8  # 6 + 2 slots
    assert base["before"]["kl"] == 0 and base["before"]["gap"] == 0
    assert mqa["before"]["kl"] > 1e-4 and mqa["before"]["gap_stderr"] > 0
    assert base["before"]["tokens"] == 60 and len(mqa["after"]["train_loss"]) == 2
    report = (pathlib.Path(converted.workdir) / "report.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in report for name in ("base", "mqa", "ring")) and "pareto.png" in report
    assert (pathlib.Path(converted.workdir) / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert "[2/3] mqa before: perplexity" in printed and "576" in printed


def test_quality_is_the_evaluators_own(converted):
    """The number in the line is evaluate.perplexity of the same model, text and cache."""
    one = dataclasses.replace(
        converted,
        study=dataclasses.replace(converted.study, rows=converted.study.rows[:1]),
        train=dataclasses.replace(converted.train, steps=0),
    )
    record = study.run(one)[0]
    assert record["after"] is None and record["decode"]["decode_tokens_per_second"] > 0
    want = evaluate.run_checkpoint(one)
    np.testing.assert_allclose(record["before"]["nll"], want["nll_mean"], rtol=1e-6)
    np.testing.assert_allclose(record["before"]["stderr"], want["stderr"], rtol=1e-6)


@pytest.mark.parametrize("stop_in", ["evaluate", "train", "decode"])
def test_a_stopped_study_resumes_where_it_was(converted, monkeypatch, tmp_path, stop_in):
    """Killed in the middle of a row, the rerun repeats no finished phase and ends with the same lines."""
    study.run(dataclasses.replace(converted, workdir=str(tmp_path / "whole")))
    want = _plain(_lines(dataclasses.replace(converted, workdir=str(tmp_path / "whole"))))
    calls = {"n": 0}

    class Killed(BaseException):
        pass

    def dies(real, at):
        def wrapped(*args, **kw):
            calls["n"] += 1
            if calls["n"] == at:
                raise Killed
            return real(*args, **kw)

        return wrapped

    with monkeypatch.context() as patch:
        if stop_in == "evaluate":
            patch.setattr(evaluate, "token_nll", dies(evaluate.token_nll, 5))
        elif stop_in == "train":
            patch.setattr(train, "fit", dies(train.fit, 2))
        else:
            patch.setattr(decode, "generate", dies(decode.generate, 2))
        with pytest.raises(Killed):
            study.run(converted)
    finished = len(_lines(converted))
    assert 3 <= finished < 9
    study.run(converted)
    assert _plain(_lines(converted)) == want


def test_rerun_does_nothing_and_more_rows_extend(converted, monkeypatch):
    two = dataclasses.replace(converted, study=dataclasses.replace(converted.study, rows=converted.study.rows[:2]))
    study.run(two)
    before = _lines(two)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "token_nll", None)
        patch.setattr(train, "fit", None)
        study.run(two)
    assert _lines(two) == before
    study.run(converted)
    assert _lines(converted)[: len(before)] == before
    assert {x["row"] for x in _lines(converted)} == {"base", "mqa", "ring"}


@pytest.mark.parametrize("change,field", [
    (lambda c: dataclasses.replace(c, eval=dataclasses.replace(c.eval, stride=6)), "config.eval.stride"),
    (lambda c: dataclasses.replace(c, data=dataclasses.replace(c.data, seq_len=8)), "config.data.seq_len"),
    (lambda c: dataclasses.replace(c, study=dataclasses.replace(c.study, rows=(
        VariantConfig("base", (ConvertConfig(kind="gqa", k_heads=1),)),))), "row named 'base'"),
])  # fmt: skip
def test_another_studys_workdir_is_refused(converted, change, field):
    study._Study(converted)
    with pytest.raises(UserError, match=field):
        study.run(change(converted))


def test_rows_from_scratch_share_no_teacher(corpus, tmp_path):
    rows = (
        VariantConfig("gqa", model=tiny.config(vocab_size=VOCAB, n_layers=1)),
        VariantConfig("windowed", cache=CacheConfig(("ring",)),
                      model=tiny.config(vocab_size=VOCAB, n_layers=1, masks=(MaskConfig(5, 1),))),
    )  # fmt: skip
    cfg = _common(corpus, tmp_path / "work")
    cfg = dataclasses.replace(cfg, study=dataclasses.replace(cfg.study, rows=rows, keep_models=True))
    config.validate(cfg)
    records = study.run(cfg)
    assert all(r["before"] is None and r["after"]["ppl"] > 1 for r in records)
    assert (tmp_path / "work" / "rows" / "gqa-2").is_dir()


@pytest.mark.parametrize("change,message", [
    (dict(study=StudyConfig()), "study.rows"), (dict(workdir=""), "workdir"),
    (dict(checkpoint=CheckpointConfig()), "checkpoint.path"),
    (dict(study=StudyConfig(rows=(VariantConfig("x", cache=CacheConfig(("ring",))),))), "cache.kinds"),
    (dict(study=StudyConfig(rows=(VariantConfig("x", (ConvertConfig(kind="gqa", k_heads=4),)),))), "k_heads"),
])  # fmt: skip
def test_bad_studies_raise_before_any_work(converted, change, message):
    with pytest.raises(UserError, match=message):
        study.run(dataclasses.replace(converted, **change))


def test_the_front_holds_what_nothing_beats():
    points = [(4, 10.0, "a", ""), (2, 12.0, "b", ""), (3, 13.0, "c", ""), (1, 30.0, "d", ""), (4, 9.0, "e", "")]
    assert [p[2] for p in study_report._front(points)] == ["d", "b", "e"]
