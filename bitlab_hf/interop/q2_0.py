"""GGUF's type Q2_0: blocks of 64 ternary values with a float16 scale each, 2.25 bits a value.

A block is 18 bytes: the scale ``d``, then 16 bytes, of which byte ``j // 4`` holds ``code + 1`` of
value j in its bits ``2 (j % 4)`` and the one above. The package ``gguf`` 0.19 does not know the
type; llama.cpp does. Other files have the same number for blocks of 128 values, of 34 bytes, which
llama.cpp does not read and BitLab does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitlab_hf.interop.two_bits import pack_fields, unpack_fields

# GGUF's numbers of the type, and of a file that is mostly of it.
NUMBER, FILE_TYPE = 42, 41
BLOCK, SIZE = 64, 18
WIDE_BLOCK, WIDE_SIZE = 128, 34


def encode(codes: Tensor, scale: Tensor) -> Tensor:
    """Returns the bytes of a matrix, uint8 [N, K / 64 * 18].

    Args:
        codes: int8 [N, K], each -1, 0 or +1; 64 divides K.
        scale: float32 [N, K / 64]; rounded to float16.
    """
    rows, blocks = scale.shape
    data = torch.empty(rows, blocks, SIZE, dtype=torch.uint8)
    data[..., :2] = scale.to(torch.float16).unsqueeze(-1).view(torch.uint8)
    data[..., 2:] = pack_fields(codes, 1).view(rows, blocks, -1)
    return data.view(rows, -1)


def decode(data: np.ndarray[Any, Any], size: int = SIZE) -> Tensor:
    """Returns the values of a matrix, float32 [N, K]; a field of 3 is twice the scale.

    Args:
        data: uint8 [N, K / 64 * 18], or [N, K / 128 * 34].
        size: Bytes of a block.
    """
    blocks = torch.from_numpy(data).view(len(data), -1, size)
    scale = blocks[..., :2].contiguous().view(torch.float16).float()
    return (unpack_fields(blocks[..., 2:], 1).float() * scale).flatten(1)
