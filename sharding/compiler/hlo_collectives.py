"""The collectives of a compiled program: bytes per chip, executions, mesh axes, and what each was meant to be.

Bytes are per chip, by the convention of Pope et al., arXiv 2211.05102, section 3.1 (no (K-1)/K): all-gather its
output, reduce-scatter its input, all-reduce twice its input (a reduce-scatter and an all-gather), all-to-all and
collective-permute the chip's shard.

The TPU compiler rewrites collectives. Two rewrites are undone, so that a program is counted by what it means, and
kept visible in `lowered`: an all-gather run as an all-reduce over zeros with the shard written into them, and a
reduce-scatter run as an all-reduce of which a slice is used. Both move twice the bytes (`wire_bytes`). Its
"all-reduce-scatter" fusions are real reduce-scatters.
"""

import dataclasses
import math
import re

import numpy as np

from sharding.compiler import hlo
from sharding.layout.rules import ShardingError

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


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


def find(module: hlo.Module, mesh_shape: dict[str, int]) -> tuple[Collective, ...]:
    """Every collective that `module` runs, asynchronous ones once, at their start.

    Raises ShardingError for replica groups in an unknown form.
    """
    runs = module.runs()
    return tuple(
        _collective(module, c, i, runs[c.name], mesh_shape)
        for c in module.computations.values()
        if c.name in runs
        for i in c.instructions.values()
        if i.op.removesuffix("-start") in COLLECTIVES
    )


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
    op_name, source = module.place(computation, instruction)
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
    value, scope, outer = computation.instructions[reduce.operands[0]], computation, {}
    if value.op == "fusion":
        scope = module.computations[value.attribute("calls")]
        outer = {parameter.name: value.operands[n] for n, parameter in scope.parameters.items()}
        value = scope.root
    if value.op == "dynamic-update-slice":
        into = value.operands[0]
        if _is_zeros(computation, outer[into]) if into in outer else _is_zeros(scope, into):
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
        return _iota(iota[2], iota[3]).reshape(hlo.ints(iota[1])).tolist()
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
            ids = np.array(hlo.ints(mesh[2].strip("{}[]")))
        ids, chosen = ids.reshape(sizes), re.findall(r"'([^']*)'", mesh[3])
        kept = [n for n, (name, _) in enumerate(names) if name not in chosen]
        inner = [n for n, (name, _) in enumerate(names) if name in chosen]
        return ids.transpose(kept + inner).reshape(-1, math.prod(sizes[n] for n in inner)).tolist()
    raise ShardingError(f"replica_groups={text[:60]} is in a form this version does not read.")


def _iota(dims: str, order: str | None) -> np.ndarray:
    ids = np.arange(math.prod(hlo.ints(dims))).reshape(hlo.ints(dims))
    return ids.transpose(hlo.ints(order)).reshape(-1) if order else ids.reshape(-1)


def _explicit(text: str) -> list[list[int]]:
    groups = text[1 : text.index("}}") + 1]
    return [list(hlo.ints(group)) for group in re.findall(r"\{([\d,]*)\}", groups)]
