"""Runs the study: the cost of each attention variant in quality, its savings in cache bytes and decode time.

    reference -> before, of every row -> after, of every row      (experiments/study/phases.py)

Every `before` comes first, so all rows show up early. A finished phase is one line of results.jsonl and, with
it, a fresh report.md and pareto.png; a killed study goes on after its last line, and inside a training after
its last checkpoint. Per-token losses are kept in nll/, so differences between rows are paired: same tokens.
"""

import gc
import time
from typing import Any

from experiments.common import machine
from experiments.study import report as study_report
from experiments.study.phases import Phases
from experiments.study.progress import Progress
from experiments.study.results import Results
from kvattn.config import Experiment, VariantConfig
from kvattn.errors import UserError


def run(cfg: Experiment) -> list[dict[str, Any]]:
    """Runs or resumes the study in `cfg.workdir`; returns the records of results.jsonl.

    Raises UserError: no rows or workdir, a row with neither checkpoint nor model, a workdir of another
    config (naming the field), and whatever loading, converting, training or evaluating raises. A signal
    during training ends in KeyboardInterrupt with everything finished on disk.
    """
    _check(cfg)
    results, show = Results(cfg), Progress()
    todo = [(phase, row) for phase, row in _phases(cfg) if not results.has(phase, row)]
    if todo:
        phases = Phases(cfg, results, show)
        for phase, row in todo:
            began = time.perf_counter()
            record = {"reference": phases.reference, "before": phases.before, "after": phases.after}[phase](row)
            record |= {"seconds": round(time.perf_counter() - began, 1), "date": machine.now()}
            results.add(phase, row, record)
            show.done(phase, row, record)
            study_report.write(cfg, results.records, results.workdir)
            _tidy(cfg, results)
            gc.collect()  # a finished training's step and state, before the next one needs the room
    _tidy(cfg, results)
    table = study_report.write(cfg, results.records, results.workdir)
    show.finish(table, results)
    return results.records


def _tidy(cfg: Experiment, results: Results) -> None:
    for phase, row in _phases(cfg):
        if phase == "after" and results.has(phase, row) and not cfg.study.keep_models:
            results.drop_checkpoints(row)


def _check(cfg: Experiment) -> None:
    if not cfg.study.rows:
        raise UserError("config.study.rows is (); a study needs rows, for example configs/study_smollm2.py.")
    if not cfg.workdir:
        raise UserError("config.workdir is empty; name the folder for results.jsonl, report.md and pareto.png.")
    for row in cfg.study.rows:
        if row.model is None and not cfg.checkpoint.path:
            raise UserError(
                f"study row {row.name!r} has no model and config.checkpoint.path is empty; set one of them."
            )
        if row.model is not None and cfg.checkpoint.path:
            raise UserError(
                f"study row {row.name!r} has its own model beside config.checkpoint.path={cfg.checkpoint.path!r}; "
                "rows are either converted or from scratch, so empty the path or drop the model."
            )


def _phases(cfg: Experiment) -> list[tuple[str, VariantConfig | None]]:
    rows, scratch = cfg.study.rows, not cfg.checkpoint.path
    out: list[tuple[str, VariantConfig | None]] = [] if scratch else [("reference", None)]
    out += [] if scratch else [("before", row) for row in rows]
    return out + ([("after", row) for row in rows] if cfg.train.steps or scratch else [])
