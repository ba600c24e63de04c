"""The exact reference of every op, in plain torch: what the native kernels must equal bit for bit.

It also runs wherever no native library does (the backend called ``"reference"``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor
from torch.nn import functional as F

from bitcore import quantize
from bitcore.estimators import LEARNED_BOUND
from bitcore.packing import pack_codes as pack_codes_of
from bitcore.packing import unpack_ternary


def pack_weight(
    weight: Tensor, granularity: str, group_size: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ternarizes and packs: returns qweight uint8 [R, K], its float32 scale and multipliers."""
    scale = quantize.weight_scale(weight, granularity, group_size)
    if granularity != "per_group":
        return pack_codes(weight, scale), scale, None
    row, multiplier = quantize.two_levels(scale)
    return pack_codes(weight, quantize.group_scale(row, multiplier)), row, multiplier


def row_sums(weight: Tensor) -> Tensor:
    """Returns the sums of the magnitudes of each row, float64 [N], as `bitcore.ops.row_sums`."""
    return reduce(add, quantize.lane_sums(weight).unbind(1))


def pack_codes(weight: Tensor, step: Tensor) -> Tensor:
    """Ternarizes with a given step and packs; see `bitcore.ops.pack_codes`."""
    return pack_codes_of(quantize.ternarize(weight, step))


def unpack_weight(
    qweight: Tensor,
    weight_scale: Tensor,
    out_features: int,
    dtype: torch.dtype,
    multiplier: Tensor | None = None,
) -> Tensor:
    """Returns codes times scale, [N, K] of dtype."""
    codes = unpack_ternary(qweight, out_features)
    return quantize.dequantize(codes, weight_scale, dtype, multiplier)


def find_invalid_code(qweights: Sequence[Tensor]) -> int | None:
    """Finds the first matrix that holds the code 3; see `bitcore.ops.find_invalid_code`."""
    return next((index for index, one in enumerate(qweights) if _has_invalid_code(one)), None)


def _has_invalid_code(qweight: Tensor) -> bool:
    # Both bits of a code set: the low one meets the high one shifted down. In parts of 128 KiB, so
    # that a memory-mapped matrix is scanned in cache and without a copy of its size.
    parts = torch.split(qweight.reshape(-1), 2**17)
    return any(bool((part & (part >> 1) & 0x55).any()) for part in parts)


def quantize_activation(x: Tensor, per_tensor: bool) -> tuple[Tensor, Tensor]:
    """Returns int8 codes and float32 scales; see `bitcore.quantize.quantize_activation`."""
    return quantize.quantize_activation(x, per_tensor)


def matmul(codes: Tensor, qweight: Tensor, out_features: int) -> Tensor:
    """``codes @ w_q.T`` in int32, exact.

    A float32 matmul gives the exact sum in any order: every partial sum is an integer of magnitude
    at most 128 * 131071 < 2^24.
    """
    with torch.autocast(codes.device.type, enabled=False):
        weight = unpack_ternary(qweight, out_features).float()
        return F.linear(codes.float(), weight).to(torch.int32).contiguous()


def _multiplied_sums(
    codes: Tensor, qweight: Tensor, multiplier: Tensor, out_features: int
) -> Tensor:
    """``codes @ (w_q * multiplier).T``, exact, rounded to float32 once [..., N].

    Every partial sum is an integer of magnitude at most 128 * 127 * 131071 < 2^53.
    """
    sums = codes.new_empty((*codes.shape[:-1], out_features), dtype=torch.float32)
    weight = quantize.multiplied(unpack_ternary(qweight, out_features), multiplier)
    with torch.autocast(codes.device.type, enabled=False):
        tokens = codes.double()
        for rows in quantize.row_blocks(*weight.shape):
            sums[..., rows] = F.linear(tokens, weight[rows].double())
    return sums


def linear(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
    out_dtype: torch.dtype,
    multiplier: Tensor | None = None,
) -> Tensor:
    """``y = (x_q @ w_q.T) * (x_scale * weight_scale) + bias``; see `bitcore.ops`."""
    if activation == "float":
        return linear_float(x, qweight, weight_scale, bias, out_features, out_dtype, multiplier)
    codes, x_scale = quantize.quantize_activation(x, activation == "int8_per_tensor")
    if multiplier is not None:
        sums = _multiplied_sums(codes, qweight, multiplier, out_features)
        y = sums * (x_scale * weight_scale)
    elif weight_scale.dim() == 1:
        sums = matmul(codes, qweight, out_features).float()
        y = sums * (x_scale * weight_scale)
    else:
        width = x.shape[-1] // weight_scale.shape[1]
        y = x_scale.new_empty(())
        for column in range(weight_scale.shape[1]):
            part = slice(column * width, (column + 1) * width)
            sums = matmul(codes[..., part], qweight[:, part], out_features).float()
            term = sums * weight_scale[:, column]
            y = term if column == 0 else y + term
        y = y * x_scale
    if bias is not None:
        y = y + bias.float()
    return y.to(out_dtype).contiguous()


def by_expert(index: Tensor, experts: int) -> Iterator[tuple[int, Tensor]]:
    """Yields the number of each expert that has rows, and which: those s of index [S] that name
    it, ascending. A number that is not one of an expert is none.
    """
    index = index.reshape(-1)
    none = (index < 0) | (index >= experts)
    index = torch.where(none, experts, index)
    order = torch.argsort(index, stable=True)
    counts = torch.bincount(index, minlength=experts)[:experts].tolist()
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, order[start : start + count]
            start += count


def experts_linear(
    x: Tensor,
    index: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
    out_dtype: torch.dtype,
    multiplier: Tensor | None = None,
    run: Callable[..., Tensor] = linear,
) -> Tensor:
    """`linear` of the tokens of each expert with its weights; see `bitcore.ops.experts_linear`.

    ``run`` is what multiplies.
    """
    y = x.new_zeros((index.numel(), out_features), dtype=out_dtype)
    for expert, rows in by_expert(index, len(qweight)):
        one = [None if held is None else held[expert] for held in (bias, multiplier)]
        tokens = x.index_select(0, rows // (index.numel() // len(x)))
        weights = qweight[expert], weight_scale[expert], one[0], out_features
        y[rows] = run(tokens, *weights, activation, out_dtype, one[1])
    return y


def linear_with_codes(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
    out_dtype: torch.dtype,
    multiplier: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `linear` of int8 activations, and `quantize_activation`: what training keeps."""
    y = linear(x, qweight, weight_scale, bias, out_features, activation, out_dtype, multiplier)
    return y, *quantize_activation(x, activation == "int8_per_tensor")


def linear_float(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    out_dtype: torch.dtype,
    multiplier: Tensor | None = None,
) -> Tensor:
    """``y = x @ (w_q * weight_scale).T + bias`` in the output dtype: activations as they are."""
    with torch.autocast(x.device.type, enabled=False):
        weight = unpack_weight(qweight, weight_scale, out_features, out_dtype, multiplier)
        bias = None if bias is None else bias.to(out_dtype)
        return F.linear(without_gaps(x.to(out_dtype)), weight, bias).contiguous()


def linear_int8(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``y = (x_q @ qweight.T) * (x_scale * weight_scale) + bias``, sums exact; int8 weights."""
    codes, x_scale = quantize.quantize_activation(x, False)
    sums = x_scale.new_empty((*x.shape[:-1], qweight.shape[0]))
    with torch.autocast(x.device.type, enabled=False):
        tokens = codes.double()
        for rows in quantize.row_blocks(*qweight.shape):
            # Exact: every partial sum is an integer of magnitude at most 128 * 127 * 131071 < 2^53.
            sums[..., rows] = F.linear(tokens, qweight[rows].double())
    y = sums * (x_scale * weight_scale)
    if bias is not None:
        y = y + bias.float()
    return y.to(out_dtype).contiguous()


def without_gaps(x: Tensor) -> Tensor:
    """Returns the same numbers without gaps between the rows, which torch's products on CPUs see.

    Where a CPU has AMX, torch 2.13 reads bfloat16 rows of odd length one element too far, and NaN
    there makes the product NaN. On AMD's Zen 3 a float32 product rounds by how far rows lie apart.
    """
    return x.contiguous() if x.device.type == "cpu" else x


# Without the instructions torch multiplies bfloat16 on a CPU up to 300 times slower than float32.
_HAS_BFLOAT16 = torch.backends.mkldnn.is_available() and bool(  # type: ignore[no-untyped-call]
    torch.ops.mkldnn._is_mkldnn_bf16_supported()
)


def multiplied_in(dtype: torch.dtype) -> torch.dtype:
    """Returns in which dtype matrices of floats are multiplied on a CPU: in their own, or in
    float32 where it has no instructions for theirs.
    """
    has = dtype == torch.bfloat16 and _HAS_BFLOAT16
    return dtype if has or dtype == torch.float64 else torch.float32


def input_gradient(
    dy: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    out_features: int,
    dtype: torch.dtype,
    multiplier: Tensor | None = None,
) -> Tensor:
    """``dx = dy @ (w_q * weight_scale)``, computed in dy's dtype."""
    with torch.autocast(dy.device.type, enabled=False):
        weight = unpack_weight(qweight, weight_scale, out_features, dy.dtype, multiplier)
        return (without_gaps(dy) @ weight).to(dtype).contiguous()


def learned_gradients(dw: Tensor, weight: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of ``codes * s`` with respect to W and s, straight through the rounding.

    With ``v = W / s``: ``dW = dw`` where ``|v| < 1.5``, else 0, and ``ds = sum(dw * d)`` with
    ``d = codes - v`` where ``|v| < 1.5``, else ``codes``, times ``1 / sqrt(n Qp)``: n weights
    share the scale and Qp = 1. Clipping at 1.5 and not at Qp = 1 makes the three bins equally wide,
    as ParetoQ found to be better for ternary weights (its ``alpha`` is 1.5 s).

    Args:
        dw: Gradient of ``codes * s``, float32, bfloat16 or float16 [N, K].
        weight: Latent weight, float32, bfloat16 or float16 [N, K].
        step: What the learned scale came to, float32 [1], [N] or [N, K / G].

    Returns:
        The gradient of the weight, of its dtype, and of the scale, float32 of step's shape.

    Source: LSQ, arXiv 1902.08153, equations 2, 3 and section 2.2; the bound: ParetoQ, arXiv
    2502.02631, section 3.
    """
    groups = (*step.shape, -1)
    gradient = dw.float().reshape(groups)
    ratio = weight.float().reshape(groups) * (1.0 / step.unsqueeze(-1))
    # Half to even: what lies on a threshold is 0, as in the codes themselves.
    codes = ratio.round().clamp(-1.0, 1.0)
    inside = ratio.abs() < LEARNED_BOUND
    kept = torch.where(inside, gradient, 0.0).reshape(weight.shape).to(weight.dtype).contiguous()
    terms = torch.where(inside, codes - ratio, codes) * gradient
    count = weight.numel() // step.numel()
    return kept, (terms.sum(-1) / count**0.5).view(step.shape)


def input_gradient_int8(
    dy: Tensor, qweight: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """``dx = (dy * weight_scale) @ qweight`` in float32, a block of rows at a time."""
    rows_of_dy = dy.reshape(-1, qweight.shape[0])
    dx = dy.new_zeros((rows_of_dy.shape[0], qweight.shape[1]), dtype=torch.float32)
    with torch.autocast(dy.device.type, enabled=False):
        for rows in quantize.row_blocks(*qweight.shape):
            dx.addmm_(rows_of_dy[:, rows].float() * weight_scale[rows], qweight[rows].float())
    return dx.to(dtype).view(*dy.shape[:-1], qweight.shape[1])
