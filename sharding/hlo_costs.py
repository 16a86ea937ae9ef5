"""What a compiled program costs by its own text: collectives with bytes and mesh axes, and every operation's
cycles, bytes and FLOPs, loops multiplied out.

Bytes of a collective are per chip, by the convention of Pope et al., arXiv 2211.05102, section 3.1 (no (K-1)/K):
all-gather its output, reduce-scatter its input, all-reduce twice its input (a reduce-scatter and an all-gather),
all-to-all and collective-permute the chip's shard.

The TPU compiler rewrites collectives. Two rewrites are undone, so that a program is counted by what it means, and
kept visible in `lowered`: an all-gather run as an all-reduce over zeros with the shard written into them, and a
reduce-scatter run as an all-reduce of which a slice is used. Both move twice the bytes (`wire_bytes`). Its
"all-reduce-scatter" fusions are real reduce-scatters.

    >>> analyse(compiled.as_text(), {"x": 4, "y": 4, "z": 4}).collectives[0]
    Collective(op='all-gather', axes=('y', 'z'), dtype='bf16', group=16, bytes=589824, runs=118.0, ...)
"""

import dataclasses
import math
import re

import numpy as np

from sharding import hlo
from sharding.rules import ShardingError

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
COPIES = ("copy", "transpose", "copy-start", "slice-start", "copy-done", "slice-done")
_PREFETCH = ("copy-start", "slice-start")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction. `bytes` per chip and execution, `runs` executions in one call of the program,
    `axes` the mesh axes over which a group's members differ, `group` chips per group."""

    name: str
    op: str
    axes: tuple[str, ...]
    dtype: str
    group: int
    bytes: int
    runs: float
    lowered: str  # the operation really run: all-reduce where the compiler rewrote op
    op_name: str
    source: str

    @property
    def wire_bytes(self) -> int:
        """`bytes` of the operation really run."""
        return self.bytes * (2 if self.lowered == "all-reduce" != self.op else 1)


@dataclasses.dataclass(frozen=True)
class Operation:
    """One instruction outside fusions. Per execution: the compiler's `cycles`, `read` and `written` bytes of data
    (a slice of a stacked operand counts as the slice, an in-place update as the update), matmul `flops`."""

    name: str
    op: str
    kind: str  # compute | copy | collective | prefetch
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
    runs = module.runs()
    collectives = [
        _collective(module, c, i, runs[c.name], mesh_shape)
        for c in module.computations.values()
        if c.name in runs
        for i in c.instructions.values()
        if i.op.removesuffix("-start") in COLLECTIVES
    ]
    operations = [_operation(module, c, i, times) for c, i, times in module.executed() if i.op not in _FREE]
    entry = module.computations[module.entry]
    parameters = tuple((p.op_name, p.arrays[0]) for _, p in sorted(entry.parameters.items()) if len(p.arrays) == 1)
    return Analysis(tuple(collectives), tuple(operations), parameters, tuple(module.unknown_loops()))


_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call partition-id replica-id "
    "after-all copy-done slice-done async-done async-update call-done call-update call-start async-start "
    "all-gather-done all-reduce-done collective-permute-done".split()
)


# --- collectives ------------------------------------------------------------------------------------------


def _collective(module, computation, instruction, runs: float, mesh_shape: dict[str, int]) -> Collective:
    lowered = instruction.op.removesuffix("-start")
    sources = [computation.instructions[name].arrays for name in instruction.operands]
    sent = [a for group in sources for a in group]
    if lowered == "collective-permute" and "slice_sizes=" in instruction.attributes:
        sizes = re.search(r"slice_sizes=\{+([\d,]*)", instruction.attributes)[1]
        sent = [dataclasses.replace(sent[0], dims=tuple(int(s) for s in sizes.split(",")))]
    axes, group = _axes(instruction, mesh_shape)
    op = _meaning(module, computation, instruction) if lowered == "all-reduce" else lowered
    factor = group if lowered == "all-gather" else 2 if op == "all-reduce" else 1
    in_scatter_fusion = op == "reduce-scatter" and computation.name.startswith("all-reduce-scatter")
    op_name, source = _where(module, computation, instruction)
    return Collective(
        name=instruction.name,
        op=op,
        axes=axes,
        dtype=max(sent, key=lambda a: a.nbytes).dtype,
        group=group,
        bytes=factor * sum(a.nbytes for a in sent),
        runs=runs,
        lowered="reduce-scatter" if in_scatter_fusion else lowered,
        op_name=op_name,
        source=source,
    )


def _meaning(module: hlo.Module, computation: hlo.Computation, reduce: hlo.Instruction) -> str:
    """all-gather, reduce-scatter or all-reduce: what an all-reduce is for."""
    if len(reduce.operands) != 1:
        return "all-reduce"
    value = computation.instructions[reduce.operands[0]]
    scope = computation
    if value.op == "fusion":
        scope = module.computations[value.attribute("calls")]
        value = scope.root
    if value.op == "dynamic-update-slice" and _is_zeros(scope, value.operands[0]):
        return "all-gather"
    return "reduce-scatter" if _only_sliced(module, computation, reduce.name) else "all-reduce"


def _is_zeros(computation: hlo.Computation, name: str) -> bool:
    value = computation.instructions[name]
    while value.op in ("broadcast", "copy", "bitcast"):
        value = computation.instructions[value.operands[0]]
    return value.op == "constant" and value.literal == "0"


def _only_sliced(module: hlo.Module, computation: hlo.Computation, name: str) -> bool:
    """Whether every reader of a value takes a dynamic slice of it, so that the chip keeps a shard."""
    users = computation.users[name]
    return bool(users) and all(
        (u.op == "dynamic-slice" and u.operands[0] == name)
        or (u.op in ("bitcast", "all-reduce-done") and _only_sliced(module, computation, u.name))
        or (u.op == "fusion" and all(_only_sliced(*place) for place in _inside(module, u, name)))
        for u in users
    )


def _inside(module: hlo.Module, fusion: hlo.Instruction, name: str):
    inner = module.computations[fusion.attribute("calls")]
    return [(module, inner, inner.parameters[n].name) for n, o in enumerate(fusion.operands) if o == name]


def _axes(instruction: hlo.Instruction, mesh_shape: dict[str, int]) -> tuple[tuple[str, ...], int]:
    """Mesh axes along which the members of a group differ, and the group's size."""
    shape = tuple(mesh_shape.values())
    if instruction.op.startswith("collective-permute"):
        pairs = re.search(r"source_target_pairs=(\{\{.*?\}\})", instruction.attributes)
        groups = _explicit(pairs[1]) if pairs else []
        size = 0
    else:
        groups = replica_groups(instruction.attributes, math.prod(shape))
        size = len(groups[0])
    varying = set()
    for group in groups:
        coordinates = np.array(np.unravel_index(np.asarray(group), shape))
        varying |= set(np.flatnonzero((coordinates != coordinates[:, :1]).any(axis=1)))
    axes = tuple(name for n, name in enumerate(mesh_shape) if n in varying)
    return axes, size or math.prod(mesh_shape[a] for a in axes)


def replica_groups(attributes: str, devices: int) -> list[list[int]]:
    """The groups of `replica_groups=`, in any of XLA's forms:

        {{0,1},{2,3}}    [2,2]<=[4]    [2,2]<=[2,2]T(1,0)    mesh['x'=2,'y'=2] {'y'}
        mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}    {} (all devices)

    Raises ShardingError for anything else.
    """
    text = attributes.partition("replica_groups=")[2]
    if text.startswith("{{"):
        return _explicit(text)
    if text.startswith("{}") or not text:
        return [list(range(devices))]
    iota = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        return _iota(iota[2], iota[3]).reshape(_numbers(iota[1])).tolist()
    mesh = re.match(r"mesh\[([^\]]*)\](?:, device_ids=\((.*?)\)(?= \{))? \{([^}]*)\}", text)
    if mesh and ":(" not in mesh[3]:
        names = re.findall(r"'([^']*)'=(\d+)", mesh[1])
        sizes = [int(size) for _, size in names]
        order = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", mesh[2]) if mesh[2] else None
        if not mesh[2]:
            ids = np.arange(math.prod(sizes))
        elif order:
            ids = _iota(order[1], order[2])
        else:
            ids = np.array(_numbers(mesh[2].strip("{}[]")))
        ids, chosen = ids.reshape(sizes), re.findall(r"'([^']*)'", mesh[3])
        kept = [n for n, (name, _) in enumerate(names) if name not in chosen]
        inner = [n for n, (name, _) in enumerate(names) if name in chosen]
        return ids.transpose(kept + inner).reshape(-1, math.prod(sizes[n] for n in inner)).tolist()
    raise ShardingError(f"replica_groups={text[:60]} is in a form this version does not read.")


def _iota(dims: str, order: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return ids.transpose(_numbers(order)).reshape(-1) if order else ids.reshape(-1)


def _explicit(text: str) -> list[list[int]]:
    groups = text[1 : text.index("}}") + 1]
    return [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", groups)]


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n.strip()]


# --- operations -------------------------------------------------------------------------------------------


def _operation(module, computation, instruction, runs: float) -> Operation:
    operands = tuple(a for name in instruction.operands for a in computation.instructions[name].arrays)
    read, written = sum(a.nbytes for a in operands), instruction.nbytes
    in_place, flops = instruction.op == "dynamic-update-slice", 0
    if instruction.op == "fusion":
        inner = module.computations[instruction.attribute("calls")]
        read = sum(_read(module, inner, number) for number in inner.parameters)
        written, in_place = _written(module, inner)
        flops = sum(_flops(c, i) for c in _fused(module, inner) for i in c.instructions.values())
    elif in_place:
        written = computation.instructions[instruction.operands[1]].nbytes
        read = written
    elif instruction.op == "dynamic-slice":
        read = written
    else:
        flops = _flops(computation, instruction)
    if instruction.op in _PREFETCH:  # the result tuple holds destination, source and a semaphore
        read = written = instruction.arrays[0].nbytes
    op_name, source = _where(module, computation, instruction)
    return Operation(
        name=instruction.name,
        op=instruction.op,
        kind=_kind(module, instruction, flops),
        cycles=instruction.cycles,
        runs=runs,
        read=read,
        written=written,
        flops=flops,
        arrays=instruction.arrays,
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
    if instruction.op == "fusion" and not flops:
        inside = {
            i.op
            for c in _fused(module, module.computations[instruction.attribute("calls")])
            for i in c.instructions.values()
        }
        if inside & set(COLLECTIVES):
            return "collective"
        if inside <= _MOVES:
            return "copy"
    return "compute"


_MOVES = frozenset("parameter constant bitcast copy transpose reshape fusion dynamic-slice slice tuple".split())


def _fused(module: hlo.Module, computation: hlo.Computation):
    """A fused computation and those nested in it."""
    yield computation
    for instruction in computation.instructions.values():
        if instruction.op == "fusion":
            yield from _fused(module, module.computations[instruction.attribute("calls")])


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
        contracted = _numbers(re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)[1])
        return 2 * math.prod(out.dims) * math.prod(left.dims[d] for d in contracted)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    total = 2 * right.dims[labels[2].index("i")]
    total *= out.dims[labels[3].index("b")] * out.dims[labels[3].index("f")]
    for digit in sorted(set(labels[3]) & set("0123456789")):
        at = int(digit)
        window = {k: _window(instruction.attributes, k, at) for k in ("stride", "pad", "lhs_dilate", "rhs_dilate")}
        total *= _touched(
            left.dims[labels[1].index(digit)], right.dims[labels[2].index(digit)], out.dims[labels[3].index(digit)],
            stride=int(window["stride"] or 1), pad=int((window["pad"] or "0_0").split("_")[0]),
            dilate=int(window["lhs_dilate"] or 1), spread=int(window["rhs_dilate"] or 1),
        )  # fmt: skip
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


def _where(module: hlo.Module, computation: hlo.Computation, instruction: hlo.Instruction) -> tuple[str, str]:
    """(op_name, source line): the instruction's own, else its fused body's, its operands', its readers' or its callers'."""
    near = [instruction]
    if instruction.op == "fusion":
        near += [i for c in _fused(module, module.computations[instruction.attribute("calls")])
                 for i in c.instructions.values() if i.op not in ("parameter", "constant")]  # fmt: skip
    near += [computation.instructions[name] for name in instruction.operands]
    near += computation.users[instruction.name]
    near += module.callers.get(computation.name, [])
    named = next((i.op_name for i in near if i.op_name), "")
    return named, next((i.source for i in near if i.source), "")
