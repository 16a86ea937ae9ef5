"""What a compiled program costs by its own text: collectives with bytes and mesh axes, and every operation's
cycles, bytes and FLOPs, loops multiplied out.

    >>> analyse(compiled.as_text(), {"x": 4, "y": 4, "z": 4}).collectives[0]
    Collective(op='all-gather', axes=('y', 'z'), dtype='bf16', group=16, bytes=589824, runs=118.0, ...)
"""

import dataclasses
import math
import re

import numpy as np

from sharding.compiler import hlo, hlo_collectives
from sharding.compiler.hlo_collectives import COLLECTIVES, Collective
from sharding.layout.rules import ShardingError

COPIES = ("copy", "transpose", "copy-start", "slice-start", "copy-done", "slice-done")
_PREFETCH = ("copy-start", "slice-start")


@dataclasses.dataclass(frozen=True)
class Operation:
    """One instruction outside fusions. Per execution: the compiler's `cycles`, `read` and `written` bytes of data
    (a slice of a stacked operand counts as the slice, an in-place update as the update), matmul `flops`."""

    name: str
    op: str
    kind: str  # compute | copy | collective | prefetch | kernel (Pallas: no cycles from the compiler)
    cycles: int
    runs: float
    read: int
    written: int
    flops: int
    arrays: tuple[hlo.Array, ...]
    operands: tuple[hlo.Array, ...]
    in_place: bool
    op_name: str
    source: str


@dataclasses.dataclass(frozen=True)
class Analysis:
    """A whole program. `unknown_loops` are counted as one iteration."""

    collectives: tuple[Collective, ...]
    operations: tuple[Operation, ...]
    parameters: tuple[tuple[str, hlo.Array], ...]  # (argument name, per-chip array) of the entry
    unknown_loops: tuple[str, ...]

    def cycles(self) -> dict[str, float]:
        """Estimated cycles of one call by kind, loops multiplied out. Collectives and asynchronous copies carry
        no estimate from the compiler: see `wire_bytes` and `prefetched_bytes`."""
        totals = dict.fromkeys(("compute", "copy", "collective"), 0.0)
        for o in self.operations:
            if o.kind in totals:
                totals[o.kind] += o.cycles * o.runs
        return totals

    def kernel_bytes(self) -> float:
        """Bytes that Pallas kernels are given and write: their floor, as the compiler estimates no cycles for them."""
        return sum((o.read + o.written) * o.runs for o in self.operations if o.kind == "kernel")

    def prefetched_bytes(self) -> float:
        """Bytes moved by asynchronous copies, of which the compiler gives no cycles."""
        return sum(o.written * o.runs for o in self.operations if o.kind == "prefetch")


def analyse(text: str, mesh_shape: dict[str, int]) -> Analysis:
    """The Analysis of `compiled.as_text()` on a mesh of these named sizes, in the mesh's order.

    Raises ShardingError: not HLO text, a mesh of another size than the program, unreadable replica groups.
    """
    module = hlo.parse(text)
    chips = math.prod(mesh_shape.values())
    if module.partitions not in (1, chips):
        raise ShardingError(
            f"the program is for {module.partitions} devices and the mesh {mesh_shape} has {chips}; "
            "pass the mesh it was compiled for."
        )
    operations = [_operation(module, c, i, times) for c, i, times in module.executed() if i.op not in _FREE]
    entry = module.computations[module.entry]
    parameters = tuple((p.op_name, p.arrays[0]) for _, p in sorted(entry.parameters.items()) if len(p.arrays) == 1)
    return Analysis(
        hlo_collectives.find(module, mesh_shape), tuple(operations), parameters, tuple(module.unknown_loops())
    )


_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call partition-id replica-id "
    "after-all copy-done slice-done async-done async-update call-done call-update call-start async-start "
    "all-gather-done all-reduce-done collective-permute-done".split()
)


# --- operations -------------------------------------------------------------------------------------------


def _operation(module, computation, instruction, runs: float) -> Operation:
    operands = tuple(a for name in instruction.operands for a in computation.instructions[name].arrays)
    read, written = sum(a.nbytes for a in operands), instruction.nbytes
    in_place, flops = instruction.op == "dynamic-update-slice", 0
    if instruction.op == "fusion":
        inner = module.computations[instruction.attribute("calls")]
        read = sum(_read(module, inner, number) for number in inner.parameters)
        written, in_place = _written(module, inner)
        flops = sum(_flops(c, i) for c, i in module.inside(inner))
    elif in_place:
        written = computation.instructions[instruction.operands[1]].nbytes
        read = written
    elif instruction.op == "dynamic-slice":
        read = written
    else:
        flops = _flops(computation, instruction)
    arrays = instruction.arrays
    if instruction.op in _PREFETCH:  # (destination, source, semaphore) or ((source), destination, semaphore)
        arrays = arrays[:1] if instruction.op == "copy-start" else arrays[1:2]
        read = written = arrays[0].nbytes
    op_name, source = module.place(computation, instruction)
    return Operation(
        name=instruction.name,
        op=instruction.op,
        kind=_kind(module, instruction, flops),
        cycles=instruction.cycles,
        runs=runs,
        read=read,
        written=written,
        flops=flops,
        arrays=arrays,
        operands=operands,
        in_place=in_place,
        op_name=op_name,
        source=source,
    )


def _kind(module: hlo.Module, instruction: hlo.Instruction, flops: int) -> str:
    if instruction.op.removesuffix("-start") in COLLECTIVES:
        return "collective"
    if instruction.op in _PREFETCH:
        return "prefetch"
    if instruction.op in COPIES:
        return "copy"
    if instruction.op == "custom-call" and 'custom_call_target="tpu_custom_call"' in instruction.attributes:
        return "kernel"
    if instruction.op == "fusion" and not flops:
        body = module.computations[instruction.attribute("calls")]
        inside = {i.op for _, i in module.inside(body)}
        if inside & set(COLLECTIVES):
            return "collective"
        if inside <= _MOVES:
            return "copy"
    return "compute"


_MOVES = frozenset("parameter constant bitcast copy transpose reshape fusion dynamic-slice slice tuple".split())


def _read(module: hlo.Module, computation: hlo.Computation, number: int) -> int:
    """Bytes a fusion reads of its parameter: what its slices take, where it takes nothing else."""
    parameter = computation.parameters[number]
    return min(_taken(module, computation, parameter.name), parameter.nbytes)


def _taken(module: hlo.Module, computation: hlo.Computation, name: str) -> int:
    total, whole = 0, computation.instructions[name].nbytes
    for user in computation.users[name]:
        if user.op in ("dynamic-slice", "slice") and user.operands[0] == name:
            total += user.nbytes
        elif user.op == "dynamic-update-slice" and user.operands[0] == name:
            continue  # updated in place
        elif _renames(module, user):
            total += _taken(module, computation, user.name) if computation.users[user.name] else whole
        elif user.op == "fusion":
            total += sum(_read(module, *place) for place in _places(module, user, name))
        else:
            total += whole
    return total


def _renames(module: hlo.Module, value: hlo.Instruction) -> bool:
    """Whether `value` is its operand under another layout or shape: a bitcast, or a fusion of nothing but those."""
    if value.op != "fusion" or len(value.operands) != 1:
        return value.op == "bitcast"
    inside = module.computations[value.attribute("calls")].instructions.values()
    return all(i.op in ("parameter", "bitcast", "copy") for i in inside)


def _places(module, fusion, name):
    inner = module.computations[fusion.attribute("calls")]
    return [(inner, n) for n, operand in enumerate(fusion.operands) if operand == name]


def _written(module: hlo.Module, computation: hlo.Computation) -> tuple[int, bool]:
    """(bytes a fusion writes, whether it updates an operand in place)."""
    roots = [computation.root]
    if roots[0].op == "tuple":
        roots = [computation.instructions[name] for name in roots[0].operands]
    total, in_place = 0, False
    for root in roots:
        while root.op == "bitcast":
            root = computation.instructions[root.operands[0]]
        if root.op == "dynamic-update-slice":
            total, in_place = total + computation.instructions[root.operands[1]].nbytes, True
        elif root.op == "fusion":
            inner = _written(module, module.computations[root.attribute("calls")])
            total, in_place = total + inner[0], in_place or inner[1]
        else:
            total += root.nbytes
    return total, in_place


def _flops(computation: hlo.Computation, instruction: hlo.Instruction) -> int:
    """2 x multiply-adds of a dot or convolution that touch real (not padded, not dilated) elements."""
    if instruction.op not in ("dot", "convolution"):
        return 0
    left, right = (computation.instructions[name].arrays[0] for name in instruction.operands[:2])
    out = instruction.arrays[0]
    if instruction.op == "dot":
        contracted = hlo.ints(re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)[1])
        return 2 * math.prod(out.dims) * math.prod(left.dims[d] for d in contracted)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    total = 2 * right.dims[labels[2].index("i")]
    total *= out.dims[labels[3].index("b")] * out.dims[labels[3].index("f")]
    for digit in sorted(set(labels[3]) & set("0123456789")):
        at = int(digit)
        window = {k: _window(instruction.attributes, k, at) for k in ("stride", "pad", "lhs_dilate", "rhs_dilate")}
        total *= _touched(
            left.dims[labels[1].index(digit)],
            right.dims[labels[2].index(digit)],
            out.dims[labels[3].index(digit)],
            stride=int(window["stride"] or 1),
            pad=int((window["pad"] or "0_0").split("_")[0]),
            dilate=int(window["lhs_dilate"] or 1),
            spread=int(window["rhs_dilate"] or 1),
        )
    return total


def _window(attributes: str, key: str, at: int) -> str:
    window = re.search(r"window=\{([^}]*)\}", attributes)
    found = re.search(rf"(?:^| ){key}=(\S+)", window[1]) if window else None
    return found[1].split("x")[at] if found else ""


def _touched(size: int, kernel: int, out: int, *, stride: int, pad: int, dilate: int, spread: int) -> int:
    """(output, kernel) positions of one spatial dimension that meet an input element."""
    starts, total = np.arange(out) * stride - pad, 0
    for tap in range(kernel):
        at = starts + tap * spread
        total += int(((at >= 0) & (at <= (size - 1) * dilate) & (at % dilate == 0)).sum())
    return total
