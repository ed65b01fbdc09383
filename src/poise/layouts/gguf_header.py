"""GGUF headers: metadata and the table of tensors, read with suspicion.

    magic "GGUF", version u32, number of tensors u64, number of keys u64
    keys:     name, type, value                      (strings: u64 length, UTF-8)
    tensors:  name, dimensions (fastest first), block type, offset from the start of the data
    padding to the alignment, then the data of the tensors, each aligned

Every count and length in a file is a claim. It is compared with what is left of the file before
anything of that size is built, so that a hostile header costs no memory and no time.
"""

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import gguf
import numpy as np

from poise.core.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
BOOL, STRING, ARRAY = 7, 8, 9
NUMBERS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 10: "u8", 11: "i8", 12: "f8"}
MAX_DIMENSIONS = 4
ALIGNMENT = 32
_T = TypeVar("_T")


class Value(NamedTuple):
    """A metadata value with its storage type, so that it can be written back unchanged.

    Attributes:
        type: GGUF value type, 9 for arrays.
        items: value type of an array's items, None for scalars.
        value: Python value. Bytes of a string that are not UTF-8 are surrogate-escaped.
    """

    type: int
    items: int | None
    value: Any


class Entry(NamedTuple):
    """Where a tensor is.

    Attributes:
        type: name of its GGML type.
        shape: slowest dimension first, as torch has it.
        start: position of its first byte in the file.
    """

    type: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """Everything in a GGUF file but the data. ``length`` counts the bytes before the data."""

    metadata: dict[str, Value]
    tensors: dict[str, Entry]
    length: int

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value without its type."""
        return self.metadata[key].value if key in self.metadata else default


NEWER = {"Q2_0": (42, 64, 18)}
"""GGML types that llama.cpp has and the gguf package does not know yet: number, weights and bytes of a block."""


def u32(value: int) -> Value:
    """A 32-bit unsigned number."""
    return Value(4, None, int(value))


def f32(value: float) -> Value:
    """A 32-bit float."""
    return Value(6, None, float(value))


def flag(value: bool) -> Value:
    """A truth value."""
    return Value(BOOL, None, bool(value))


def text(value: str) -> Value:
    """A string."""
    return Value(STRING, None, value)


def strings(values: list[str]) -> Value:
    """An array of strings."""
    return Value(ARRAY, STRING, values)


def ints(values: list[int]) -> Value:
    """An array of 32-bit integers."""
    return Value(ARRAY, 5, values)


def floats(values: list[float]) -> Value:
    """An array of 32-bit floats."""
    return Value(ARRAY, 6, values)


def type_size(name: str) -> tuple[int, int]:
    """Weights in a block of a GGML type, and bytes of a block."""
    if name in NEWER:
        return NEWER[name][1:]
    block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    return int(block), int(nbytes)


def type_number(name: str) -> int:
    """The number of a GGML type."""
    return NEWER[name][0] if name in NEWER else int(gguf.GGMLQuantizationType[name])


def type_name(number: int) -> str:
    """The name of a GGML type. Raises ``ValueError`` for a number that is none."""
    newer = {entry[0]: name for name, entry in NEWER.items()}
    return newer.get(number) or gguf.GGMLQuantizationType(number).name


def read_header(path: Path) -> Header:
    """Metadata and tensor table of a file.

    Raises:
        CheckpointError: not a GGUF file, truncated, or a header that contradicts itself or the file.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(_Cursor(data))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error.args[0]) if error.args else str(error)
        raise CheckpointError(f"{path}: not a usable GGUF file: {reason}") from error


class _Cursor:
    """Reads forward through the file and refuses to leave it. Raises ``ValueError``."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = 0

    @property
    def left(self) -> int:
        return len(self.data) - self.position

    def take(self, length: int, what: str) -> bytes:
        if length > self.left:
            raise ValueError(f"{what} takes {length} bytes, {self.left} are left; it is truncated or damaged")
        self.position += length
        return self.data[self.position - length : self.position]

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def count(self, smallest: int, what: str) -> int:
        """A number of things that take at least ``smallest`` bytes each."""
        count = int(self.number("<Q", what))
        if count * smallest > self.left:
            raise ValueError(f"it claims {count} {what}, which cannot fit in the {self.left} bytes left")
        return count

    def string(self, what: str) -> str:
        raw = self.take(int(self.number("<Q", what)), what)
        return raw.decode("utf-8", errors="surrogateescape")


def _parse(cursor: _Cursor) -> Header:
    if cursor.take(4, "the magic number") != MAGIC:
        raise ValueError("it does not start with the magic bytes 'GGUF'")
    version = cursor.number("<I", "the version")
    if version not in VERSIONS:
        order = " (or big-endian)" if version & 0xFFFF == 0 else ""
        raise ValueError(f"version {version}{order}; Poise reads {' and '.join(map(str, VERSIONS))}")
    n_tensors = cursor.count(8 + 4 + 8 + 4 + 8, "tensors")
    n_keys = cursor.count(8 + 4 + 1, "metadata keys")
    metadata = _collect(cursor, n_keys, "metadata key", _key)
    table = _collect(cursor, n_tensors, "tensor", _tensor)
    alignment = metadata["general.alignment"].value if "general.alignment" in metadata else ALIGNMENT
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}, not a power of two")
    begin = -(-cursor.position // alignment) * alignment
    entries = {name: _place(name, *rest, begin, alignment, len(cursor.data)) for name, rest in table.items()}
    _refuse_overlaps(entries)
    return Header(metadata=metadata, tensors=entries, length=min(begin, len(cursor.data)))


def _collect(cursor: _Cursor, count: int, what: str, read: Callable[[_Cursor, str], _T]) -> dict[str, _T]:
    found: dict[str, _T] = {}
    for _ in range(count):
        name = cursor.string(f"the name of a {what}")
        if name in found:
            raise ValueError(f"it has the {what} {name!r} twice")
        found[name] = read(cursor, name)
    return found


def _key(cursor: _Cursor, name: str) -> Value:
    kind = cursor.number("<I", name)
    if kind != ARRAY:
        return Value(kind, None, _scalar(cursor, kind, name))
    items = cursor.number("<I", name)
    if items == STRING:
        count = cursor.count(8, f"strings in {name}")
        return Value(kind, items, [cursor.string(name) for _ in range(count)])
    dtype = np.dtype("?" if items == BOOL else _number_type(items, name))
    count = cursor.count(dtype.itemsize, f"numbers in {name}")
    values = np.frombuffer(cursor.take(count * dtype.itemsize, name), dtype)
    return Value(kind, items, values.tolist())


def _scalar(cursor: _Cursor, kind: int, name: str) -> Any:
    if kind == STRING:
        return cursor.string(name)
    if kind == BOOL:
        return bool(cursor.number("<B", name))
    dtype = np.dtype(_number_type(kind, name))
    number = np.frombuffer(cursor.take(dtype.itemsize, name), dtype)[0]
    # 1e-5 instead of 9.999999747378752e-06: the shortest number that is this float32.
    return float(str(number)) if dtype == np.float32 else number.item()


def _number_type(kind: int, name: str) -> str:
    if kind not in NUMBERS:
        raise ValueError(f"{name} has the unknown value type {kind}")
    return f"<{NUMBERS[kind]}"


def _tensor(cursor: _Cursor, name: str) -> tuple[tuple[int, ...], int, int]:
    """Shape, type number and relative offset."""
    dimensions = cursor.number("<I", name)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"{name} has {dimensions} dimensions, at most {MAX_DIMENSIONS} are allowed")
    shape = struct.unpack(f"<{dimensions}Q", cursor.take(8 * dimensions, name))
    return tuple(reversed(shape)), cursor.number("<I", name), cursor.number("<Q", name)


def _place(
    name: str, shape: tuple[int, ...], number: int, offset: int, begin: int, alignment: int, size: int
) -> Entry:
    try:
        kind = type_name(number)
    except ValueError:
        raise ValueError(f"{name} has the unknown type {number}") from None
    block, block_bytes = type_size(kind)
    if min(shape) < 1 or shape[-1] % block:
        raise ValueError(f"{name} has shape {list(shape)}, which {kind} blocks of {block} cannot hold")
    nbytes = prod(shape) // block * block_bytes
    if offset % alignment:
        raise ValueError(f"{name} starts at offset {offset}, which is not a multiple of {alignment}")
    if begin + offset + nbytes > size:
        raise ValueError(
            f"{name} ends at byte {begin + offset + nbytes}, the file has {size}; it is truncated or damaged"
        )
    return Entry(kind, shape, begin + offset, nbytes)


def _refuse_overlaps(entries: dict[str, Entry]) -> None:
    ordered = sorted(entries.items(), key=lambda item: item[1].start)
    for (first, one), (second, other) in pairwise(ordered):
        if one.start + one.nbytes > other.start:
            raise ValueError(f"{first} and {second} overlap")
