"""Compiled HLO text as a structure: tiled arrays, instructions, computations, loops and how often each runs.

Reads what `compiled.as_text()` prints for the TPU backend (the CPU's text parses too). Only the text is used, no
private module: the grammar is small, and both forms of source positions (stack-frame tables at the top, or
source_file/source_line in the metadata) and all forms of replica groups are read (`hlo_costs`).

    >>> module = parse(compiled.as_text())
    >>> module.runs()["region_0.body"]          # executions of a while body in one call of the program
    118.0
"""

import dataclasses
import functools
import math
import os
import re
from collections.abc import Iterator

from sharding.layout.rules import ShardingError

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result. `minor_to_major` and `tile` are () where the text has no layout;
    `space` 0 is HBM (other numbers are on-chip memories)."""

    dtype: str
    dims: tuple[int, ...]
    minor_to_major: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = 0

    @property
    def bits(self) -> int:
        """Bits of one element."""
        return _BITS[self.dtype] if self.dtype in _BITS else int(re.search(r"\d+", self.dtype)[0])

    @property
    def nbytes(self) -> int:
        """Bytes of the data, without padding."""
        return math.prod(self.dims) * self.bits // 8

    @property
    def padded_nbytes(self) -> int:
        """Bytes in memory: the minor-most dimensions rounded up to the first tile of the layout."""
        dims = list(self.dims)
        order = self.minor_to_major or tuple(reversed(range(len(dims))))
        for dim, size in zip(order, reversed(self.tile)):
            dims[dim] = -(-dims[dim] // size) * size
        return math.prod(dims) * self.bits // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `name = arrays op(operands), attributes`. `cycles` is the compiler's estimated_cycles (0: none)."""

    name: str
    op: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str  # what stands in the parentheses: a constant's value, a parameter's number
    attributes: str
    root: bool
    op_name: str
    source: str  # "file.py:12" or ""
    cycles: int

    @property
    def nbytes(self) -> int:
        """Bytes of all result arrays."""
        return sum(a.nbytes for a in self.arrays)

    def attribute(self, key: str) -> str:
        """The computation named by `key=%name`, or ""."""
        found = re.search(rf"[ ,]{key}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in the text's order."""

    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction whose value is returned."""
        return next(i for i in self.instructions.values() if i.root)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Parameter instructions by number."""
        return {int(i.literal): i for i in self.instructions.values() if i.op == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instructions that read each value."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                users[operand].append(instruction)
        return users


@dataclasses.dataclass(frozen=True)
class Call:
    """One computation run by an instruction. `fused`: its instructions are part of the caller's own cost."""

    computation: str
    times: float
    fused: bool = False


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str
    partitions: int

    @functools.cached_property
    def callers(self) -> dict[str, list[Instruction]]:
        """Instructions that run each computation, then their own callers, each with its asynchronous neighbours."""
        direct: dict[str, list[tuple[str, Instruction]]] = {}
        for computation in self.computations.values():
            for instruction in computation.instructions.values():
                for call in self.calls(computation, instruction):
                    direct.setdefault(call.computation, []).append((computation.name, instruction))
        found = {}
        for name, sites in direct.items():
            outer = [site for caller, _ in sites for site in direct.get(caller, [])]
            found[name] = [near for caller, i in sites + outer if i.op != "while" for near in self._near(caller, i)]
        return found

    def _near(self, name: str, instruction: Instruction) -> list[Instruction]:
        """An instruction and, where it starts something asynchronous, its operands' instructions and its readers."""
        computation, near = self.computations[name], [instruction]
        while near[-1].op.endswith(("-start", "-update")) and computation.users[near[-1].name]:
            near.append(computation.users[near[-1].name][0])
        given = [computation.instructions[n] for i in near[1:] for n in i.operands if i.op.endswith("-update")]
        return near + given + (computation.users[near[-1].name] if len(near) > 1 else [])

    def calls(self, caller: Computation, instruction: Instruction) -> list[Call]:
        """Computations that one execution of `instruction` runs; the scalar functions of reductions are left out."""
        if instruction.op == "while":
            trips = self.trip_count(caller, instruction)
            trips = 1 if trips is None else trips
            return [Call(instruction.attribute("body"), trips), Call(instruction.attribute("condition"), trips + 1)]
        if instruction.op == "fusion":
            return [Call(instruction.attribute("calls"), 1, fused=True)]
        if instruction.op in ("call", "call-start", "async-start"):
            return [Call(instruction.attribute("to_apply") or instruction.attribute("calls"), 1)]
        if instruction.op == "conditional":  # one branch runs: the first is as good as any, all are counted
            names = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", instruction.attributes)
            listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
            names += [n.strip().lstrip("%") for n in listed[1].split(",")] if listed else []
            return [Call(name, 1) for name in names]
        return []

    def runs(self) -> dict[str, float]:
        """Executions of every computation in one run of the program, loops unrolled. A loop whose trip count is
        not in the text counts once (`unknown_loops` lists it); every branch of a conditional counts."""
        return dict(self._walk(fused=True))

    def executed(self) -> Iterator[tuple[Computation, Instruction, float]]:
        """(computation, instruction, executions) of everything but what lies inside fusions."""
        for name, times in self._walk(fused=False).items():
            for instruction in self.computations[name].instructions.values():
                yield self.computations[name], instruction, times

    def inside(self, computation: Computation) -> Iterator[tuple[Computation, Instruction]]:
        """(computation, instruction) of a fused computation and of those nested in it."""
        for instruction in computation.instructions.values():
            yield computation, instruction
            if instruction.op == "fusion":
                yield from self.inside(self.computations[instruction.attribute("calls")])

    def place(self, computation: Computation, instruction: Instruction) -> tuple[str, str]:
        """(op_name, source line): the instruction's own, else its fused body's, operands', readers' or callers'."""
        near = [instruction]
        if instruction.op == "fusion":
            body = self.computations[instruction.attribute("calls")]
            near += [i for _, i in self.inside(body) if i.op not in ("parameter", "constant")]
        near += [computation.instructions[name] for name in instruction.operands]
        near += computation.users[instruction.name] + self.callers.get(computation.name, [])
        return next((i.op_name for i in near if i.op_name), ""), next((i.source for i in near if i.source), "")

    def _walk(self, fused: bool) -> dict[str, float]:
        runs: dict[str, float] = {}
        stack = [(self.entry, 1.0)]
        while stack:
            name, times = stack.pop()
            runs[name] = runs.get(name, 0) + times
            computation = self.computations[name]
            for instruction in computation.instructions.values():
                for call in self.calls(computation, instruction):
                    if fused or not call.fused:
                        stack.append((call.computation, times * call.times))
        return runs

    def unknown_loops(self) -> list[str]:
        """Names of the while instructions whose trip count the text does not tell."""
        reached = self.runs()
        return [
            i.name
            for c in self.computations.values()
            if c.name in reached
            for i in c.instructions.values()
            if i.op == "while" and self.trip_count(c, i) is None
        ]

    def trip_count(self, caller: Computation, loop: Instruction) -> int | None:
        """Iterations of a while: the compiler's known_trip_count, or from `counter < constant` in its condition;
        None where neither tells."""
        known = re.search(r'"?known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes)
        if known:
            return int(known[1])
        bound = self._condition(loop)
        if bound is None:
            return None
        index, limit, direction = bound
        limit = limit if isinstance(limit, int) else self._initial(caller, loop, limit[0])
        start, step = self._initial(caller, loop, index), self._step(loop, index)
        if None in (start, limit, step) or step == 0:
            return None
        distance = limit - start + (step > 0) * (direction == "LE") - (step < 0) * (direction == "GE")
        return max(0, -(-distance // step))

    def _condition(self, loop: Instruction) -> tuple | None:
        """(counter's place in the tuple, limit: an int or (place,), direction) of the loop's condition."""
        condition = self.computations[loop.attribute("condition")]
        compare, sides = condition.root, list(condition.root.operands)
        scopes = [condition, condition]
        if compare.op == "fusion":
            inner = self.computations[compare.attribute("calls")]
            numbers = {p.name: n for n, p in inner.parameters.items()}
            outer, compare = compare.operands, inner.root
            sides = [outer[numbers[s]] if s in numbers else s for s in compare.operands]
            scopes = [condition if s in numbers else inner for s in compare.operands]
        direction = re.search(r"direction=(\w+)", compare.attributes)
        if compare.op != "compare" or not direction:
            return None
        values = [_origin(scope, side) for scope, side in zip(scopes, sides)]
        order = direction[1]
        if isinstance(values[0], int):
            values, order = values[::-1], {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(order, order)
        if not isinstance(values[0], tuple) or values[1] is None:
            return None
        if isinstance(values[1], tuple):  # the limit is carried too: it must come back unchanged
            if self._step(loop, values[1][0]) != 0:
                return None
            return values[0][0], values[1], order
        return values[0][0], values[1], order

    def _initial(self, caller: Computation, loop: Instruction, index: int) -> int | None:
        """The constant that the carried value `index` starts from."""
        start = caller.instructions[loop.operands[0]]
        while start.op in ("copy", "bitcast") and start.operands:
            start = caller.instructions[start.operands[0]]
        value = _origin(caller, start.operands[index]) if start.op == "tuple" else None
        return value if isinstance(value, int) else None

    def _step(self, loop: Instruction, index: int) -> int | None:
        """What one iteration adds to the carried value `index`."""
        body = self.computations[loop.attribute("body")]
        if body.root.op != "tuple":
            return None
        name = body.root.operands[index]
        if _origin(body, name) == (index,):
            return 0
        value, scope, outer = body.instructions[name], body, None
        while value.op == "copy":
            value = body.instructions[value.operands[0]]
        if value.op == "fusion":
            scope = self.computations[value.attribute("calls")]
            numbers = {p.name: n for n, p in scope.parameters.items()}
            outer, value = (value.operands, numbers), scope.root
        if value.op != "add":
            return None
        sides = [
            _origin(body, outer[0][outer[1][s]]) if outer and s in outer[1] else _origin(scope, s)
            for s in value.operands
        ]
        steps = [s for s in sides if isinstance(s, int)]
        return steps[0] if len(steps) == 1 and (index,) in sides else None


def _origin(scope: Computation, name: str) -> int | tuple[int] | None:
    """What a scalar is: an int constant, (place in the loop's tuple,), or None."""
    value = scope.instructions[name]
    while value.op in ("copy", "bitcast", "convert"):
        value = scope.instructions[value.operands[0]]
    if value.op == "constant":
        return int(value.literal) if re.fullmatch(r"-?\d+", value.literal) else None
    if value.op == "get-tuple-element" and scope.instructions[value.operands[0]].op == "parameter":
        return (int(re.search(r"index=(\d+)", value.attributes)[1]),)
    return None


# --- text -------------------------------------------------------------------------------------------------

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,<=]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_NO_ESTIMATE = 1 << 62  # SparseCore operations print -1 as an unsigned number
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')


def parse(text: str) -> Module:
    """The Module of a program's text. Raises ShardingError where it holds no ENTRY computation."""
    frames = _stack_frames(text)
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header:
                current = (header[2], {})
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            computations[current[0]] = Computation(*current)
            current = None
        elif " = " in line:
            instruction = _instruction(line.strip(), frames)
            current[1][instruction.name] = instruction
    if not entry:
        raise ShardingError("the text holds no ENTRY computation; pass the whole of compiled.as_text().")
    partitions = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a shape, tuples flattened."""
    found = []
    for dtype, dims, order, layout in _ARRAY.findall(text):
        tile = re.search(r"T\(([\d,]+)\)", layout)
        space = re.search(r"S\((\d+)\)", layout)
        found.append(
            Array(
                dtype=dtype,
                dims=ints(dims.replace("<=", "")),
                minor_to_major=ints(order),
                tile=ints(tile[1]) if tile else (),
                space=int(space[1]) if space else 0,
            )
        )
    return tuple(found)


def _instruction(line: str, frames: dict[int, str]) -> Instruction:
    root = line.startswith("ROOT ")
    name, rest = line.removeprefix("ROOT ").split(" = ", 1)
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    op, opening = rest[: rest.index("(")], rest.index("(")
    closing = _closing(rest, opening)
    inside, attributes = rest[opening + 1 : closing], rest[closing + 1 :]
    plain = op in ("constant", "parameter")
    metadata = re.search(r"metadata=\{((?:[^{}\"]|\"(?:[^\"\\]|\\.)*\")*)\}", attributes)
    op_name, source = _position(metadata[1] if metadata else "", frames)
    cycles = _CYCLES.search(attributes)
    return Instruction(
        name=name.lstrip("%"),
        op=op,
        arrays=arrays(shape),
        operands=() if plain else tuple(re.findall(r"%([\w.\-]+)", inside)),
        literal=inside if plain else "",
        attributes=attributes,
        root=root,
        op_name=op_name,
        source=source,
        cycles=int(cycles[1]) if cycles and int(cycles[1]) < _NO_ESTIMATE else 0,
    )


def _position(metadata: str, frames: dict[int, str]) -> tuple[str, str]:
    op_name = re.search(r'op_name="((?:[^"\\]|\\.)*)"', metadata)
    frame = re.search(r"stack_frame_id=(\d+)", metadata)
    file = re.search(r'source_file="([^"]*)"', metadata)
    line = re.search(r"source_line=(\d+)", metadata)
    source = frames.get(int(frame[1]), "") if frame else f"{_short(file[1])}:{line[1]}" if file and line else ""
    return op_name[1] if op_name else "", source


def _stack_frames(text: str) -> dict[int, str]:
    """stack_frame_id -> "file:line" from the tables that newer versions print before the computations."""
    head = text[: text.find("\n%")] if "\nStackFrames" in text else ""
    files = {int(n): _short(f) for n, f in re.findall(r'^(\d+) "(.*)"$', head.partition("FunctionNames")[0], re.M)}
    located = re.findall(r"^(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)", head, re.M)
    places = {int(n): f"{files.get(int(f), '')}:{line}" for n, f, line in located}
    framed = re.findall(r"^(\d+) \{file_location_id=(\d+)", head, re.M)
    return {int(n): places.get(int(place), "") for n, place in framed}


def _short(path: str) -> str:
    """A source path from the working directory or the installed packages on; others whole."""
    here = os.getcwd() + os.sep
    return path.removeprefix(here) if path.startswith(here) else path.rpartition("/site-packages/")[2]


def _closing(text: str, opening: int) -> int:
    """Where the bracket at `opening` closes; quoted text is skipped."""
    depth, quoted = 0, False
    for at in range(opening, len(text)):
        c = text[at]
        if c == '"' and text[at - 1] != "\\":
            quoted = not quoted
        elif not quoted:
            depth += (c == "(") - (c == ")")
            if depth == 0:
                return at
    raise ShardingError(f"unbalanced brackets in the HLO line {text[:80]!r}.")


def ints(text: str) -> tuple[int, ...]:
    """Comma-separated integers."""
    return tuple(int(i) for i in text.split(",") if i)
