"""Results of a study on disk: the journal results.jsonl, per-token losses in nll/, one folder a trained row."""

import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from experiments.common import machine
from experiments.common.journal import Journal, Pair, flat
from experiments.study import report as study_report
from kvattn.config import Experiment, VariantConfig, plain

# Fields that change no figure: a study may go on with other values, or with rows added.
_FREE = (
    "workdir",
    "name",
    "variants",
    "steps",
    "study.rows",
    "study.keep_models",
    "sharding_study",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep",
    "train.steps",
)


class Results:
    """Records of the phases that are finished, of this run's number of training steps.

    Raises UserError: the workdir holds something else, or a study with other settings (naming the field).
    """

    def __init__(self, cfg: Experiment):
        self.workdir, self.cfg = pathlib.Path(cfg.workdir), cfg
        self._journal = Journal(self.workdir / "results.jsonl", "a study's results")
        (self.workdir / "nll").mkdir(parents=True, exist_ok=True)
        shared = flat(plain(cfg), leave_out=_FREE)
        setup = {"phase": "setup", "config": shared, **machine.describe()}
        self._journal.begin(setup, lambda: self._settings(shared))

    @property
    def records(self) -> list[dict[str, Any]]:
        """An `after` line belongs to one number of steps; a run with another number measures its rows again."""
        steps = self.cfg.train.steps
        return [r for r in self._journal.records if r.get("steps", steps) == steps]

    def has(self, phase: str, row: VariantConfig | None) -> bool:
        return self.of(phase, row) is not None

    def of(self, phase: str, row: VariantConfig | None) -> dict[str, Any] | None:
        """The record of a finished phase; `row` None is the unconverted model."""
        name = row.name if row else ""
        return next((r for r in self.records if r["phase"] == phase and r.get("row", "") == name), None)

    def add(self, phase: str, row: VariantConfig | None, record: dict[str, Any]) -> None:
        about = {"row": row.name, "config": flat(plain(row))} if row else {}
        self._journal.add({"phase": phase, **about, **record})

    def nll_path(self, phase: str, row: VariantConfig | None) -> pathlib.Path:
        return study_report.nll_path(self.cfg, self.workdir, phase, row.name if row else "")

    def drop_checkpoints(self, row: VariantConfig) -> None:
        """Deletes a row's checkpoints: weights and optimizer state, three times the model."""
        shutil.rmtree(row_dir(self.cfg, row) / "checkpoints", ignore_errors=True)

    def _settings(self, shared: dict[str, Any]) -> Iterator[Pair]:
        yield "config.", self.records[0].get("config", {}), shared
        rows = {row.name: flat(plain(row)) for row in self.cfg.study.rows}
        for record in self.records[1:]:
            if record.get("row") in rows:
                yield f"config.study.rows[{record['row']}].", record["config"], rows[record["row"]]


def row_dir(cfg: Experiment, row: VariantConfig) -> pathlib.Path:
    """The folder in which a row trains; another number of steps trains elsewhere."""
    return pathlib.Path(cfg.workdir) / "rows" / f"{row.name}-{cfg.train.steps}"
