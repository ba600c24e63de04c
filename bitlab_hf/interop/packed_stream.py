"""Packed layers written part by part from matrices that are exactly ternary, and proven after."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bitcore.errors import ArgumentError
from bitcore.packing import pack_codes, unpack_ternary
from bitcore.quantize import dequantize, group_scale, two_levels
from bitlab_hf.interop.source import matrices
from bitlab_hf.interop.stream import Entry, StreamWriter
from bitlab_hf.interop.structure import LEAST, Structure, row_blocks, scales_of

GROUP_SCALE_DTYPES = ("float32", "uint8")


def check_group_scale_dtype(op: str, given: str) -> None:
    """Checks how scales of groups are to be kept.

    Raises:
        ArgumentError: In no way that there is.
    """
    if given not in GROUP_SCALE_DTYPES:
        raise ArgumentError(
            f"{op}: group_scale_dtype must be one of {GROUP_SCALE_DTYPES}, got {given!r}"
        )


def packed_entries(key: str, shape: tuple[int, ...], structure: Structure) -> list[Entry]:
    """Returns the tensors that a packed matrix [N, K], or those of experts [E, N, K], have in a
    file.

    Args:
        key: Of the weight.
        shape: N and K, or E, N and K.
        structure: Its own.
    """
    *experts, rows, columns = shape
    base = _base(key)
    qweight = Entry(f"{base}qweight", "U8", (*experts, (rows + 3) // 4, columns))
    groups = structure.scale_shape(rows, columns)
    if experts:
        # Gate and up have scales of their own, so that there is one for each row at least.
        groups = (*experts, *(groups if len(groups) == 2 else (rows,)))
    if not structure.two_levels:
        return [qweight, Entry(f"{base}qweight_scale", "F32", groups)]
    return [
        qweight,
        Entry(f"{base}qweight_scale", "F32", groups[:-1]),
        Entry(f"{base}qweight_multiplier", "U8", groups),
    ]


def _base(key: str) -> str:
    """Returns what the names of a weight's packed tensors begin with."""
    return key.removesuffix("weight") if key.endswith(".weight") else f"{key}_"


def write_packed(out: StreamWriter, key: str, weight: Any, structure: Structure) -> float:
    """Writes the tensors of `packed_entries`, with about a million values in memory at a time.

    Args:
        out: The file.
        key: Of the weight.
        weight: What gives its rows as floats, [N, K], or the `Experts` [E, N, K].
        structure: Its own.

    Returns:
        The largest relative change of a scale that any code is multiplied with; 0 where scales are
        kept as they are.
    """
    base, change = _base(key), 0.0
    for matrix in matrices(weight):
        for rows, scale in _scales(matrix, structure):
            held = scale
            if structure.two_levels:
                held, multiplier = two_levels(scale)
                used = matrix[rows].view(*scale.shape, -1).abs().amax(-1) > 0
                change = max(change, relative_change(scale, group_scale(held, multiplier), used))
                out.write(f"{base}qweight_multiplier", multiplier)
            out.write(f"{base}qweight_scale", held)
        for lanes in _lanes_of(matrix):
            out.write(f"{base}qweight", pack_codes(lanes.float().sign().to(torch.int8)))
    return change


def _scales(matrix: Any, structure: Structure) -> Iterator[tuple[slice, Tensor]]:
    """Yields the scales of a matrix [N, K] as they are stored, with the rows that they belong to:
    one, [1], or those of blocks of rows; an expert's one is a row's.
    """
    if structure.scale is not None:
        yield slice(0, len(matrix)), torch.tensor([structure.scale])
    elif structure.scheme != "per_tensor":
        for rows in row_blocks(*matrix.shape):
            yield rows, scales_of(matrix[rows], structure)
    else:
        at = 0
        for part in matrix.parts:
            blocks = (part[rows].abs().amax() for rows in row_blocks(*part.shape))
            yield slice(at, at + len(part)), torch.full([len(part)], float(max(blocks)) or LEAST)
            at += len(part)


def relative_change(before: Tensor, after: Tensor, used: Tensor | None = None) -> float:
    """Returns the largest ``|after / before - 1|``, where ``used`` is true; 0 where that is
    nowhere.
    """
    change = (after.double() / before.double() - 1).abs()
    if used is not None:
        change = change[used]
    return float(change.max()) if change.numel() else 0.0


def _lanes_of(weight: Any) -> Iterator[Tensor]:
    """Yields blocks of packed rows: their four lanes [4 * rows, K] one under the other."""
    out_features, in_features = weight.shape
    packed_rows = (out_features + 3) // 4
    for rows in row_blocks(packed_rows, 4 * in_features):
        count = rows.stop - rows.start
        block = torch.zeros(4 * count, in_features, dtype=weight.dtype)
        for lane in range(4):
            start = lane * packed_rows + rows.start
            part = weight[start : min(start + count, out_features)]
            block[lane * count : lane * count + len(part)] = part
        yield block


def same_values(written: Any, key: str, weight: Any, structure: Structure) -> bool:
    """Returns whether the tensors of `write_packed` give exactly a matrix's values; where its
    scales are in two levels, the signs of these values and the scales that `two_levels` makes.

    Args:
        written: The file, opened with safetensors.
        key: Of the weight.
        weight: What gives its rows as floats, [N, K], or the `Experts` [E, N, K].
        structure: Its own.
    """
    entries = packed_entries(key, weight.shape, structure)
    packed = [written.get_tensor(entry.name) for entry in entries]
    each = [packed] if len(weight.shape) == 2 else zip(*packed, strict=True)
    return all(
        _same_matrix(matrix, structure, *tensors)
        for matrix, tensors in zip(matrices(weight), each, strict=True)
    )


def _same_matrix(
    weight: Any, structure: Structure, qweight: Tensor, scale: Tensor, *multiplier: Tensor
) -> bool:
    packed_rows, out_features = len(qweight), len(weight)
    for rows in row_blocks(packed_rows, 4 * weight.shape[1]):
        count = rows.stop - rows.start
        codes = unpack_ternary(qweight[rows], 4 * count)
        for lane in range(4):
            start = lane * packed_rows + rows.start
            stop = min(start + count, out_features)
            if start >= stop:
                continue
            part, values = codes[lane * count : lane * count + stop - start], weight[start:stop]
            if structure.two_levels:
                made = two_levels(scales_of(values, structure))
                held = scale[start:stop], multiplier[0][start:stop]
                same = torch.equal(part, values.float().sign().to(torch.int8))
                same = same and all(map(torch.equal, made, held))
            else:
                own = scale if len(scale) == 1 else scale[start:stop]
                same = torch.equal(dequantize(part, own, weight.dtype), values)
            if not same:
                return False
    return True
