"""Codes of two bits, four to a byte along the row: how GGUF and compressed-tensors lay them."""

from __future__ import annotations

import torch
from torch import Tensor

_SHIFTS = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)


def pack_fields(codes: Tensor, offset: int) -> Tensor:
    """Returns ``code + offset`` of four neighbours in a byte, the first lowest: uint8 [N, K / 4].

    Args:
        codes: int8 [N, K], 4 divides K.
        offset: What makes every code a number from 0 to 3.
    """
    fields: Tensor = (codes + offset).to(torch.uint8).unflatten(-1, (-1, 4)) << _SHIFTS
    # The fields do not overlap.
    return fields.sum(-1, dtype=torch.uint8)


def unpack_fields(data: Tensor, offset: int) -> Tensor:
    """Returns the codes of `pack_fields`, int8 [..., 4 * bytes].

    Args:
        data: uint8 [..., bytes].
        offset: See `pack_fields`.
    """
    fields = data.unsqueeze(-1) >> _SHIFTS & 3
    return (fields.to(torch.int8) - offset).flatten(-2)
