"""The header of a GGUF file, and where its tensors lie: all of it checked before any is used.

The package ``gguf`` trusts a file: it takes any count and any offset. Here every count is held
against the bytes that are left, and the tensors must lie one behind the other from the start of
the data to the end of the file, with nothing between them but the padding that their alignment
asks for. So each byte belongs to one tensor, and a type that is not the one that was written
shows by its size.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bitcore.errors import CheckpointError, MissingExtraError
from bitlab_hf.interop import q2_0

_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4
# The longest array that is read; vocabularies are far below.
_MOST_VALUES = 2**24
# numpy's name of each scalar type, by GGUF's number.
_SCALARS = {
    0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
# The least bytes of a field (a length, a type, a value) and of a tensor's record.
_LEAST_FIELD, _LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file.

    Attributes:
        name: As llama.cpp calls it.
        kind: GGUF's name of its type.
        shape: Rows first; no size is 0.
        data: Its bytes, uint8 [rows, bytes of a row], memory-mapped.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    data: np.ndarray[Any, Any]


@dataclass(frozen=True)
class GgufFile:
    """What a file holds: its metadata, and its tensors by name."""

    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]


class _FileError(ValueError):
    """What is wrong with a file."""


@dataclass(frozen=True)
class _Record:
    name: str
    number: int
    sizes: tuple[int, ...]
    offset: int


class _Cursor:
    """Reads values one behind the other, and never past the end."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.at = content, 0

    @property
    def left(self) -> int:
        return len(self.content) - self.at

    def take(self, size: int, what: str) -> bytes:
        if size > self.left:
            raise _FileError(f"{what} of {size} bytes, with {self.left} left in the file")
        self.at += size
        return self.content[self.at - size : self.at]

    def number(self, kind: str, what: str) -> int:
        value: int = struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind), what))[0]
        return value

    def count(self, kind: str, least: int, what: str) -> int:
        """Returns a count of things that take at least so many bytes each."""
        value = self.number(kind, what)
        if value * least > self.left:
            raise _FileError(f"{value} {what}, with {self.left} bytes left in the file")
        return value

    def text(self, what: str) -> str:
        content = self.take(self.number("Q", what), what)
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise _FileError(f"{what} that is not UTF-8 ({error})") from error

    def scalars(self, number: int, count: int, what: str) -> list[Any]:
        kind = np.dtype(_SCALARS[number])
        content = self.take(count * kind.itemsize, what)
        if kind == np.bool_ and content.strip(b"\0\1"):
            raise _FileError(f"{what} that is neither true nor false")
        values: list[Any] = np.frombuffer(content, kind).tolist()
        return values

    def value(self, number: int, what: str) -> Any:
        if number == _STRING:
            return self.text(what)
        if number == _ARRAY:
            return self.array(what)
        if number not in _SCALARS:
            raise _FileError(f"{what} of the unknown type {number}")
        value = self.scalars(number, 1, what)[0]
        if isinstance(value, float) and not math.isfinite(value):
            raise _FileError(f"{what} that is not finite")
        return value

    def array(self, what: str) -> list[Any]:
        number = self.number("I", what)
        if number != _STRING and number not in _SCALARS:
            raise _FileError(f"{what}, an array of the type {number}")
        least = 8 if number == _STRING else np.dtype(_SCALARS[number]).itemsize
        count = self.count("Q", least, f"values of {what}")
        if count > _MOST_VALUES:
            raise _FileError(f"{what}, an array of {count} values")
        if number == _STRING:
            return [self.text(what) for _ in range(count)]
        return self.scalars(number, count, what)


def require_gguf(caller: str) -> None:
    """Checks that the package ``gguf`` is there.

    Args:
        caller: What needs it, as the message says it.

    Raises:
        MissingExtraError: It is not installed.
    """
    if find_spec("gguf") is None:
        raise MissingExtraError(
            f"{caller}: the package gguf must be installed, got none\n"
            'In BitLab\'s clone, run `pip install ".[gguf]"`.'
        )


def read_gguf(path: Path) -> GgufFile:
    """Reads a file's header and maps its tensors.

    Raises:
        CheckpointError: It is truncated, damaged, of another format, or holds bytes that belong to
            no tensor or to two.
    """
    try:
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise _FileError("an empty file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                fields, records, start = _header(_Cursor(content))
        return GgufFile(fields, _found(path, records, start, _alignment(fields)))
    except _FileError as error:
        raise CheckpointError(
            f"load_gguf: {path.name} must be a whole GGUF file, got: {error}\n"
            "It is truncated, damaged or of another format; fetch or write it again."
        ) from error


def _header(cursor: _Cursor) -> tuple[dict[str, Any], list[_Record], int]:
    """Returns the metadata, the tensors' records, and where the header ends."""
    if cursor.take(min(4, cursor.left), "a magic number") != b"GGUF":
        raise _FileError("another format")
    version = cursor.number("I", "a version")
    if version not in _VERSIONS:
        raise _FileError(
            f"version {version}, of which {' and '.join(map(str, _VERSIONS))} are known"
        )
    tensors = cursor.count("Q", _LEAST_TENSOR, "tensors")
    fields: dict[str, Any] = {}
    for _ in range(cursor.count("Q", _LEAST_FIELD, "fields")):
        name = cursor.text("a field's name")
        if name in fields:
            raise _FileError(f"{name} twice")
        fields[name] = cursor.value(cursor.number("I", "a field's type"), name)
    records = [_record(cursor) for _ in range(tensors)]
    return fields, records, cursor.at


def _record(cursor: _Cursor) -> _Record:
    name = cursor.text("a tensor's name")
    dimensions = cursor.number("I", "a tensor's dimensions")
    if not 0 < dimensions <= _MOST_DIMENSIONS:
        raise _FileError(f"{name} with {dimensions} dimensions")
    sizes = tuple(cursor.number("Q", "a tensor's shape") for _ in range(dimensions))
    number = cursor.number("I", "a tensor's type")
    return _Record(name, number, sizes, cursor.number("Q", "a tensor's offset"))


def _alignment(fields: dict[str, Any]) -> int:
    import gguf

    value = fields.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if type(value) is not int or value < 8 or value & (value - 1):
        raise _FileError(f"an alignment of {value!r:.80}")
    return value


def _found(
    path: Path, records: list[_Record], header_end: int, alignment: int
) -> dict[str, GgufTensor]:
    """Maps the tensors; those of Q2_0 in whichever of its two sizes of blocks fill the file."""
    try:
        return _tensors(path, records, header_end, alignment, wide=False)
    except _FileError:
        if all(record.number != q2_0.NUMBER for record in records):
            raise
        try:
            return _tensors(path, records, header_end, alignment, wide=True)
        except _FileError:
            pass
        raise


def _tensors(
    path: Path, records: list[_Record], header_end: int, alignment: int, wide: bool
) -> dict[str, GgufTensor]:
    """Maps the tensors, which must fill the file from the header to its end."""
    content = np.memmap(path, np.uint8, "r")
    start = at = _aligned(header_end, alignment)
    end = at
    tensors: dict[str, GgufTensor] = {}
    for record in sorted(records, key=lambda record: record.offset):
        kind, size = _size(record, wide)
        if start + record.offset != at:
            raise _FileError(
                f"{record.name} at {record.offset}, where {at - start} is the end of the one before"
            )
        end = at + size
        if end > len(content):
            raise _FileError(f"{record.name} to {end}, with {len(content)} bytes in the file")
        if record.name in tensors:
            raise _FileError(f"{record.name} twice")
        shape = record.sizes[::-1]
        data = content[at:end].reshape(shape[0], -1)
        tensors[record.name] = GgufTensor(record.name, kind, shape, data)
        at = _aligned(end, alignment)
    # The last one may be padded, too.
    if not end <= len(content) <= at:
        raise _FileError(f"{len(content) - end} bytes that belong to no tensor")
    return tensors


def _aligned(offset: int, alignment: int) -> int:
    return (offset + alignment - 1) // alignment * alignment


def _size(record: _Record, wide: bool) -> tuple[str, int]:
    """Returns the name of a tensor's type, and its bytes."""
    import gguf

    if record.number == q2_0.NUMBER:
        name, block, size = "Q2_0", q2_0.BLOCK, q2_0.SIZE
        if wide:
            name, block, size = "Q2_0 of 128", q2_0.WIDE_BLOCK, q2_0.WIDE_SIZE
    else:
        try:
            kind = gguf.GGMLQuantizationType(record.number)
        except ValueError:
            raise _FileError(f"{record.name} of the unknown type {record.number}") from None
        name, (block, size) = kind.name, gguf.GGML_QUANT_SIZES[kind]
    blocks = not record.sizes[0] % block and (block == 1 or len(record.sizes) > 1)
    if not all(record.sizes) or not blocks:
        raise _FileError(
            f"{record.name} of the shape {list(record.sizes)}, in rows of blocks of {block}"
        )
    return name, math.prod(record.sizes) // block * size
