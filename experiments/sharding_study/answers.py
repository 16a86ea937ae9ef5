"""Answers of a sharding study: `predicted`, `compiled` and `measured` records of a cell's rows."""

import collections
import dataclasses
import json
import os
from typing import Any

import jax

from experiments.common.child import Child, ChildError, import_paths
from experiments.sharding_study import cut as cut_lib
from experiments.sharding_study import program as program_lib
from experiments.sharding_study.cells import Cell, meshes_of
from kvattn import plan
from kvattn.config import Experiment
from kvattn.errors import UserError
from sharding import ShardingError, cost
from sharding.compiler import topology
from sharding.compiler.aot import CompiledReport, Compiler
from sharding.cost import plan_report
from sharding.cost.hardware import CHIPS, of_device
from sharding.layout import torus_layouts

_FIRST_FINDINGS = 6


def predict(cfg: Experiment, cell: Cell) -> list[dict[str, Any]]:
    """The `predicted` records of a cell (fitting layouts best first, then the rest), and its `planned` record."""
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
        meshes=meshes_of(cfg, cell.chips),
    )
    fine, default = set(map(id, p.feasible)), plan.default_mesh(cell.chips)
    second = [c for c in p.candidates if not c.reason and c.mesh == default and id(c) not in fine]
    fitting = sorted([*p.feasible, *second], key=lambda c: float(f"{c.seconds:.5e}"))  # stable: the plan breaks ties
    done, refused = {c.layout for c in fitting}, {}
    for c in sorted(p.infeasible, key=lambda c: (plan_report.miss(c), c.mesh != default)):
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
    """Asks the TPU compiler about one row: its report as a record, or its failure."""
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
    wanted = program_lib.expectations(cell.padded[0], cell.row.cache, p, cell.batch, cell.context, overlap)
    got = compiler.compile(program_lib.TARGET, cell.arguments(layout, overlap), cell.slice, mesh, expectations=wanted)
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


class Cuts(Child):
    """The process with 8 fake CPU devices that runs cuts; see experiments.sharding_study.cut."""

    def __init__(self):
        here = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
        flags = f"--xla_force_host_platform_device_count={cut_lib.FAKE_DEVICES}"
        env = here | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": import_paths()}
        super().__init__("experiments.sharding_study.cut", env=env, quiet=True)

    def run(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The measurement of the cut of `arguments`, or {"failure": one sentence}."""
        try:
            return self.ask("measure", arguments=arguments)
        except ChildError as error:
            return {"failure": f"the process with fake devices: {error}"}


def is_slice(cell: Cell) -> bool:
    """This process runs on the very slice of the cell."""
    found = of_device(jax.devices()[0])
    devices = cell.chips * CHIPS[cell.chip].devices_per_chip
    return found is not None and found.name == cell.chip and jax.device_count() == devices


def measured_key(cfg: Experiment, cell: Cell, row: dict[str, Any]) -> str:
    """Names the thing measured: the cell and row, or, on fake devices, the cut, which many rows share."""
    if is_slice(cell):
        return json.dumps([cell.id, row["layout"], row["mesh"]])
    arguments = {**cell.arguments(row["layout"], cfg.sharding_study.overlap), "mesh": row["mesh"]}
    return json.dumps([cut_lib.cut(arguments)], sort_keys=True)


def measured(cfg: Experiment, cell: Cell, row: dict[str, Any], cuts: Cuts) -> dict[str, Any]:
    """Milliseconds of the true program where its slice is, of a small cut on fake CPU devices elsewhere."""
    arguments = cell.arguments(row["layout"], cfg.sharding_study.overlap)
    if not is_slice(cell):
        what = f"cut on {cut_lib.FAKE_DEVICES} fake CPU devices"
        return {"what": what, **cuts.run({**arguments, "mesh": row["mesh"]})}
    types = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh(tuple(row["mesh"]), torus_layouts.AXES, axis_types=types)
    try:
        seconds = program_lib.measure(program_lib.program(mesh, **arguments))
    except (jax.errors.JaxRuntimeError, UserError, ShardingError) as error:
        return {"failure": " ".join(str(error).split())[:400]}
    return {"what": f"{jax.device_count()} x {jax.devices()[0].device_kind}", "milliseconds": 1e3 * seconds}
