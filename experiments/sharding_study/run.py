"""The sharding study: how should a model be laid out on a slice, and what does a pass cost? Four answers side by side.

    predicted   every layout on its best mesh and on the paper's: sharding.cost.prediction, by kvattn.plan
    compiled    the best of each cell (or all): memory, collectives and estimated time by the real TPU compiler, which
                needs no TPU; plus the interconnect time of the cost model, and at least its HBM time, as the compiler
                estimates neither collectives nor asynchronous copies
    measured    on a CPU a small cut of the model, really run on 8 fake devices; on the slice itself the true program
    paper       what was published, where the config says so

A cell is one question: variant, slice, phase, batch, context, tokens, weights. Every answer is one line of
results.jsonl; the same command finishes what is missing. A layout that does not fit, does not compile or does not run
is a row with its reason. The model is padded as `experiments.sharding_study.jobs.padded` says, and every row says
how.
"""

import collections
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import rich.console
import rich.progress

from experiments.launching import command as launch
from experiments.sharding_study import jobs as sharded_jobs
from experiments.sharding_study import report as sharding_study_report
from experiments.study.run import flatten, machine, refuse_changes
from kvattn import model as model_lib
from kvattn import plan, plan_report, spec
from kvattn.config import Experiment, ModelConfig, VariantConfig
from kvattn.errors import UserError
from sharding import ShardingError, cost
from sharding.compiler import topology
from sharding.compiler.aot import CompiledReport, Compiler
from sharding.cost.hardware import CHIPS, of_device
from sharding.layout import layouts

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
_FIRST_FINDINGS = 6


@dataclasses.dataclass(frozen=True)
class Cell:
    """One question, with the padded model it is asked of. `paper` is None or (layout, seconds, source)."""

    variant: str
    slice: str
    phase: str
    batch: int
    context: int
    tokens: int
    weights: str
    row: VariantConfig = dataclasses.field(repr=False)
    paper: tuple[str, float, str] | None = None

    @property
    def id(self) -> str:
        """The cell in a few words; rows of the journal are found by it."""
        return f"{self.variant} {self.slice} {self.question}"

    @property
    def question(self) -> str:
        """The id without variant and slice."""
        new = f" T{self.tokens}" if self.phase == "prefill" else ""
        held = f" S{self.context}" if self.tokens != self.context else ""
        weights = {"bfloat16": "bf16"}.get(self.weights, self.weights)
        return f"{self.phase} B{self.batch}{new}{held} {weights}"

    @property
    def chip(self) -> str:
        return launch.parse_slice(self.slice).chip

    @property
    def chips(self) -> int:
        return launch.parse_slice(self.slice).chips

    @property
    def padded(self) -> tuple[ModelConfig, tuple[str, ...]]:
        return sharded_jobs.padded(self.row.model, self.chips)

    @property
    def counted_params(self) -> int:
        """N of the 2N FLOPs per token in MFU: without padding."""
        return spec.count(model_lib.param_specs(dataclasses.replace(self.row.model, scan_layers=False)))

    def job(self, layout: str, overlap: str) -> dict[str, Any]:
        """Keyword arguments of sharded_jobs.program."""
        job = {
            "model": dataclasses.asdict(self.row.model),
            "cache": dataclasses.asdict(self.row.cache),
            "layout": layout,
            "phase": self.phase,
            "batch": self.batch,
            "context": self.context,
            "tokens": self.tokens if self.phase == "prefill" else 0,
            "weights": self.weights,
            "overlap": overlap,
        }
        return json.loads(json.dumps(job))

    def predict(self, layout: str, mesh: tuple[int, int, int]) -> cost.Prediction:
        """The cost model on the padded model; `counted_params` without the padding."""
        work = plan.workload(self.padded[0], self.row.cache, weights=self.weights)
        p = cost.predict(
            work,
            layouts.parse(layout),
            tuple(mesh),
            self.chip,
            phase=self.phase,
            batch=self.batch,
            tokens=self.tokens,
            context=self.context,
        )
        return dataclasses.replace(p, counted_params=self.counted_params)


def run(cfg: Experiment) -> list[dict[str, Any]]:
    """Runs or resumes the study in `cfg.workdir`; returns the records of results.jsonl.

    Raises UserError: no workdir, an unknown slice or layout, a mesh that is not the slice's chips, a workdir of another
    config (naming the field); ShardingError: something to compile and no libtpu.
    """
    if not cfg.workdir:
        raise UserError("config.workdir is empty; name the folder for results.jsonl, report.md and the plots.")
    cells = cells_of(cfg)
    _check_meshes(cfg, cells)
    compiler = Compiler(cfg.sharding_study.timeout) if cfg.sharding_study.compile != "none" else None
    journal = Journal(cfg, cells)
    console = rich.console.Console(width=None if rich.console.Console().is_terminal else 140)
    try:
        _Study(cfg, cells, journal, compiler, console).run()
    finally:
        if compiler is not None:
            compiler.close()
    table = sharding_study_report.write(cfg, cells, journal.records, journal.workdir)
    console.print(table)
    console.print(f"report, plots and results.jsonl are in {journal.workdir}", highlight=False)
    return journal.records


# --- what is asked -------------------------------------------------------------------------------------


def cells_of(cfg: Experiment) -> tuple[Cell, ...]:
    """The cells of the study: the product, then `cells`; the same question is asked once.

    Raises UserError: a cell that names no row, slices that do not exist, nothing asked.
    """
    s = cfg.sharding_study
    rows = s.rows or (VariantConfig(name=cfg.name or "model", cache=cfg.cache),)
    rows = {r.name: r if r.model is not None else dataclasses.replace(r, model=cfg.model) for r in rows}
    found: dict[str, Cell] = {}

    def add(row, where, phase, batch, context, tokens, weights, paper=None):
        tokens = 1 if phase == "decode" else tokens or context
        if tokens > context:
            raise UserError(f"sharding_study.tokens has {tokens}, above a context of {context}; lower it.")
        cell = Cell(row.name, where, phase, batch, context, tokens, weights, row, paper)
        if paper or cell.id not in found:
            found[cell.id] = cell

    for row in rows.values():
        for where in s.slices:
            for phase, batch, context in ((p, b, c) for p in s.phases for b in s.batches for c in s.contexts):
                for tokens in (s.tokens or (0,)) if phase == "prefill" else (0,):
                    for weights in s.weights:
                        add(row, where, phase, batch, context, tokens, weights)
    for one in s.cells:
        if one.variant and one.variant not in rows:
            if cfg.variants:  # the row was deselected
                continue
            raise UserError(f"sharding_study.cells names row {one.variant!r}; rows are {', '.join(rows)}.")
        paper = (one.paper_layout, one.paper_seconds, one.paper_source) if one.paper_seconds else None
        for row in [rows[one.variant]] if one.variant else rows.values():
            for where in [one.slice] if one.slice else s.slices:
                for weights in [one.weights] if one.weights else s.weights:
                    add(row, where, one.phase, one.batch, one.context, one.tokens, weights, paper)
    if not found:
        raise UserError("config.sharding_study asks nothing; give slices, batches, contexts and phases, or cells.")
    for cell in found.values():
        _chip(cell)
    return tuple(found.values())


def _chip(cell: Cell) -> str:
    try:
        return cell.chip
    except UserError as error:
        raise UserError(str(error).replace("--slice=", "sharding_study.slices has ")) from None


def _meshes(cfg: Experiment, chips: int) -> list[tuple[int, int, int]] | None:
    out = []
    for text in cfg.sharding_study.meshes:
        out += [plan.default_mesh(chips)] if text == "default" else plan.parse_mesh(text)
    return out or None


def _check_meshes(cfg: Experiment, cells: tuple[Cell, ...]) -> None:
    plan.parse_layouts(cfg.sharding_study.layouts)
    for where in {cell.slice: cell for cell in cells}.values():
        for x, y, z in _meshes(cfg, where.chips) or ():
            if x * y * z != where.chips:
                raise UserError(
                    f"sharding_study.meshes has {x}x{y}x{z} = {x * y * z} chips but {where.slice} has {where.chips}; "
                    f"make the product {where.chips}, or write default."
                )


# --- the journal ---------------------------------------------------------------------------------------


class Journal:
    """results.jsonl: a first line with what all rows share, then one line per answer."""

    def __init__(self, cfg: Experiment, cells: tuple[Cell, ...]):
        self.workdir = pathlib.Path(cfg.workdir)
        self.path = self.workdir / "results.jsonl"
        self.workdir.mkdir(parents=True, exist_ok=True)
        self.records = self._read()
        shared = {k: v for k, v in dataclasses.asdict(cfg.sharding_study).items() if k not in _FREE}
        models = {
            cell.variant: {"model": dataclasses.asdict(cell.row.model), "cache": dataclasses.asdict(cell.row.cache)}
            for cell in cells
        }
        shared, models = (json.loads(json.dumps(flatten(tree))) for tree in (shared, models))
        if self.records:
            self._check_same(shared, models)
        else:
            self.add({"kind": "setup", "config": shared, **machine()})
        known = {r["variant"] for r in self.records if r["kind"] == "model"}
        for variant in {cell.variant: None for cell in cells}:
            if variant not in known:
                one = {k: v for k, v in models.items() if k.startswith(variant + ".")}
                self.add({"kind": "model", "variant": variant, "config": one})

    def find(self, kind: str, **what: Any) -> dict[str, Any] | None:
        what["kind"] = kind
        return next((r for r in self.records if all(r.get(k) == v for k, v in what.items())), None)

    def add(self, *records: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write("".join(json.dumps(record) + "\n" for record in records))
            handle.flush()
            os.fsync(handle.fileno())
        self.records += [json.loads(json.dumps(record)) for record in records]

    def _read(self) -> list[dict[str, Any]]:
        """The finished lines; a last line cut short by a kill is taken off the file, and so are the predictions of a
        cell that was not finished."""
        if not self.path.exists():
            return []
        whole = self.path.read_bytes()
        lines = whole[: whole.rfind(b"\n") + 1].splitlines(keepends=True)
        try:
            records = [json.loads(line) for line in lines]
            planned = {r["cell"] for r in records if r["kind"] == "planned"}
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.path} is not a sharding study's results; use another config.workdir.") from None
        while records and records[-1]["kind"] == "predicted" and records[-1]["cell"] not in planned:
            records.pop()
        kept = sum(map(len, lines[: len(records)]))
        if kept < len(whole):
            os.truncate(self.path, kept)
        return records

    def _check_same(self, shared: dict[str, Any], models: dict[str, Any]) -> None:
        pairs = [("config.sharding_study.", self.records[0].get("config", {}), shared)]
        for r in self.records:
            if r["kind"] == "model":
                new = {k: v for k, v in models.items() if k.startswith(r["variant"] + ".")}
                pairs += [("row ", r["config"], new)] if new else []
        refuse_changes(self.path, pairs)


# --- the answers ---------------------------------------------------------------------------------------


class _Study:
    """One run: what is missing in the journal, with a progress bar."""

    def __init__(self, cfg: Experiment, cells, journal: Journal, compiler: Compiler | None, console):
        self.cfg, self.cells, self.journal, self.compiler, self.console = cfg, cells, journal, compiler, console

    def run(self) -> None:
        columns = (
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
        )
        # A notebook would need widgets for the bar; finished rows are printed in any case.
        how = {"console": self.console, "transient": True, "disable": self.console.is_jupyter}
        with rich.progress.Progress(*columns, **how) as bar, Cuts() as cuts:
            task = bar.add_task("predicting", total=len(self.cells))
            for cell in self.cells:
                bar.update(task, description=cell.id)
                if self.journal.find("planned", cell=cell.id) is None:
                    self.journal.add(*predict(self.cfg, cell))
                bar.advance(task)
            todo = list(self._todo())
            bar.reset(task, total=len(todo), description="compiling")
            for kind, cell, row in todo:
                bar.update(task, description=f"{kind} {cell.id} {row['layout']}")
                self._one(kind, cell, row, cuts)
                bar.advance(task)
                sharding_study_report.write(
                    self.cfg, self.cells, self.journal.records, self.journal.workdir, plots=False
                )

    def _todo(self) -> Iterator[tuple[str, Cell, dict[str, Any]]]:
        """Everything to measure that costs seconds, then everything to compile."""
        chosen = [(cell, row) for cell in self.cells for row in self._chosen(cell)]
        seen = set()
        for cell, row in chosen if self.cfg.sharding_study.measure else ():
            key = measured_key(self.cfg, cell, row)
            if key not in seen and self.journal.find("measured", key=key) is None:
                seen.add(key)
                yield "measure", cell, row
        for cell, row in chosen if self.compiler is not None else ():
            if self.journal.find("compiled", cell=cell.id, layout=row["layout"], mesh=row["mesh"]) is None:
                yield "compile", cell, row

    def _chosen(self, cell: Cell) -> list[dict[str, Any]]:
        """The rows of a cell to compile and measure: the best and the paper's own, or all that fit."""
        predicted = (r for r in self.journal.records if r["kind"] == "predicted" and r["cell"] == cell.id)
        rows = [r for r in predicted if not r["reason"]]
        if self.cfg.sharding_study.compile == "all":
            return rows
        paper = [r for r in rows if cell.paper and r["layout"] == cell.paper[0]]
        return rows[:1] + [r for r in paper[:1] if r is not rows[0]]

    def _one(self, kind: str, cell: Cell, row: dict[str, Any], cuts: "Cuts") -> None:
        began = time.perf_counter()
        about = {"cell": cell.id, "layout": row["layout"], "mesh": row["mesh"]}
        if kind == "compile":
            record = {"kind": "compiled", **about, **compiled(self.cfg, cell, row, self.compiler)}
            said = record.get("failure") or (
                f"{record['total_seconds'] * 1e3:.4g} ms, {record['memory']['total'] / 2**30:.1f} GiB"
            )
        else:
            record = {
                "kind": "measured",
                "key": measured_key(self.cfg, cell, row),
                **about,
                **measured(self.cfg, cell, row, cuts),
            }
            said = record.get("failure") or f"{record['milliseconds']:.4g} ms ({record['what']})"
        wall = time.perf_counter() - began
        self.journal.add({**record, "wall_seconds": round(wall, 1), "date": time.strftime("%Y-%m-%d %H:%M:%S")})
        self.console.print(f"{record['kind']:<9}{cell.id}  {row['layout']}: {said}  ({wall:.0f} s)", highlight=False)


def predict(cfg: Experiment, cell: Cell) -> list[dict[str, Any]]:
    """The `predicted` records of a cell, best first, then those that do not fit, and its `planned` record."""
    s = cfg.sharding_study
    model, notes = cell.padded
    p = plan.plan(
        model,
        cell.row.cache,
        chip=cell.chip,
        chips=cell.chips,
        batch=cell.batch,
        context=cell.context,
        phase=cell.phase,
        tokens=cell.tokens,
        weights=cell.weights,
        overlap=s.rank,
        pad_heads=False,
        layouts=plan.parse_layouts(s.layouts),
        meshes=_meshes(cfg, cell.chips),
    )
    fine, default = set(map(id, p.feasible)), plan.default_mesh(cell.chips)
    second = [c for c in p.candidates if not c.reason and c.mesh == default and id(c) not in fine]
    fitting = sorted([*p.feasible, *second], key=lambda c: float(f"{c.seconds:.5e}"))  # stable: the plan breaks ties
    done, refused = {c.layout for c in fitting}, {}
    for c in sorted(p.infeasible, key=lambda c: (plan_report._miss(c), c.mesh != default)):
        if c.layout not in done:
            refused.setdefault(c.layout, c)
    records = []
    for rank, c in enumerate([*fitting, *refused.values()]):
        record = {
            "kind": "predicted",
            "cell": cell.id,
            "rank": rank,
            "layout": c.layout.name,
            "mesh": list(c.mesh),
            "padded": list(notes),
            "reason": c.reason,
        }
        if c.prediction is not None:
            counted = dataclasses.replace(c.prediction, counted_params=cell.counted_params)
            record |= plan_report.row(dataclasses.replace(c, prediction=counted))
        records.append(record)
    about = {f.name: getattr(cell, f.name) for f in dataclasses.fields(cell) if f.name not in ("row", "paper")}
    verdict = {"verdict": p.verdict(), "changes": list(p.changes), "tried": len(p.candidates), "fit": len(fitting)}
    return [*records, {"kind": "planned", "cell": cell.id, **about, "chip": cell.chip, "chips": cell.chips, **verdict}]


def compiled(cfg: Experiment, cell: Cell, row: dict[str, Any], compiler: Compiler) -> dict[str, Any]:
    """What the TPU compiler says of one row, or its failure."""
    layout, mesh, overlap = row["layout"], tuple(row["mesh"]), cfg.sharding_study.overlap
    try:
        slice_ = topology.tpu_slice(cell.slice)
    except ShardingError:
        why = f"{cell.slice} is no TPU slice, so the TPU compiler has nothing to say"
        return {"failure": why, "failure_kind": "error"}
    if slice_.row.devices_per_chip > 1:
        why = f"a {cell.chip} chip is {slice_.row.devices_per_chip} devices, and the layouts here are of whole chips"
        return {"failure": why, "failure_kind": "error"}
    p = cell.predict(layout, mesh)
    wanted = sharded_jobs.expectations(cell.padded[0], cell.row.cache, p, cell.batch, cell.context, overlap)
    got = compiler.compile(sharded_jobs.TARGET, cell.job(layout, overlap), cell.slice, mesh, expectations=wanted)
    if not isinstance(got, CompiledReport):
        sizes = {"needed_bytes": got.needed_bytes, "available_bytes": got.available_bytes}
        return {"failure": got.reason, "failure_kind": got.kind, **sizes}
    # Asynchronous copies, prefetched weights above all, have no cycles: no less than the time to read it all once.
    total = max(got.seconds, p.hbm_seconds) + p.interconnect_seconds
    moved = sum(c.bytes for c in got.collectives)
    return {
        "overlap": overlap,
        "seconds": got.seconds,
        "hbm_seconds": p.hbm_seconds,
        "interconnect_seconds": p.interconnect_seconds,
        "prefetched_bytes": got.prefetched_bytes,
        "total_seconds": total,
        "mfu": cost.mfu(p.counted_params, p.tokens, total, cell.chips, p.chip.peak_flops),
        "memory": {**dataclasses.asdict(got.memory), "total": got.memory.total},
        "flops": got.flops,
        "collective_bytes": moved,
        "collectives": [[c.op, "".join(c.axes), c.dtype, c.count, c.bytes] for c in got.collectives],
        "findings": collections.Counter(f.severity for f in got.findings),
        "first_findings": [str(f) for f in got.findings[:_FIRST_FINDINGS]],
        "unknown_loops": list(got.unknown_loops),
        "compile_seconds": got.compile_seconds,
        "clock": got.calibration.clock,
        "versions": got.versions,
    }


# --- measured ------------------------------------------------------------------------------------------


def _is_slice(cell: Cell) -> bool:
    """Whether this process runs on the very slice of the cell."""
    found = of_device(jax.devices()[0])
    devices = cell.chips * CHIPS[cell.chip].devices_per_chip
    return found is not None and found.name == cell.chip and jax.device_count() == devices


def measured_key(cfg: Experiment, cell: Cell, row: dict[str, Any]) -> str:
    """What a measurement is of: the cell and row, or, on fake devices, the cut, which many rows share."""
    if _is_slice(cell):
        return json.dumps([cell.id, row["layout"], row["mesh"]])
    job = {**cell.job(row["layout"], cfg.sharding_study.overlap), "mesh": row["mesh"]}
    return json.dumps([sharded_jobs.cut(job)], sort_keys=True)


def measured(cfg: Experiment, cell: Cell, row: dict[str, Any], cuts: "Cuts") -> dict[str, Any]:
    """Milliseconds of the true program where its slice is, of a small cut on fake CPU devices elsewhere."""
    job = cell.job(row["layout"], cfg.sharding_study.overlap)
    if not _is_slice(cell):
        what = f"cut on {sharded_jobs.FAKE_DEVICES} fake CPU devices"
        return {"what": what, **cuts.run({**job, "mesh": row["mesh"]})}
    types = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh(tuple(row["mesh"]), layouts.AXES, axis_types=types)
    try:
        seconds = sharded_jobs.measure(sharded_jobs.program(mesh, **job))
    except (jax.errors.JaxRuntimeError, UserError, ShardingError) as error:
        return {"failure": " ".join(str(error).split())[:400]}
    return {"what": f"{jax.device_count()} x {jax.devices()[0].device_kind}", "milliseconds": 1e3 * seconds}


class Cuts:
    """A child process with 8 fake CPU devices, started when first asked; see experiments.sharding_study.jobs."""

    def __init__(self):
        self._child: subprocess.Popen | None = None

    def __enter__(self) -> "Cuts":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """The measurement of the cut of `job`, or {"failure": one sentence}."""
        if self._child is None or self._child.poll() is not None:
            flags = f"--xla_force_host_platform_device_count={sharded_jobs.FAKE_DEVICES}"
            here = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
            paths = os.pathsep.join(p or os.getcwd() for p in sys.path)
            self._child = subprocess.Popen(
                [sys.executable, "-m", "experiments.sharding_study.jobs"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**here, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths},
            )
        try:
            self._child.stdin.write(json.dumps(job) + "\n")
            self._child.stdin.flush()
            line = self._child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            return {"failure": f"the process with fake devices ended with code {self._child.wait()}"}
        answer = json.loads(line)
        return answer.get("measured") or {"failure": answer["failure"]}


__all__ = ["Cell", "Cuts", "Journal", "cells_of", "compiled", "measured", "measured_key", "predict", "run"]
