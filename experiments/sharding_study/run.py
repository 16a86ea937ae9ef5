"""Runs the sharding study: layouts of a model on a slice and the cost of a pass, four answers side by side.

    predicted   every layout on its best mesh and on the paper's: sharding.cost.prediction, by kvattn.plan
    compiled    the best of each cell (or all): memory, collectives and estimated time by the real TPU compiler, which
                needs no TPU; plus the interconnect time of the cost model, and at least its HBM time, as the compiler
                estimates neither collectives nor asynchronous copies
    measured    on a CPU a small cut of the model, really run on 8 fake devices; on the slice itself the true program
    paper       what was published, where the config says so

A cell (experiments/sharding_study/cells.py) is one question. Every answer is one line of
results.jsonl; the same command finishes what is missing. A layout that does not fit, does not compile or does not run
is a row with its reason. The model is padded as `experiments.sharding_study.program.padded` says, and every row
says how.
"""

import time
from collections.abc import Iterator
from typing import Any

import rich.console
import rich.progress

from experiments.common import machine
from experiments.sharding_study import answers
from experiments.sharding_study import report as sharding_study_report
from experiments.sharding_study.cells import Cell, cells_of, check_meshes
from experiments.sharding_study.results import Results
from kvattn.config import Experiment
from kvattn.errors import UserError
from sharding.compiler.aot import Compiler


def run(cfg: Experiment) -> list[dict[str, Any]]:
    """Runs or resumes the study in `cfg.workdir`; returns the records of results.jsonl.

    Raises UserError: no workdir, an unknown slice or layout, a mesh that is not the slice's chips, a workdir of another
    config (naming the field); ShardingError: something to compile and no libtpu.
    """
    if not cfg.workdir:
        raise UserError("config.workdir is empty; name the folder for results.jsonl, report.md and the plots.")
    cells = cells_of(cfg)
    check_meshes(cfg, cells)
    compiler = Compiler(cfg.sharding_study.timeout) if cfg.sharding_study.compile != "none" else None
    results = Results(cfg, cells)
    console = rich.console.Console(width=None if rich.console.Console().is_terminal else 140)
    try:
        _Study(cfg, cells, results, compiler, console).run()
    finally:
        if compiler is not None:
            compiler.close()
    table = sharding_study_report.write(cfg, cells, results.records, results.workdir)
    console.print(table)
    console.print(f"report, plots and results.jsonl are in {results.workdir}", highlight=False)
    return results.records


class _Study:
    """One run: what is missing in the journal, with a progress bar."""

    def __init__(self, cfg: Experiment, cells, results: Results, compiler: Compiler | None, console):
        self.cfg, self.cells, self.results, self.compiler, self.console = cfg, cells, results, compiler, console

    def run(self) -> None:
        columns = (
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
        )
        # A notebook would need widgets for the bar; finished rows are printed in any case.
        how = {"console": self.console, "transient": True, "disable": self.console.is_jupyter}
        with rich.progress.Progress(*columns, **how) as bar, answers.Cuts() as cuts:
            task = bar.add_task("predicting", total=len(self.cells))
            for cell in self.cells:
                bar.update(task, description=cell.id)
                if self.results.find(kind="planned", cell=cell.id) is None:
                    self.results.add(*answers.predict(self.cfg, cell))
                bar.advance(task)
            todo = list(self._todo())
            bar.reset(task, total=len(todo), description="compiling")
            for kind, cell, row in todo:
                bar.update(task, description=f"{kind} {cell.id} {row['layout']}")
                self._one(kind, cell, row, cuts)
                bar.advance(task)
                sharding_study_report.write(
                    self.cfg, self.cells, self.results.records, self.results.workdir, plots=False
                )

    def _todo(self) -> Iterator[tuple[str, Cell, dict[str, Any]]]:
        """Everything to measure that costs seconds, then everything to compile."""
        chosen = [(cell, row) for cell in self.cells for row in self._chosen(cell)]
        seen = set()
        for cell, row in chosen if self.cfg.sharding_study.measure else ():
            key = answers.measured_key(self.cfg, cell, row)
            if key not in seen and self.results.find(kind="measured", key=key) is None:
                seen.add(key)
                yield "measure", cell, row
        for cell, row in chosen if self.compiler is not None else ():
            if self.results.find(kind="compiled", cell=cell.id, layout=row["layout"], mesh=row["mesh"]) is None:
                yield "compile", cell, row

    def _chosen(self, cell: Cell) -> list[dict[str, Any]]:
        """The rows of a cell to compile and measure: the best and the paper's own, or all that fit."""
        predicted = (r for r in self.results.records if r["kind"] == "predicted" and r["cell"] == cell.id)
        rows = [r for r in predicted if not r["reason"]]
        if self.cfg.sharding_study.compile == "all":
            return rows
        paper = [r for r in rows if cell.paper and r["layout"] == cell.paper[0]]
        return rows[:1] + [r for r in paper[:1] if r is not rows[0]]

    def _one(self, kind: str, cell: Cell, row: dict[str, Any], cuts: answers.Cuts) -> None:
        began = time.perf_counter()
        about = {"cell": cell.id, "layout": row["layout"], "mesh": row["mesh"]}
        if kind == "compile":
            record = {"kind": "compiled", **about, **answers.compiled(self.cfg, cell, row, self.compiler)}
            said = record.get("failure") or (
                f"{record['total_seconds'] * 1e3:.4g} ms, {record['memory']['total'] / 2**30:.1f} GiB"
            )
        else:
            record = {
                "kind": "measured",
                "key": answers.measured_key(self.cfg, cell, row),
                **about,
                **answers.measured(self.cfg, cell, row, cuts),
            }
            said = record.get("failure") or f"{record['milliseconds']:.4g} ms ({record['what']})"
        wall = time.perf_counter() - began
        self.results.add({**record, "wall_seconds": round(wall, 1), "date": machine.now()})
        self.console.print(f"{record['kind']:<9}{cell.id}  {row['layout']}: {said}  ({wall:.0f} s)", highlight=False)
