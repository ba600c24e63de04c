"""The formulas of quantization, in torch, with the order of every float operation fixed.

These are the definitions; the native kernels give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from operator import add

import torch
from torch import Tensor

from bitcore.checks import GROUPED, MOST_MULTIPLIER, check_group_size, check_weight

_LANES = 16
# Lanes that the sums of rows are added in: the threads of a block on a GPU.
_ROW_LANES = 256
_LEAST = 1e-5
# A row of zeros gets a scale that is positive, and normal in float32.
_LEAST_ROW = 1e-30
# Elements handled at a time where a whole matrix in float32 would cost too much: 4 MiB.
_BLOCK_ELEMENTS = 2**20


def weight_scale(weight: Tensor, granularity: str, group_size: int = 0) -> Tensor:
    """Absmean scales: ``max(mean(|W|), 1e-5)`` over the tensor, the row or the group.

    Args:
        weight: float32, bfloat16 or float16 [N, K].
        granularity: ``"per_tensor"``, ``"per_channel"``, or ``"per_group"`` (in either form).
        group_size: G of groups.

    Returns:
        float32 [1], [N] or [N, K / G]; multiplies codes, of groups once in two levels
        (`two_levels`). NaN where the mean is not finite.

    Numerics:
        float64 sums in a fixed order, so that every backend and thread count gives the same bits:
        lane l of 16 adds the elements l, l + 16, ... in ascending order, the lanes are added in
        ascending order, then the rows (`total`); the mean is rounded to float32 once.

    Source: BitNet b1.58, arXiv 2402.17764, equations 1 to 3.
    """
    check_weight("weight_scale", weight)
    out_features, in_features = weight.shape
    check_group_size("weight_scale", in_features, granularity, group_size)
    grouped = granularity in GROUPED
    width = group_size if grouped else in_features
    sums = reduce(add, lane_sums(weight.reshape(-1, width)).unbind(1))
    if granularity == "per_tensor":
        sums = total(sums)
        width = out_features * in_features
    scale = mean_scale(sums, width)
    return scale.view(out_features, -1) if grouped else scale


def lane_sums(rows: Tensor, lanes: Tensor | None = None) -> Tensor:
    """Adds up the magnitudes of rows in 16 lanes, in the order of `weight_scale`.

    Args:
        rows: float [R, K].
        lanes: float64 [R, 16], the sums of what lies before these columns, a multiple of 16 of
            them; or None.

    Returns:
        float64 [R, 16].
    """
    parts = rows.float().abs()
    padding = -parts.shape[1] % _LANES
    steps = torch.nn.functional.pad(parts, (0, padding)).view(parts.shape[0], -1, _LANES)
    if lanes is None:
        lanes = torch.zeros(parts.shape[0], _LANES, dtype=torch.float64, device=rows.device)
    for step in range(steps.shape[1]):
        lanes = lanes + steps[:, step]
    return lanes


def total(sums: Tensor) -> Tensor:
    """Adds up the sums of rows, float64 [N], in a fixed order: torch.sum's is its own affair.

    Lane l of 256 adds the rows l, l + 256, ... in ascending order; then the upper half of the lanes
    is added to the lower one, until one is left. Returns float64 [1].
    """
    padding = -sums.shape[0] % _ROW_LANES
    rows = torch.nn.functional.pad(sums, (0, padding)).view(-1, _ROW_LANES)
    lanes = reduce(add, rows, torch.zeros_like(rows[0]))
    while len(lanes) > 1:
        lanes = reduce(add, lanes.chunk(2))
    return lanes


def mean_scale(sums: Tensor, count: int) -> Tensor:
    """Returns the absmean scales, float32, of sums of so many magnitudes each."""
    mean = _divided(sums, count).float()
    return torch.where(torch.isfinite(mean), mean.clamp(min=_LEAST), torch.nan)


def two_levels(scale: Tensor, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Brings scales of groups to two levels: one float a row, and an integer for each group.

    ``row = max(scale) / 127``; ``multiplier = clamp(round(scale / row), 1, 127)``, half to even;
    two float32 divisions. A group's scale is then `group_scale`, off by at most half of ``row``
    unless it is smaller than that.

    Args:
        scale: float32 [N, K / G].
        largest: float32 [N], the largest scale of each row, where other columns have others.

    Returns:
        float32 [N] and uint8 [N, K / G], from 1 to 127. A row with NaN has scale NaN and
        multipliers 1.

    Source: scales in two levels as in the k-quants of llama.cpp.
    """
    largest = scale.amax(1) if largest is None else largest
    row = _divided(largest, float(MOST_MULTIPLIER))
    ratio = (scale / row.unsqueeze(1)).round().clamp(1, MOST_MULTIPLIER)
    return row, torch.nan_to_num(ratio, nan=1.0).to(torch.uint8)


def group_scale(row: Tensor, multiplier: Tensor) -> Tensor:
    """Returns the scales of groups that two levels stand for: one float32 product each.

    Args:
        row: float32 [N].
        multiplier: uint8 [N, K / G].

    Returns:
        float32 [N, K / G].
    """
    return multiplier.float() * row.unsqueeze(1)


def ternarize(weight: Tensor, scale: Tensor) -> Tensor:
    """Ternary codes: ``clamp(round(W * (1 / scale)), -1, 1)`` in float32, half to even.

    Args:
        weight: float [N, K].
        scale: float32 [1], [N] or [N, K / G], as `weight_scale` gives it.

    Returns:
        int8 [N, K]; a NaN gives 0.
    """
    out_features, in_features = weight.shape
    inverse = (1.0 / scale).view(*scale.shape, 1)
    if scale.dim() == 2:
        ratio = weight.float().reshape(out_features, scale.shape[1], -1) * inverse
    else:
        ratio = weight.float() * inverse
    # Rounding half to even and clamping to -1..1 is a comparison with one half.
    codes = (ratio > 0.5).to(torch.int8) - (ratio < -0.5).to(torch.int8)
    return codes.reshape(out_features, in_features).contiguous()


def dequantize(
    codes: Tensor, scale: Tensor, dtype: torch.dtype, multiplier: Tensor | None = None
) -> Tensor:
    """``codes * scale``, one product in float32, then rounded to dtype.

    Args:
        codes: int8 [N, K].
        scale: float32 [1], [N] or [N, K / G].
        dtype: dtype of the result.
        multiplier: uint8 [N, K / G], or None; codes are multiplied with it first, exactly.
    """
    codes = codes if multiplier is None else multiplied(codes, multiplier)
    out_features, in_features = codes.shape
    columns = scale.shape[1] if scale.dim() == 2 else 1
    grouped = codes.float().view(out_features, columns, in_features // columns)
    values = grouped * scale.view(scale.shape[0], columns, 1)
    return values.view(out_features, in_features).to(dtype)


def multiplied(codes: Tensor, multiplier: Tensor) -> Tensor:
    """Returns codes [N, K] times their groups' multipliers [N, K / G], exactly: int16 [N, K]."""
    width = codes.shape[1] // multiplier.shape[1]
    return codes.to(torch.int16) * multiplier.repeat_interleave(width, 1)


def quantize_activation(x: Tensor, per_tensor: bool) -> tuple[Tensor, Tensor]:
    """Symmetric int8 activations.

    ``m = max(max|x|, 1e-5)`` per token or over x; ``a = 127 / m``; ``codes = clamp(round(x * a),
    -128, 127)``; ``scale = m / 127``; all in float32, half to even.

    Args:
        x: float32, bfloat16 or float16 [..., K].
        per_tensor: One scale for all of x, else one a token (the last axis).

    Returns:
        codes int8 [..., K] and scale float32 [..., 1], which multiplies codes. A token (per_tensor:
        every token) with NaN or infinity has codes 0 and scale NaN.

    Source: BitNet b1.58, arXiv 2402.17764, section 2, in the form of transformers' AutoBitLinear.
    """
    values = x.float()
    most = values.abs().amax(dim=-1, keepdim=True)
    if per_tensor and most.numel():
        most = most.amax().expand_as(most)
    finite = torch.isfinite(most)
    most = torch.where(finite, most.clamp(min=_LEAST), torch.nan)
    # `127.0 / most` would be `most.reciprocal() * 127`: two roundings.
    factor = torch.full_like(most, 127.0) / most
    codes = (values * factor).round().clamp(-128, 127)
    codes = torch.where(finite, codes, 0.0).to(torch.int8)
    return codes.contiguous(), _divided(most, 127.0).contiguous()


def _divided(dividend: Tensor, divisor: float) -> Tensor:
    """Divides, rounded once: CUDA's kernels multiply with the reciprocal of a Python number."""
    return dividend / torch.full_like(dividend, divisor)


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Yields slices of the rows of a matrix, each of about 4 MiB in float32."""
    step = max(1, _BLOCK_ELEMENTS // columns)
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


@torch.no_grad()
def quantize_rows_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 weights with a scale for each row.

    ``m = max(max|w|, 1e-30)`` over the row; ``scale = m / 127``; ``codes = clamp(round(w / scale),
    -127, 127)``; all in float32, half to even.

    Args:
        weight: float32, bfloat16 or float16 [V, K], on any device.

    Returns:
        codes int8 [V, K] and scale float32 [V], which multiplies codes. A row with NaN or infinity
        has codes 0 and scale NaN.

    Raises:
        ArgumentTypeError: weight has another dtype.
        ArgumentError: weight is not [V, K] with V and K at least 1 and K at most 131071.

    Numerics:
        ``|w - codes * scale| <= scale / 2``, up to the rounding of the quotient. Rows are handled
        in blocks: the memory taken above the result is a few times 4 MiB.
    """
    check_weight("quantize_rows_int8", weight)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    for rows in row_blocks(*weight.shape):
        values = weight[rows].float()
        # Not aminmax(dim=1): one pass, but ten times slower.
        most = values.abs().amax(dim=1)
        most = torch.where(torch.isfinite(most), most.clamp(min=_LEAST_ROW), torch.nan)
        scale[rows] = _divided(most, 127.0)
        ratio = values.div(scale[rows].unsqueeze(1)).round_().clamp_(-127, 127)
        codes[rows] = torch.nan_to_num_(ratio, nan=0.0)
    return codes, scale


def dequantize_rows_int8(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``codes * scale``, one product in float32, then rounded to dtype.

    Args:
        codes: int8 [V, K].
        scale: float32 [V].
        dtype: dtype of the result.
    """
    weight = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for rows in row_blocks(*codes.shape):
        weight[rows] = codes[rows].float() * scale[rows].unsqueeze(1)
    return weight
