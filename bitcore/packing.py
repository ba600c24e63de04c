"""The packed format `t2`: four rows of ternary codes to a byte.

For codes [N, K] in {-1, 0, +1} and R = ceil(N / 4)::

    qweight: uint8 [R, K]
    bits 2i and 2i+1 of qweight[r, k] hold code[r + i * R, k] + 1, i = 0..3

Rows past N are padding: written as code 0, never read. Disk, CPU and GPU use these very bytes; they
are also what transformers' own `bitnet` method stores.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bitcore.checks import check_dtype
from bitcore.errors import ArgumentError


def pack_ternary(codes: Tensor) -> Tensor:
    """Packs ternary codes.

    Args:
        codes: int8 [N, K], each -1, 0 or +1; N and K at least 1.

    Returns:
        uint8 [ceil(N / 4), K].

    Raises:
        ArgumentTypeError: codes are not int8.
        ArgumentError: codes are not a matrix, are empty, or hold another value.
    """
    check_dtype("pack_ternary", "codes", codes, torch.int8)
    if codes.dim() != 2 or codes.numel() == 0:
        raise ArgumentError(
            f"pack_ternary: codes must be [N, K] with N and K at least 1, got {list(codes.shape)}"
        )
    low, high = int(codes.min()), int(codes.max())
    if low < -1 or high > 1:
        raise ArgumentError(
            f"pack_ternary: codes must be -1, 0 or +1, got values from {low} to {high}"
        )
    return pack_codes(codes)


def pack_codes(codes: Tensor) -> Tensor:
    """Packs codes as `pack_ternary` does, without looking at their values."""
    out_features, in_features = codes.shape
    rows = (out_features + 3) // 4
    padded = F.pad(codes, (0, 0, 0, 4 * rows - out_features))
    lanes = (padded + 1).to(torch.uint8).view(4, rows, in_features)
    return lanes[0] | lanes[1] << 2 | lanes[2] << 4 | lanes[3] << 6


def join_rows(pieces: Tensor, out_features: int) -> Tensor:
    """Packs rows that were packed in pieces, as many in each, one piece after the other.

    Rows of a byte lie a quarter of the matrix apart, so bytes of the pieces are none of the whole:
    codes are taken apart, to a byte each, and laid together again: as few operations however many
    pieces there are.
    Moving runs of rows whose lanes stay the same was rejected: there are four in every piece.

    Args:
        pieces: uint8 [P, ceil(n / 4), K], of n = N / P rows each.
        out_features: N, a multiple of P.

    Returns:
        uint8 [ceil(N / 4), K], as `pack_ternary` gives it for all rows.
    """
    count, _, in_features = pieces.shape
    shifted = [pieces, pieces >> 2, pieces >> 4, pieces >> 6]
    lanes = torch.stack(shifted, dim=1).bitwise_and_(3).view(count, -1, in_features)
    codes = lanes[:, : out_features // count].reshape(-1, in_features)
    rows = (out_features + 3) // 4
    if 4 * rows > out_features:
        # What no row fills is code 0, plus 1.
        codes = F.pad(codes, (0, 0, 0, 4 * rows - out_features), value=1)
    lanes = codes.view(4, rows, in_features)
    return lanes[0] | lanes[1] << 2 | lanes[2] << 4 | lanes[3] << 6


def unpack_ternary(qweight: Tensor, out_features: int) -> Tensor:
    """Unpacks ternary codes; the inverse of `pack_ternary`.

    Args:
        qweight: uint8 [ceil(N / 4), K].
        out_features: N.

    Returns:
        int8 [N, K]. The invalid code 3 comes back as +2; `bitcore.ops.has_invalid_code` finds it.

    Raises:
        ArgumentTypeError: qweight is not uint8.
        ArgumentError: qweight is not a matrix of ceil(N / 4) rows.
    """
    check_dtype("unpack_ternary", "qweight", qweight, torch.uint8)
    rows = (out_features + 3) // 4
    if qweight.dim() != 2 or qweight.shape[0] != rows or out_features < 1:
        raise ArgumentError(
            f"unpack_ternary: qweight must be [{rows}, K] for out_features {out_features}, "
            f"got {list(qweight.shape)}"
        )
    lanes = torch.stack([qweight, qweight >> 2, qweight >> 4, qweight >> 6]) & 3
    return lanes.to(torch.int8).view(4 * rows, qweight.shape[1])[:out_features] - 1
