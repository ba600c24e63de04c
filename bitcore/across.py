"""A layer whose inputs are spread over several processes: sums are added up as integers.

With tensor parallel each process has some columns of the matrix and of the activations. The scale
of a token is that of the largest value over all of them, the sums of codes are exact in any order,
and everything is scaled and rounded once: the result is that of one process, bit for bit. Adding up
floats instead, as is done for float layers, was rejected: each process would quantize its part of a
token by a scale of its own. Two cases are floats by nature, and equal to their rounding only:
unquantized activations, and groups with a float32 scale each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bitcore import ops
from bitcore.errors import ArgumentError
from bitcore.gradients import bias_gradient, input_gradient, weight_gradient

Reduce = Callable[[Tensor], None]
_LEAST = 1e-5
# Parts of an int8 code, by the inputs up to which sums of their products with weights of up to 127
# in magnitude stay within 2^24, where float32 is exact: halves up to 8 in magnitude, or quarters.
_BITS = {2**24 // (8 * 127): 4, 2**24 // (2 * 127): 2}
# What a row of int8 weights has its columns filled up to a multiple of.
_BLOCK = 64


@dataclass(frozen=True)
class Group:
    """What processes that share a layer do together, in place.

    Attributes:
        maximum: Takes the largest over all.
        total: Adds up over all.
    """

    maximum: Reduce
    total: Reduce


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
    """Runs a layer on the part of its input that this process has; no gradient.

    Args:
        x: float [..., k].
        qweight: uint8 [ceil(n / 4), k].
        scale: float32 [1], [n], or [n, k / G].
        bias: float [n] or None; the same in every process.
        rows: n.
        activation: ``"int8_per_token"``, ``"int8_per_tensor"`` or ``"float"``.
        multiplier: uint8 [n, k / G] beside a scale [n], or None.
        group: What the processes do together.

    Returns:
        [..., n] of x's dtype, or autocast's under autocast; the same in every process.

    Raises:
        ArgumentError: There are multipliers, and more columns than exact sums can have.
    """
    return _forward(x, qweight, scale, bias, rows, activation, multiplier, group)[0]


def across_int8(
    x: Tensor, qweight: Tensor, scale: Tensor, bias: Tensor | None, group: Group
) -> Tensor:
    """Runs an int8 layer on the part of its input that this process has; no gradient.

    Args:
        x: float [..., k].
        qweight: int8 [n, K], what `filled_up` makes of the weights [n, k].
        scale: float32 [n].
        bias: float [n] or None; the same in every process.
        group: What the processes do together.

    Returns:
        [..., n] of x's dtype, or autocast's under autocast; the bits of `bitcore.ops.linear_int8`
        on the whole input, the same in every process.

    Raises:
        ArgumentError: There are more columns than exact sums can have, or qweight is not filled up.
    """
    columns = x.shape[-1]
    if not columns < qweight.shape[-1] <= columns + _BLOCK:
        raise ArgumentError(
            f"across_int8: qweight must have columns of zeros behind its {columns}, got "
            f"{list(qweight.shape)}\nMake it with filled_up."
        )
    codes, x_scale = _quantize(x, False, group)
    ones = torch.ones_like(scale)

    def multiply(parts: Tensor) -> Tensor:
        # Beside zeros, a code of 127 makes each token's scale one.
        tokens = F.pad(parts, (0, qweight.shape[-1] - columns), value=127.0)
        y: Tensor = torch.ops.bitlab.linear_int8(tokens, qweight, ones, None, torch.float32)
        return y

    sums = _by_parts("across_int8", codes, qweight.shape[0], multiply)
    group.total(sums)
    y = sums.float() * (x_scale * scale)
    return (y if bias is None else y + bias.float()).to(ops.output_dtype(x))


def filled_up(qweight: Tensor) -> Tensor:
    """Returns int8 weights [n, k] with at least one column of zeros behind them, [n, K] with K the
    next multiple of 64 above k: as `across_int8` takes them.
    """
    return F.pad(qweight, (0, _BLOCK - qweight.shape[-1] % _BLOCK))


def across_linear(
    x: Tensor,
    weight: Tensor | None,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    rows: int,
    activation: str,
    multiplier: Tensor | None,
    group: Group,
) -> Tensor:
    """`across` with straight-through gradients to x, to the bias, and to a latent weight.

    ``dx = dy @ (w_q s_w)`` and ``dW = dy.T @ (x_q s_x)`` of this process's columns: every process
    has the whole of dy, so nothing is communicated.

    Args:
        x: float [..., k].
        weight: The latent weight [n, k] that was packed, or None.
        qweight: As the others, see `across`.
        scale: See there.
        bias: See there.
        rows: See there.
        activation: See there.
        multiplier: See there.
        group: See there.
    """
    run: Callable[..., Tensor] = _Across.apply
    return run(x, weight, qweight, scale, bias, rows, activation, multiplier, group)


class _Across(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, *rest: Any) -> Tensor:
        qweight, scale, bias, rows, activation, multiplier, group = rest
        y, inputs = _forward(x, qweight, scale, bias, rows, activation, multiplier, group)
        ctx.save_for_backward(qweight, scale, multiplier, *inputs)
        ctx.rows, ctx.x_dtype = rows, x.dtype
        ctx.weight_dtype = None if weight is None else weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        qweight, scale, multiplier, *inputs = ctx.saved_tensors
        rows = dy.reshape(-1, ctx.rows)
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = input_gradient(dy, qweight, scale, ctx.rows, ctx.x_dtype, multiplier)
        if ctx.weight_dtype is not None and ctx.needs_input_grad[1]:
            dw = weight_gradient(rows, inputs, ctx.weight_dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[4]:
            db = bias_gradient(rows, ctx.bias_dtype)
        return dx, dw, None, None, db, None, None, None, None


def _forward(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    rows: int,
    activation: str,
    multiplier: Tensor | None,
    group: Group,
) -> tuple[Tensor, list[Tensor]]:
    """Returns the output, and what the weight's gradient needs: x, or its codes and their scale."""
    if activation == "float":
        y = _multiply(x.float(), qweight, scale, rows, "float", multiplier)
        group.total(y)
        inputs = [x]
    else:
        codes, x_scale = _quantize(x, activation == "int8_per_tensor", group)
        inputs = [codes, x_scale]
        if scale.dim() == 2:
            y = _multiply(codes.float(), qweight, scale, rows, "float", None)
            group.total(y)
            y = y * x_scale
        else:
            sums = _sums(codes, qweight, rows, multiplier)
            group.total(sums)
            y = sums.float() * (x_scale * scale)
    return (y if bias is None else y + bias.float()).to(ops.output_dtype(x)), inputs


def _quantize(x: Tensor, per_tensor: bool, group: Group) -> tuple[Tensor, Tensor]:
    """`bitcore.quantize.quantize_activation` with the largest value over all processes."""
    values = x.float()
    largest = values.abs().amax(-1, keepdim=True).clamp(min=_LEAST)
    if per_tensor and largest.numel():
        largest = largest.amax().expand_as(largest)
    # A maximum over processes may pass over NaN.
    largest = torch.nan_to_num(largest, nan=torch.inf, posinf=torch.inf).contiguous()
    group.maximum(largest)
    finite = torch.isfinite(largest)
    # Divided by a number, a tensor is multiplied with its reciprocal: rounded twice.
    full = torch.full_like(largest, 127.0)
    codes = (values * (full / largest)).round().clamp(-128, 127)
    codes = torch.where(finite, codes, 0.0).to(torch.int8)
    return codes, torch.where(finite, largest / full, torch.nan)


def _multiply(
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    rows: int,
    activation: str,
    multiplier: Tensor | None,
) -> Tensor:
    y: Tensor = torch.ops.bitlab.linear(
        x, qweight, scale, None, rows, activation, torch.float32, multiplier
    )
    return y


def _sums(codes: Tensor, qweight: Tensor, rows: int, multiplier: Tensor | None) -> Tensor:
    """Exact int32 sums [..., n] of int8 codes [..., k].

    There is no op that gives them where codes have multipliers: the linear op scales and rounds. It
    is given a token of 127 beside the others, so that all of them have the scale one.
    """
    sums: Tensor
    if multiplier is None:
        sums = torch.ops.bitlab.matmul(codes, qweight, rows)
        return sums
    largest = codes.new_full((1, codes.shape[-1]), 127.0, dtype=torch.float32)
    ones = codes.new_ones(rows, dtype=torch.float32)

    def multiply(parts: Tensor) -> Tensor:
        tokens = torch.cat([parts, largest])
        return _multiply(tokens, qweight, ones, rows, "int8_per_tensor", multiplier)[:-1]

    return _by_parts("across", codes, rows, multiply)


def _by_parts(op: str, codes: Tensor, rows: int, multiply: Callable[[Tensor], Tensor]) -> Tensor:
    """Exact int32 sums [..., n] by products that give float32.

    Parts of each code are multiplied as tokens of their own, whose sums float32 holds exactly.

    Args:
        op: Who asks, for messages.
        codes: int8 [..., k].
        rows: n.
        multiply: Gives float32 [M, n] of float32 [M, k] that are int8 codes.
    """
    columns = codes.shape[-1]
    bits = next((bits for most, bits in _BITS.items() if columns <= most), None)
    if bits is None:
        raise ArgumentError(
            f"{op}: columns must be at most {max(_BITS)} of a layer in each process where weights "
            f"are int8 or groups have multipliers, got {columns}\nUse more processes, or one."
        )
    tokens = codes.reshape(-1, columns).float()
    parts, half = [], 2 ** (bits - 1)
    for _ in range(8 // bits - 1):
        low = torch.remainder(tokens + half, 2 * half) - half
        parts.append(low)
        tokens = (tokens - low) / (2 * half)
    found = multiply(torch.cat([*parts, tokens]))
    digits = found.to(torch.int32).view(8 // bits, -1, rows)
    sums = digits[-1]
    for digit in digits[:-1].flip(0):
        sums = sums * (2 * half) + digit
    return sums.view(*codes.shape[:-1], rows)
