"""safetensors files, read and written one tensor at a time.

A file is an 8-byte little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}` and the
bytes of the tensors back to back. Nothing in the header is believed before it is checked against the file's
size, so a truncated or altered file costs a `UserError`, never a crash and never memory beyond that size; a
tensor's bytes are read only when asked for, so loading a model holds one tensor beside its parameters.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from kvattn.errors import UserError

DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
WIDTHS = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8, "F64": 8}
WIDTHS |= {"F8_E4M3": 1, "F8_E5M2": 1, **{name: dtype.itemsize for name, dtype in DTYPES.items()}}
MAX_HEADER_BYTES = 32 << 20
MAX_RANK = 8
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `offset` and `nbytes` in `file`, already checked against the file's size."""

    name: str
    file: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Pending:
    """A tensor to be written: its shape and dtype now, its values only when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_json(path: pathlib.Path, limit: int) -> dict[str, Any]:
    """The object in a JSON file of at most `limit` bytes. Raises UserError for anything else."""
    try:
        if path.stat().st_size > limit:
            raise UserError(f"{path} is larger than {limit} bytes; it is no file of this kind.")
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a complete checkpoint directory.") from error


def parse_json(raw: bytes, where: str) -> dict[str, Any]:
    """`raw` as a JSON object; UserError when it is not one."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON; the file is damaged, fetch it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{where} holds a JSON {type(value).__name__}, not an object; fetch it again.")
    return value


def open_directory(directory: pathlib.Path) -> dict[str, Entry]:
    """The tensors of a checkpoint directory by name: one file, or the shards its index names.

    Raises UserError: no safetensors file, a missing shard, a tensor the index promises and its shard lacks,
    a tensor in two shards, a malformed header.
    """
    if (directory / SINGLE).exists():
        return open_file(directory / SINGLE)
    if not (directory / INDEX).exists():
        raise UserError(f"{directory} has neither {SINGLE} nor {INDEX}; convert its weights to safetensors first.")
    weight_map = read_json(directory / INDEX, MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{directory / INDEX} has no weight_map of tensor names to file names; fetch it again.")
    entries: dict[str, Entry] = {}
    for shard in sorted(set(weight_map.values())):
        if os.path.basename(shard) != shard or "\0" in shard or shard in ("", ".", ".."):
            raise UserError(f"{directory / INDEX} names the shard {shard!r}; a shard is a file beside the index.")
        if not (directory / shard).is_file():
            raise UserError(f"{directory} lacks the shard {shard} that {INDEX} names; fetch it again.")
        for name, entry in open_file(directory / shard).items():
            if name in entries:
                raise UserError(f"tensor {name} is in {entries[name].file.name} and in {shard}; keep one of them.")
            entries[name] = entry
    for name, shard in weight_map.items():
        if name not in entries or entries[name].file.name != shard:
            raise UserError(f"{directory / INDEX} puts tensor {name} in {shard}, which does not hold it.")
    return entries


def open_file(path: pathlib.Path) -> dict[str, Entry]:
    """The checked header of one file. Raises UserError for every departure from the format."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise UserError(f"{path} is cut short: {size} bytes do not hold its header; fetch it again.")
            if length > MAX_HEADER_BYTES:
                raise UserError(f"{path} claims a header of {length} bytes, over {MAX_HEADER_BYTES}; fetch it again.")
            header = parse_json(file.read(length), f"the header of {path}")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    start = 8 + length
    entries = [_entry(path, name, value, start) for name, value in header.items() if name != "__metadata__"]
    end = start
    for entry in sorted(entries, key=lambda e: (e.offset, e.nbytes)):
        if entry.offset != end:
            raise UserError(f"{path}: tensor {entry.name} overlaps another or leaves a gap; the file is damaged.")
        end += entry.nbytes
    if end != size:
        raise UserError(f"{path} has {size} bytes where its header promises {end}; it is cut short or damaged.")
    return {entry.name: entry for entry in entries}


def _entry(path: pathlib.Path, name: str, value: Any, start: int) -> Entry:
    """One line of the header, checked: dtype, shape and byte range agree."""
    where = f"{path}: tensor {name[:200]!r}"
    if not isinstance(value, dict):
        raise UserError(f"{where} has no description; the header is damaged.")
    dtype, shape, span = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in WIDTHS:
        raise UserError(f"{where} has dtype {str(dtype)[:40]!r}; known are {', '.join(WIDTHS)}.")
    if not _integers(shape) or len(shape) > MAX_RANK:
        raise UserError(f"{where} has a malformed shape; the header is damaged.")
    if not _integers(span) or len(span) != 2 or span[1] < span[0]:
        raise UserError(f"{where} has malformed data_offsets; the header is damaged.")
    if math.prod(shape) * WIDTHS[dtype] != span[1] - span[0]:
        raise UserError(f"{where} of shape {tuple(shape)} does not fill its bytes; the header is damaged.")
    return Entry(name, path, dtype, tuple(shape), start + span[0], span[1] - span[0])


def _integers(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def read(entry: Entry) -> np.ndarray:
    """The tensor in the file's own dtype (F32, F16 or BF16), freshly allocated.

    Raises UserError: another dtype, NaN or infinite values, a file that shrank since it was opened.
    """
    if entry.dtype not in DTYPES:
        raise UserError(
            f"{entry.file}: tensor {entry.name} is {entry.dtype}; kvattn reads {', '.join(DTYPES)}, so save it as one."
        )
    out = np.empty(math.prod(entry.shape), DTYPES[entry.dtype])
    try:
        with open(entry.file, "rb", buffering=0) as file:
            file.seek(entry.offset)
            view, done = memoryview(out.view(np.uint8)), 0
            while done < entry.nbytes and (count := file.readinto(view[done:])):
                done += count
    except OSError as error:
        raise UserError(f"{entry.file} cannot be read ({error.strerror}).") from error
    if done != entry.nbytes:
        raise UserError(f"{entry.file} ended inside tensor {entry.name}; it is cut short, fetch it again.")
    if not np.isfinite(out).all():
        raise UserError(f"{entry.file}: tensor {entry.name} holds NaN or infinite values; the checkpoint is broken.")
    return out.reshape(entry.shape)


def write(directory: pathlib.Path, tensors: Iterable[Pending], shard_bytes: int) -> None:
    """Writes one `model.safetensors`, or numbered shards of at most `shard_bytes` and their index.

    A tensor larger than `shard_bytes` gets a shard of its own. OSErrors (disk full) pass through.
    """
    shards: list[list[Pending]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        write_file(directory / SINGLE, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(directory / name, shard)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_file(path: pathlib.Path, tensors: Sequence[Pending], metadata: Mapping[str, str] | None = None) -> None:
    """Writes one file, calling each tensor's `make` in turn and dropping the result before the next."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    end = 0
    for tensor in tensors:
        span = [end, end + tensor.nbytes]
        header[tensor.name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        end = span[1]
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in tensors:
            value = np.asarray(tensor.make(), dtype=tensor.dtype, order="C")
            if value.shape != tensor.shape:
                raise ValueError(f"{tensor.name}: declared {tensor.shape}, made {value.shape}")
            file.write(memoryview(value.reshape(-1).view(np.uint8)))
        file.flush()
        os.fsync(file.fileno())
