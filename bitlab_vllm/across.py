"""A layer whose inputs are spread over several processes: sums are added up as integers.

With tensor parallelism each process has some columns of the matrix and of the activations. The
scale of a token is that of the largest value over all of them, the sums of codes are exact in any
order, and everything is scaled and rounded once: tokens are those of one process, bit for bit.
Adding up floats instead, as vLLM does for other layers, was rejected: each process would quantize
its part of a token by a scale of its own. Two cases are floats by nature, and equal to their
rounding only: unquantized activations, and groups with a float32 scale each.

An op of its own, `bitlab_vllm::across`, so that a compiled model leaves the order of operations
alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bitcore.errors import ConfigError

Reduce = Callable[[Tensor], None]
_LEAST = 1e-5
# Four packed codes of 0.
_ZEROS = 0b01010101
# Half of an int8 code is at most 8 in magnitude, so that sums of its products with codes times
# multipliers stay within 2^24, where float32 is exact.
_MOST_COLUMNS = 2**24 // (8 * 127) // 128 * 128


@dataclass(frozen=True)
class Group:
    """What processes that share a layer do together, in place.

    Attributes:
        maximum: Takes the largest over all.
        total: Adds up over all.
    """

    maximum: Reduce
    total: Reduce


def padded(qweight: Tensor, multiplier: Tensor) -> tuple[Tensor, Tensor]:
    """Adds one group of zeros to a part with multipliers, as `across` takes it.

    Args:
        qweight: uint8 [R, k].
        multiplier: uint8 [n, k / G].

    Returns:
        uint8 [R, k + G] and [n, k / G + 1].

    Raises:
        ConfigError: The part has too many columns for exact sums.
    """
    columns = qweight.shape[1]
    if columns > _MOST_COLUMNS:
        raise ConfigError(
            f"bitlab: tensor_parallel_size must leave at most {_MOST_COLUMNS} inputs of a layer to "
            f"each process, got {columns}\nUse more processes, or one."
        )
    size = columns // multiplier.shape[1]
    return F.pad(qweight, (0, size), value=_ZEROS), F.pad(multiplier, (0, 1), value=1)


def across(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    rows: int,
    activation: str,
    multiplier: Tensor | None,
    group: Group,
) -> Tensor:
    """Runs a layer on the part of its input that this process has.

    Args:
        x: float [M, k].
        qweight: uint8 [ceil(n / 4), k]; `padded` where there are multipliers.
        scale: float32 [n], or [n, k / G].
        bias: float [n] or None; the same in every process.
        rows: n.
        activation: ``"int8_per_token"`` or ``"float"``.
        multiplier: As `padded` gives it, or None.
        group: What the processes do together.

    Returns:
        [M, n] of x's dtype, the same in every process.
    """
    if activation == "float":
        y = _multiply(x.float(), qweight, scale, rows, "float", multiplier)
        group.total(y)
    else:
        largest = x.float().abs().amax(-1, keepdim=True).clamp(min=_LEAST)
        # A maximum over processes may pass over NaN.
        largest = torch.nan_to_num(largest, nan=torch.inf, posinf=torch.inf)
        group.maximum(largest)
        codes = (x.float() * (127 / largest)).round().clamp(-128, 127)
        codes = codes.nan_to_num(nan=0.0)
        x_scale = torch.where(torch.isfinite(largest), largest / 127, torch.nan)
        if scale.dim() == 2:
            y = _multiply(codes, qweight, scale, rows, "float", None)
            group.total(y)
            y = y * x_scale
        else:
            sums = _sums(codes, qweight, rows, multiplier)
            group.total(sums)
            y = sums.float() * (x_scale * scale)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _multiply(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    rows: int,
    activation: str,
    multiplier: Tensor | None,
) -> Tensor:
    if multiplier is not None:
        x = F.pad(x, (0, qweight.shape[1] - x.shape[1]))
    y: Tensor = torch.ops.bitlab.linear(
        x, qweight, scale, None, rows, activation, torch.float32, multiplier
    )
    return y


def _sums(codes: Tensor, qweight: Tensor, rows: int, multiplier: Tensor | None) -> Tensor:
    """Exact int32 sums [M, n] of codes [M, k] in float32.

    There is no op that gives them where codes have multipliers: the linear op scales and rounds.
    It is given the lower and the upper half of each code as tokens of their own, whose sums float32
    holds exactly, beside a 127 that meets a weight of zero and makes the token's scale one.
    """
    sums: Tensor
    if multiplier is None:
        sums = torch.ops.bitlab.matmul(codes.to(torch.int8), qweight, rows)
        return sums
    low = torch.remainder(codes + 8, 16) - 8
    high = (codes - low) / 16
    halves = F.pad(torch.cat([low, high]), (0, 1), value=127.0)
    ones = torch.ones(rows, dtype=torch.float32, device=codes.device)
    found = _multiply(halves, qweight, ones, rows, "int8_per_token", multiplier).to(torch.int32)
    count = codes.shape[0]
    sums = found[count:] * 16 + found[:count]
    return sums
