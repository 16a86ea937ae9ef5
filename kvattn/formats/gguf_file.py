"""The GGUF container: header, metadata, tensor table, and the block formats, for files nobody vouches for.

    magic 'GGUF' | version | tensor count | key count | keys: (name, type, value)* | tensors: (name, dims, type,
    offset)* | padding to `general.alignment` | tensor data

Every count, length and offset is checked against the bytes that are left before anything is allocated, and
tensors may not overlap, so memory stays within a small multiple of the file's size whatever the file says.
The file is memory-mapped: `File.tensor` reads only the blocks of the tensor that is asked for.

Block formats (ggml): each stores 32 weights (Q6_K: 256) as small integers q beside half-precision scales:
Q8_0 w = d q, q in [-127, 127]; Q4_0 w = d (q - 8); Q4_1 w = d q + m; Q6_K w = d s (q - 32), an int8 s for 16.
"""

import dataclasses
import math
import mmap
import os
import struct
from typing import Any

import numpy as np

from kvattn.errors import UserError

# name: (ggml type number, weights in a block, bytes in a block)
BLOCKS = {
    "F32": (0, 1, 4),
    "F16": (1, 1, 2),
    "Q4_0": (2, 32, 18),
    "Q4_1": (3, 32, 20),
    "Q8_0": (8, 32, 34),
    "Q6_K": (14, 256, 210),
    "BF16": (30, 1, 2),
}
_TYPE_NAMES = {number: name for name, (number, _, _) in BLOCKS.items()}
# metadata value types: number -> little-endian NumPy dtype; 8 is a string, 9 an array
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "|b1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9
_CHUNK = 4096  # blocks dequantised at a time: the temporaries stay in the processor's cache


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor: `shape` in NumPy order (the row length, GGUF's first dimension, is last); `start` and
    `nbytes` in bytes from the beginning of the file."""

    name: str
    shape: tuple[int, ...]
    kind: str
    start: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class File:
    """An open GGUF file. `fields`: key -> int, float, bool, str, list of str, or 1-D array."""

    path: str
    fields: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data: Any  # the mapping

    def tensor(self, name: str) -> np.ndarray:
        """Tensor `name` as a new float32 array. Raises UserError if it is missing or holds NaN or infinity."""
        if name not in self.tensors:
            raise refuse(self.path, f"has no tensor {name}")
        info = self.tensors[name]
        raw = np.frombuffer(self.data, np.uint8, count=info.nbytes, offset=info.start)
        if not all_finite(raw, info.kind):
            raise refuse(self.path, f"has NaN or infinity in tensor {name}", "take another copy of the weights")
        return dequantize(raw, info.kind).reshape(info.shape)


def refuse(path: str, what: str, fix: str = "download or convert the file again") -> UserError:
    """The error for a file that cannot be read: which file, what is wrong, what to do.

    `what` may quote the file, so it is cut short and stripped of anything that is not a printable character.
    """
    shown = "".join(c if c.isprintable() else "?" for c in what[:400])
    return UserError(f"{path} {shown}; {fix}.")


def open_file(path: str | os.PathLike) -> File:
    """Maps a GGUF file (version 2 or 3, little-endian) and parses everything but the weights.

    Raises UserError for anything that is not a whole, well-formed file.
    """
    path = os.fspath(path)
    try:
        with open(path, "rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            if size < 24:
                raise refuse(path, f"is no GGUF file: it has {size} bytes, fewer than a header")
            data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path} cannot be read ({reason}); give the path of a GGUF file.") from None
    fields, infos, end = _Reader(path, data, size).header()
    return File(path, fields, _place(path, fields, infos, end, size), data)


class _Reader:
    """A cursor over the mapped file that refuses to read past its end."""

    def __init__(self, path: str, data: Any, size: int):
        self.path, self.data, self.size, self.at = path, data, size, 0

    def take(self, count: int) -> int:
        """The offset of the next `count` bytes, which are then behind the cursor."""
        start = self.at
        if count > self.size - start:
            raise refuse(self.path, f"is cut off or corrupt: at byte {start} it names {count} bytes more than it has")
        self.at = start + count
        return start

    def number(self, layout: str) -> int:
        return struct.unpack_from(layout, self.data, self.take(struct.calcsize(layout)))[0]

    def text(self, what: str, limit: int | None = None) -> str:
        count = self.number("<Q")
        if limit is not None and count > limit:
            raise refuse(self.path, f"is corrupt: {what} at byte {self.at} is {count} bytes long")
        start = self.take(count)
        try:
            return self.data[start : start + count].decode("utf-8")
        except UnicodeDecodeError:
            raise refuse(self.path, f"is corrupt: {what} at byte {start} is not UTF-8 text") from None

    def value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self.text(f"the value of {key}")
        if kind == _ARRAY:
            return self.array(key)
        if kind not in _SCALARS:
            raise refuse(self.path, f"is corrupt: {key} has the unknown value type {kind}")
        return self.numbers(kind, 1)[0].item()

    def numbers(self, kind: int, count: int) -> np.ndarray:
        dtype = np.dtype(_SCALARS[kind])
        start = self.take(dtype.itemsize * count)
        return np.frombuffer(self.data, dtype, count=count, offset=start)

    def array(self, key: str) -> Any:
        kind, count = self.number("<I"), self.number("<Q")
        if kind == _STRING:
            if count > (self.size - self.at) // 8:
                raise refuse(self.path, f"is cut off or corrupt: {key} names {count} strings, more than fit")
            what = f"an entry of {key}"
            return [self.text(what) for _ in range(count)]
        if kind not in _SCALARS:
            raise refuse(self.path, f"is corrupt: {key} is an array of the unknown value type {kind}")
        return self.numbers(kind, count)

    def header(self) -> tuple[dict[str, Any], list[tuple], int]:
        """(fields, tensor table, offset of its end)."""
        magic = self.data[self.take(4) : 4]
        if magic != b"GGUF":
            raise refuse(self.path, f"is no GGUF file: it begins with {magic!r}")
        version = self.number("<I")
        if version not in (2, 3):
            big = version & 0xFFFF == 0
            what = "is big-endian" if big else f"has version {version}"
            raise refuse(self.path, f"{what}; GGUF version 2 and 3, little-endian, are read", "convert it again")
        n_tensors, n_fields = self.number("<Q"), self.number("<Q")
        fields: dict[str, Any] = {}
        for _ in range(n_fields):
            key = self.text("a key", limit=65535)
            if key in fields:
                raise refuse(self.path, f"is corrupt: it has the key {key} twice")
            fields[key] = self.value(key, self.number("<I"))
        return fields, [self.tensor_info() for _ in range(n_tensors)], self.at

    def tensor_info(self) -> tuple[str, tuple[int, ...], str, int]:
        name = self.text("a tensor name", limit=1024)
        rank = self.number("<I")
        if not 1 <= rank <= 4:
            raise refuse(self.path, f"is corrupt: tensor {name} has {rank} dimensions")
        dims = tuple(self.number("<Q") for _ in range(rank))
        kind = self.number("<I")
        if kind not in _TYPE_NAMES:
            raise refuse(
                self.path,
                f"stores tensor {name} in ggml type {kind}, which is not read",
                f"quantise it to one of {', '.join(BLOCKS)}",
            )
        return name, dims[::-1], _TYPE_NAMES[kind], self.number("<Q")


def _place(path: str, fields: dict, infos: list, end: int, size: int) -> dict[str, TensorInfo]:
    """The tensor table with absolute offsets: in the file, aligned, and never overlapping."""
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise refuse(path, f"is corrupt: general.alignment is {alignment!r}, no power of two")
    base = -(-end // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in infos:
        _, per_block, block_bytes = BLOCKS[kind]
        if name in tensors:
            raise refuse(path, f"is corrupt: it has the tensor {name} twice")
        if min(shape) < 1 or shape[-1] % per_block:
            raise refuse(path, f"is corrupt: tensor {name} of type {kind} has shape {shape}")
        nbytes = math.prod(shape) // per_block * block_bytes
        if offset % alignment or base + offset + nbytes > size:
            raise refuse(
                path,
                f"is cut off or corrupt: tensor {name} takes bytes {base + offset} to {base + offset + nbytes}"
                f" of a file of {size}",
            )
        tensors[name] = TensorInfo(name, shape, kind, base + offset, nbytes)
    before = None
    for info in sorted(tensors.values(), key=lambda t: t.start):
        if before is not None and before.start + before.nbytes > info.start:
            raise refuse(path, f"is corrupt: tensors {before.name} and {info.name} overlap")
        before = info
    return tensors


def all_finite(raw: np.ndarray, kind: str) -> bool:
    """Whether every weight in `raw` (uint8, whole blocks) is finite. Quantised blocks can only go wrong in
    their half-precision scales, so only those are looked at."""
    _, _, block_bytes = BLOCKS[kind]
    blocks = raw.reshape(-1, block_bytes)
    if kind == "F32":
        return bool(np.isfinite(raw.view("<f4")).all())
    if kind == "BF16":
        return bool(((raw.view("<u2") & 0x7F80) != 0x7F80).all())
    columns = {"F16": (0,), "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q6_K": (208,)}[kind]
    halves = (np.ascontiguousarray(blocks[:, c : c + 2]).view("<u2") for c in columns)
    return all(bool(((half & 0x7C00) != 0x7C00).all()) for half in halves)


def dequantize(raw: np.ndarray, kind: str) -> np.ndarray:
    """`raw`: uint8 [bytes], whole blocks of type `kind` -> float32 [weights], bit for bit what ggml gives."""
    if kind == "F32":
        return raw.view("<f4").astype(np.float32)
    if kind == "F16":
        return raw.view("<f2").astype(np.float32)
    if kind == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    _, per_block, block_bytes = BLOCKS[kind]
    blocks = raw.reshape(-1, block_bytes)
    out = np.empty((blocks.shape[0], per_block), np.float32)
    unpack = _UNPACK[kind]
    for start in range(0, blocks.shape[0], _CHUNK):
        unpack(blocks[start : start + _CHUNK], out[start : start + _CHUNK])
    return out.reshape(-1)


def _half(blocks: np.ndarray, column: int) -> np.ndarray:
    """The half-precision number at byte `column` of every block, float32 [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, column : column + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray, out: np.ndarray) -> None:
    """Low nibbles of the 16 bytes into the first 16 weights, high nibbles into the last 16."""
    out[:, :16] = packed & 15
    out[:, 16:] = packed >> 4


def _q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
    out[...] = blocks[:, 2:].view(np.int8)
    out *= _half(blocks, 0)


def _q4_0(blocks: np.ndarray, out: np.ndarray) -> None:
    _nibbles(blocks[:, 2:], out)
    out -= np.float32(8)
    out *= _half(blocks, 0)


def _q4_1(blocks: np.ndarray, out: np.ndarray) -> None:
    _nibbles(blocks[:, 4:], out)
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


def _q6_k(blocks: np.ndarray, out: np.ndarray) -> None:
    """Two halves of 128 weights: 64 bytes of low nibbles, 32 bytes of four 2-bit tops, 8 int8 scales each."""
    count = blocks.shape[0]
    low, high = blocks[:, :128].reshape(count, 2, 64), blocks[:, 128:192].reshape(count, 2, 32)
    q = out.reshape(count, 2, 4, 32)
    for quarter in range(4):
        nibble = low[:, :, 32 * (quarter % 2) : 32 * (quarter % 2) + 32] >> (4 * (quarter // 2)) & 15
        q[:, :, quarter] = nibble | (high >> (2 * quarter) & 3) << 4
    q -= np.float32(32)
    scale = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    out.reshape(count, 16, 16)[...] *= scale[:, :, None]


_UNPACK = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q6_K": _q6_k}
