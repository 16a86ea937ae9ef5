"""Results of a sharding study on disk: the journal results.jsonl, its first line the settings that all rows share."""

import pathlib
from collections.abc import Iterator
from typing import Any

from experiments.common import machine
from experiments.common.journal import Journal, Pair, flat
from experiments.sharding_study.cells import Cell
from kvattn.config import Experiment, plain

# Fields of config.sharding_study that a resumed study may have changed: they add rows, or change no finished one.
_FREE = (
    "rows",
    "slices",
    "batches",
    "contexts",
    "phases",
    "tokens",
    "weights",
    "cells",
    "compile",
    "measure",
    "timeout",
)


class Results(Journal):
    """The records of a study; cells may be added to it.

    Raises UserError: the workdir holds something else, or a study with other settings (naming the field).
    """

    def __init__(self, cfg: Experiment, cells: tuple[Cell, ...]):
        self.workdir = pathlib.Path(cfg.workdir)
        super().__init__(self.workdir / "results.jsonl", "a sharding study's results")
        self._drop_unplanned()
        fields = plain(cfg.sharding_study)
        shared = flat({k: v for k, v in fields.items() if k not in _FREE})
        rows = {cell.variant: cell.row for cell in cells}
        models = {
            name: flat({name: {"model": plain(row.model), "cache": plain(row.cache)}}) for name, row in rows.items()
        }
        setup = {"kind": "setup", "config": shared, **machine.describe()}
        self.begin(setup, lambda: self._settings(shared, models))
        for variant, config in models.items():
            if self.find(kind="model", variant=variant) is None:
                self.add({"kind": "model", "variant": variant, "config": config})

    def _drop_unplanned(self) -> None:
        """A kill leaves predictions of a cell that was not finished: they are made again."""
        planned = {r["cell"] for r in self.records if r.get("kind") == "planned"}
        left = 0
        for record in reversed(self.records):
            if record.get("kind") != "predicted" or record["cell"] in planned:
                break
            left += 1
        self.drop_last(left)

    def _settings(self, shared: dict[str, Any], models: dict[str, dict[str, Any]]) -> Iterator[Pair]:
        yield "config.sharding_study.", self.records[0].get("config", {}), shared
        for r in self.records:
            if r["kind"] == "model" and r["variant"] in models:
                yield "row ", r["config"], models[r["variant"]]
