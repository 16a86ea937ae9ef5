"""What is wrong with a compiled step, by name: stray collectives, copies of the cache, bad tiles, slow operations.

    >>> wanted = Expectations({("all-gather", ("y", "z")): 69_599_232}, caches=(((1, 2048, 1, 256), "bf16"),))
    >>> for finding in diagnose(analyse(text, mesh), CHIPS["v4"], calibration, wanted):
    ...     print(finding)
    warning: copy of the cache: copy.12 writes bf16[1,2048,256] ... (decode.py:80) ...

Costs are the compiler's own estimates. An operation is compared with what the compiler itself estimates for simple work
of the same size (`calibration`): bytes at the rate of a large copy, FLOPs at that of a large matmul, whichever is more.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

from sharding.compiler import hlo
from sharding.compiler.calibration import Calibration
from sharding.compiler.hlo_costs import Analysis, Collective, Operation
from sharding.cost.hardware import Chip

MIB = 2**20
PADDING = 1.5  # times the data, on arrays over a MiB
SLOW = 2.0  # times the roofline
SHARE = 0.01  # of the step (cycles) or of the expected traffic (bytes): less is not worth a name
LANES, SUBLANES = 128, 8


@dataclasses.dataclass(frozen=True)
class Expectations:
    """What the program should do in one call.

    collectives  {(op, mesh axes in mesh order): bytes per chip and call, by the paper's convention}; None: not checked
    caches       per-chip (shape, HLO dtype) of every cache array; a stacked cache also as one layer's slice
    """

    collectives: dict[tuple[str, tuple[str, ...]], float] | None = None
    caches: tuple[tuple[tuple[int, ...], str], ...] = ()

    def to_json(self) -> dict:
        """Lists and numbers only."""
        table = self.collectives
        return {
            "collectives": None if table is None else [[op, list(axes), size] for (op, axes), size in table.items()],
            "caches": [[list(shape), dtype] for shape, dtype in self.caches],
        }

    @classmethod
    def from_json(cls, value: dict) -> "Expectations":
        """The inverse of to_json."""
        table = value["collectives"]
        return cls(
            None if table is None else {(op, tuple(axes)): size for op, axes, size in table},
            tuple((tuple(shape), dtype) for shape, dtype in value["caches"]),
        )


NOTHING = Expectations()


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing to mend. `cost` in `unit` (cycles or bytes per call of the program); `severity` warning or note."""

    severity: str
    what: str
    where: str  # source line and op_name
    cost: float
    unit: str
    advice: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.what} [{self.cost:,.0f} {self.unit}] at {self.where}; {self.advice}"


def diagnose(
    analysis: Analysis, chip: Chip, calibration: Calibration, expectations: Expectations = NOTHING
) -> list[Finding]:
    """Findings: warnings before notes, the dearest first. `calibration` is that of `chip`."""
    found = [
        *_collectives(analysis, expectations),
        *_cache_copies(analysis, expectations),
        *_tiles(analysis),
        *_slow(analysis, chip, calibration),
        *_loops(analysis),
    ]
    return sorted(_merged(found), key=lambda f: (f.severity != "warning", f.unit, -f.cost))


def _merged(found: list[Finding]) -> list[Finding]:
    """One finding for the same thing at the same place, as unrolled layers give it, with the costs added up."""
    alike: dict[tuple, list[Finding]] = {}
    for f in found:
        alike.setdefault((f.severity, f.where, f.unit, f.advice, re.sub(r"[\d.,%]+", "", f.what)), []).append(f)
    return [
        dataclasses.replace(
            max(same, key=lambda f: f.cost),
            what=max(same, key=lambda f: f.cost).what + (f", and {len(same) - 1} more like it" if same[1:] else ""),
            cost=sum(f.cost for f in same),
        )
        for same in alike.values()
    ]


# --- collectives ------------------------------------------------------------------------------------------


def _collectives(analysis: Analysis, wanted: Expectations) -> Iterator[Finding]:
    for c in analysis.collectives:
        if c.wire_bytes > c.bytes and c.wire_bytes * c.runs > MIB:
            yield Finding(
                "note" if c.op == "reduce-scatter" else "warning",
                f"{c.op} over {_names(c.axes)} run as an {c.lowered} ({c.name}), which moves twice the bytes",
                _place(c),
                (c.wire_bytes - c.bytes) * c.runs,
                "bytes",
                f"gather over fewer mesh axes at once, give every chip a multiple of {LANES} of the sharded last "
                "dimension, or shard another dimension",
            )
    if wanted.collectives is None:
        return
    groups: dict[tuple, list[Collective]] = {}
    for c in analysis.collectives:
        groups.setdefault((c.op, c.axes), []).append(c)
    floor = SHARE * sum(wanted.collectives.values())
    for key, members in groups.items():
        total = sum(c.bytes * c.runs for c in members)
        expected = wanted.collectives.get(key, 0)
        if total - expected <= max(floor, SHARE * expected):
            continue
        worst = max(members, key=lambda c: c.bytes * c.runs)
        many = f" in {len(members)} places, the largest {worst.name}" if len(members) > 1 else f" ({worst.name})"
        what = f"unexpected {key[0]} over {_names(key[1])}" if not expected else f"{key[0]} over {_names(key[1])}"
        excess = "" if not expected else f" of {total:,.0f} bytes where {expected:,.0f} are expected"
        yield Finding(
            "warning",
            f"{what}{excess}{many}, {worst.dtype}",
            _place(worst),
            total - expected,
            "bytes",
            "constrain the operand to the sharding its reader needs, or add the axis to the layout",
        )
    for (op, axes), expected in wanted.collectives.items():
        if expected > floor and (op, axes) not in groups:
            yield Finding(
                "note",
                f"no {op} over {_names(axes)}, of which {expected:,.0f} bytes are expected",
                "the whole program",
                expected,
                "bytes",
                "the compiler chose another collective: look for it among the unexpected ones",
            )


# --- copies of the cache ----------------------------------------------------------------------------------


def _cache_copies(analysis: Analysis, wanted: Expectations) -> Iterator[Finding]:
    shapes = {(_squeezed(shape), dtype) for shape, dtype in wanted.caches}
    sizes = [hlo.Array(dtype, shape).nbytes for shape, dtype in wanted.caches]
    for o in analysis.operations if wanted.caches else ():
        array = max(o.arrays, key=lambda a: a.nbytes, default=None)
        if array is None or o.in_place or o.kind == "collective" or (o.kind == "prefetch" and array.space):
            continue
        same = (_squeezed(array.dims), array.dtype) in shapes
        if not same and (o.kind not in ("copy", "prefetch") or array.nbytes < min(sizes)):
            continue
        cost = array.nbytes * o.runs
        if o.kind == "prefetch" and o.operands[0].space:
            what = f"{o.name} writes {array} back whole from on-chip memory, as large as a cache"
            advice = "donate the cache; where donated, it is small enough to be moved on chip: harmless if hidden"
            yield Finding("note", what, _place(o), cost, "bytes", advice)
            continue
        advice = "donate the cache, update it in place and read it in the order it is stored"
        what = f"copy of the cache: {o.name} ({o.op}) writes {array}"
        if not same:
            what = f"{o.name} ({o.op}) copies {array}, as large as a cache"
        yield Finding("warning", what, _place(o), cost, "bytes", advice)


# --- tiles ------------------------------------------------------------------------------------------------


def _tiles(analysis: Analysis) -> Iterator[Finding]:
    named = [(name or "an argument", array, "argument " + name, 1.0) for name, array in analysis.parameters]
    named += [(o.name, array, _place(o), o.runs) for o in analysis.operations for array in o.arrays]
    for name, array, where, runs in named:
        waste = array.padded_nbytes - array.nbytes
        if array.nbytes <= MIB or array.padded_nbytes <= PADDING * array.nbytes:
            continue
        minor = [array.dims[d] for d in array.minor_to_major[:2]]
        yield Finding(
            "warning",
            f"{name} {array} takes {array.padded_nbytes / array.nbytes:.1f} times its bytes: its last dimensions in "
            f"memory, {' and '.join(map(str, reversed(minor)))}, are padded to tiles of {_tile(array)}",
            where,
            waste * runs,
            "bytes",
            f"order or merge dimensions so that the last is a multiple of {LANES} and the one before it of {SUBLANES}",
        )


# --- roofline ---------------------------------------------------------------------------------------------


def roofline_cycles(operation: Operation, chip: Chip, calibration: Calibration) -> float:
    """Cycles that one execution needs by the calibration's copy and matmul. Element-wise work on narrow types is
    held against the bfloat16 copy, whose limit is the vector unit; pure copies are not, they could be left out."""
    bits = max((a.bits for a in operation.arrays), default=32)
    vector = operation.kind == "compute" and not operation.flops and bits < 32
    moved = (operation.read + operation.written) / chip.hbm_bandwidth
    moved *= calibration.vector_clock if vector else calibration.copy_clock
    return max(moved, operation.flops / chip.peak_flops * calibration.matmul_clock) * chip.devices_per_chip


def _slow(analysis: Analysis, chip: Chip, calibration: Calibration) -> Iterator[Finding]:
    step = sum(analysis.cycles().values())
    for o in analysis.operations:
        need, spent = roofline_cycles(o, chip, calibration), o.cycles * o.runs
        if spent - need * o.runs <= SHARE * step or o.cycles <= SLOW * need:
            continue
        thin = [a for a in (*o.operands, *o.arrays) if a.nbytes > MIB and _thin(a)]
        advice = "look at the layouts of its operands, and at what it is fused with"
        if thin:
            worst = max(thin, key=lambda a: a.nbytes)
            advice = (
                f"{worst} lies in tiles of {_tile(worst)}, which fill {worst.tile[0]} of {SUBLANES} sublanes: "
                "keep its small dimension out of the last two (separate matrices instead of a fused one)"
            )
        elif o.kind == "copy":
            advice = "the copy changes a layout or takes a slice: store the array the way its reader wants it"
        yield Finding(
            "warning",
            f"{o.name} ({o.op}, {o.arrays[0] if o.arrays else ''}) takes {o.cycles / max(need, 1):.1f} times its "
            f"roofline and {spent / step:.0%} of the step",
            _place(o),
            spent,
            "cycles",
            advice,
        )


def _loops(analysis: Analysis) -> Iterator[Finding]:
    for name in analysis.unknown_loops:
        yield Finding(
            "note",
            f"{name} has no trip count in the text, so its body is counted once",
            name,
            0,
            "cycles",
            "loop over a known range",
        )


def _thin(array: hlo.Array) -> bool:
    return len(array.tile) == 2 and array.tile[0] < SUBLANES and math.prod(array.dims[:-1]) >= SUBLANES


def _tile(array: hlo.Array) -> str:
    return "x".join(map(str, array.tile))


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(s for s in shape if s > 1))


def _names(axes: tuple[str, ...]) -> str:
    return "".join(axes) or "no axis"


def _place(item: Operation | Collective) -> str:
    return " ".join(part for part in (item.source, item.op_name) if part) or item.name
