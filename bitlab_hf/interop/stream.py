"""A safetensors file written part by part, with never more than a part in memory."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from bitcore.errors import CheckpointError

_SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: its name, its dtype as safetensors names it, its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def item_size(self) -> int:
        """Bytes of a value."""
        return _SIZES.get(self.dtype, 1)

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.item_size


class StreamWriter:
    """Writes tensors in any order, each in consecutive parts.

    The header comes first in the format, so all entries are given at the start. Wide dtypes lie
    before narrow ones, so that each tensor is aligned.

    Args:
        path: The file.
        entries: All of its tensors.
        metadata: The header's ``__metadata__``.

    Raises:
        CheckpointError: On leaving the block: a tensor was not written whole.
    """

    def __init__(self, path: Path, entries: list[Entry], metadata: dict[str, str]) -> None:
        header: dict[str, object] = {"__metadata__": metadata}
        self._start: dict[str, int] = {}
        self._left: dict[str, int] = {}
        offset = 0
        for entry in sorted(entries, key=lambda entry: (-entry.item_size, entry.name)):
            header[entry.name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [offset, offset + entry.size],
            }
            self._start[entry.name], self._left[entry.name] = offset, entry.size
            offset += entry.size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._base = 8 + len(text)
        self._end = {entry.name: self._start[entry.name] + entry.size for entry in entries}
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._base + offset)

    def write(self, name: str, part: Tensor) -> None:
        """Appends a contiguous part to a tensor."""
        content = part.contiguous().reshape(-1).view(torch.uint8).numpy()
        self._file.seek(self._base + self._end[name] - self._left[name])
        self._file.write(content.data)
        self._left[name] -= content.nbytes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
        unfinished = [name for name, left in self._left.items() if left]
        if error is None and unfinished:
            raise CheckpointError(f"{unfinished[0]} must be written whole, got a part")
