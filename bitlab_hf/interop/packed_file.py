"""The weights of a deployed model from matrices of another format, in one file and proven after."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors import safe_open
from torch import Tensor

from bitcore.errors import CheckpointError
from bitlab_hf.checkpoint.headers import LAYERS_KEY
from bitlab_hf.interop.packed_stream import packed_entries, same_values, write_packed
from bitlab_hf.interop.stream import Entry, StreamWriter
from bitlab_hf.interop.structure import Structure, find_structure, row_blocks

_DAMAGED = "\nThe file is damaged; fetch or write it again."
_STORED = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


class Source(Protocol):
    """A tensor of the other format, which gives its rows as floats.

    Attributes:
        ternary: Whether its format means it to be ternary.
        shape: Rows first.
        dtype: Of the values that it gives: float32, float16 or bfloat16.
        n_bytes: Its size in the file.
    """

    ternary: bool
    shape: tuple[int, ...]
    dtype: torch.dtype
    n_bytes: int

    def numel(self) -> int:
        """Returns the number of values."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice) -> Tensor: ...


def find_structures(
    op: str, sources: dict[str, Source], names: dict[str, str]
) -> dict[str, Structure]:
    """Finds the structure of each linear layer that is exactly ternary.

    Args:
        op: Who asks, for error messages.
        sources: The tensors by the model's names of them.
        names: The model's name of each linear layer, by its weight's.

    Raises:
        CheckpointError: A matrix that is meant to be ternary is not.
    """
    structures: dict[str, Structure] = {}
    for key in names:
        structure = find_structure(cast(Tensor, sources[key]))
        if structure.scheme is not None:
            structures[key] = structure
        elif sources[key].ternary:
            raise CheckpointError(
                f"{op}: {key} must have finite scales and codes of -1, 0 and 1, got "
                f"{structure.label}{_DAMAGED}"
            )
    return structures


def write_file(
    op: str,
    target: Path,
    sources: dict[str, Source],
    structures: dict[str, Structure],
    advance: Callable[[int], None],
) -> float:
    """Writes a deployed model's weights, with about a million values in memory at a time.

    Args:
        op: Who asks, for error messages.
        target: The file.
        sources: The tensors by the model's names of them.
        structures: Structure of each that is packed.
        advance: Called with the bytes of the source done.

    Returns:
        The largest relative change of a scale.

    Raises:
        CheckpointError: A float tensor is not finite.
    """
    change = 0.0
    entries: list[Entry] = []
    for key, source in sources.items():
        if key in structures:
            rows, columns = source.shape
            entries += packed_entries(key, (rows, columns), structures[key])
        else:
            entries.append(Entry(key, _STORED[source.dtype], source.shape))
    # Without BitLab, this key makes a load fail instead of giving random weights.
    entries.append(Entry(next(iter(structures)), "U8", (0,)))
    layers = [key.removesuffix(".weight") for key in structures]
    with StreamWriter(target, entries, {"format": "pt", LAYERS_KEY: json.dumps(layers)}) as out:
        for key, source in sources.items():
            if key not in structures:
                for block in _blocks(source):
                    part = source[block]
                    if not bool(torch.isfinite(part).all()):
                        raise CheckpointError(
                            f"{op}: {key} must be finite, got NaN or infinity{_DAMAGED}"
                        )
                    out.write(key, part)
            else:
                change = max(change, write_packed(out, key, source, structures[key]))
            advance(source.n_bytes)
    return change


def _blocks(source: Source) -> Iterator[slice]:
    return row_blocks(source.shape[0], math.prod(source.shape[1:]))


def prove_file(target: Path, sources: dict[str, Source], structures: dict[str, Structure]) -> None:
    """Reads what was written back and compares it with the source, value for value.

    Raises:
        CheckpointError: A value differs.
    """
    with safe_open(target, "pt") as written:
        for key, source in sources.items():
            if key in structures:
                same = same_values(written, key, source, structures[key])
            else:
                tensor = written.get_tensor(key)
                same = all(
                    torch.equal(
                        source[part].contiguous().view(torch.uint8),
                        tensor[part].contiguous().view(torch.uint8),
                    )
                    for part in _blocks(source)
                )
            if not same:
                raise CheckpointError(f"{key} must come back as it was, got other values")
