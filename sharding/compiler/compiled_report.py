"""What is known of one compiled program: memory, collectives, cycles, time, and what the doctor names."""

import dataclasses
from typing import Any

from sharding.compiler import doctor
from sharding.compiler.calibration import Calibration, versions
from sharding.compiler.hlo_costs import Analysis, analyse
from sharding.cost.hardware import Chip
from sharding.cost.slices import Slice
from sharding.layout.torus_layouts import AXES

TOP = 12  # operations listed


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per device, by the compiler's plan."""

    arguments: int
    outputs: int
    temporaries: int
    aliased: int  # outputs that live in donated arguments
    code: int

    @property
    def total(self) -> int:
        """What the program holds at once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class CollectiveSum:
    """All collectives of one kind, mesh axes and dtype: executions, bytes per device by the paper's convention,
    and `wire_bytes` of the operations really run (`hlo_costs`)."""

    op: str
    axes: tuple[str, ...]
    dtype: str
    count: float
    bytes: float
    wire_bytes: float


@dataclasses.dataclass(frozen=True)
class TopOperation:
    """One of the dearest operations: cycles over all its executions, and the data sheet's floor in cycles."""

    name: str
    kind: str
    cycles: float
    runs: float
    roofline: float
    where: str


@dataclasses.dataclass(frozen=True)
class CompiledReport:
    """One compiled program. All bytes and cycles are per device and call."""

    slice: str
    mesh: tuple[int, int, int]
    memory: Memory
    collectives: tuple[CollectiveSum, ...]
    cycles: dict[str, float]  # compute, copy, collective; kernel (Pallas) at its operands' bytes / HBM bandwidth
    prefetched_bytes: float
    flops: float  # matmuls
    seconds: float
    calibration: Calibration
    top: tuple[TopOperation, ...]
    findings: tuple[doctor.Finding, ...]
    unknown_loops: tuple[str, ...]
    compile_seconds: float
    versions: dict[str, str]

    def to_json(self) -> dict:
        """Dicts, lists and numbers."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict) -> "CompiledReport":
        """The inverse of to_json."""
        rows = {
            "mesh": tuple(value["mesh"]),
            "memory": Memory(**value["memory"]),
            "collectives": tuple(CollectiveSum(**{**c, "axes": tuple(c["axes"])}) for c in value["collectives"]),
            "calibration": Calibration(**value["calibration"]),
            "top": tuple(TopOperation(**t) for t in value["top"]),
            "findings": tuple(doctor.Finding(**f) for f in value["findings"]),
            "unknown_loops": tuple(value["unknown_loops"]),
        }
        return cls(**{**value, **rows})


@dataclasses.dataclass(frozen=True)
class CompileFailure:
    """A program that did not compile. `kind`: memory | timeout | crash | error. For memory, bytes per device."""

    slice: str
    mesh: tuple[int, ...]
    kind: str
    reason: str
    needed_bytes: int = 0
    available_bytes: int = 0

    def to_json(self) -> dict:
        """Dicts, lists and numbers."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict) -> "CompileFailure":
        """The inverse of to_json."""
        return cls(**{**value, "mesh": tuple(value["mesh"])})


def report(
    compiled: Any,
    slice_: Slice,
    mesh: tuple[int, int, int],
    calibration: Calibration,
    *,
    compile_seconds: float = 0.0,
    expectations: doctor.Expectations = doctor.NOTHING,
) -> CompiledReport:
    """The CompiledReport of a jax.stages.Compiled for `slice_` on a mesh of these sizes.

    Raises ShardingError where the program is for another number of devices.
    """
    analysis = analyse(compiled.as_text(), dict(zip(AXES, mesh)))
    plan, second = compiled.memory_analysis(), slice_.row.hbm_bandwidth / slice_.row.devices_per_chip
    cycles = {**analysis.cycles(), "kernel": analysis.kernel_bytes() / second * calibration.clock}
    return CompiledReport(
        slice=slice_.name,
        mesh=tuple(mesh),
        memory=Memory(
            arguments=plan.argument_size_in_bytes,
            outputs=plan.output_size_in_bytes,
            temporaries=plan.temp_size_in_bytes,
            aliased=plan.alias_size_in_bytes,
            code=plan.generated_code_size_in_bytes,
        ),
        collectives=_sums(analysis),
        cycles=cycles,
        prefetched_bytes=analysis.prefetched_bytes(),
        flops=sum(o.flops * o.runs for o in analysis.operations),
        seconds=sum(cycles.values()) / calibration.clock,
        calibration=calibration,
        top=_top(analysis, slice_.row, calibration),
        findings=tuple(doctor.diagnose(analysis, slice_.row, calibration, expectations)),
        unknown_loops=analysis.unknown_loops,
        compile_seconds=compile_seconds,
        versions=versions(),
    )


def _sums(analysis: Analysis) -> tuple[CollectiveSum, ...]:
    totals: dict[tuple, list[float]] = {}
    for c in analysis.collectives:
        row = totals.setdefault((c.op, c.axes, c.dtype), [0.0, 0.0, 0.0])
        for n, value in enumerate((1, c.bytes, c.wire_bytes)):
            row[n] += value * c.runs
    return tuple(CollectiveSum(*key, *row) for key, row in sorted(totals.items(), key=lambda item: -item[1][1]))


def _top(analysis: Analysis, chip: Chip, calibration: Calibration) -> tuple[TopOperation, ...]:
    dearest = sorted(analysis.operations, key=lambda o: -o.cycles * o.runs)[:TOP]
    return tuple(
        TopOperation(
            name=o.name,
            kind=o.kind,
            cycles=o.cycles * o.runs,
            runs=o.runs,
            roofline=doctor.roofline_cycles(o, chip, calibration) * o.runs,
            where=f"{o.source} {o.op_name}".strip(),
        )
        for o in dearest
        if o.cycles
    )
