"""Rows of a packed matrix by their numbers, as an embedding reads them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bitcore.quantize import dequantize


def lookup_rows(
    indices: Tensor,
    qweight: Tensor,
    scale: Tensor,
    rows: int,
    dtype: torch.dtype,
    multiplier: Tensor | None = None,
) -> Tensor:
    """Returns rows of codes times scale, unpacking no others.

    Row i lies in lane ``i // R`` of the packed row ``i % R``, with ``R = ceil(N / 4)``.

    Args:
        indices: int32 or int64 [...], each from 0 to N - 1.
        qweight: uint8 [R, K].
        scale: float32 [1], [N] or [N, K / G].
        rows: N.
        dtype: dtype of the result.
        multiplier: uint8 [N, K / G] beside a scale [N], or None.

    Returns:
        [..., K] of dtype: the bits of the rows of `bitcore.quantize.dequantize`.

    Raises:
        IndexError: An index is not below N, as ``F.embedding`` says it; on a GPU, as there, the
            device is told.
    """
    flat, packed_rows = indices.reshape(-1), qweight.shape[0]
    lane = (flat // packed_rows).clamp(0, 3)
    row = flat - lane * packed_rows
    if rows < 4 * packed_rows:
        # What fills the last lane up is no row.
        row = torch.where(flat < rows, row, packed_rows)
    # It alone looks whether there is such a row.
    packed = F.embedding(row, qweight)
    shift = (2 * lane).to(torch.uint8).unsqueeze(1)
    codes = (packed >> shift & 3).to(torch.int8) - 1
    own = scale if len(scale) == 1 else scale[flat]
    groups = None if multiplier is None else multiplier[flat]
    return dequantize(codes, own, dtype, groups).view(*indices.shape, qweight.shape[1])
