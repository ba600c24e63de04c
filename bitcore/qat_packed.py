"""`bitcore.ops.qat_linear` of a latent weight that somebody has packed already.

Where a weight's rows are spread over processes, each can pack its own and send codes instead of
floats: the layer then has the packed weight, and no float one to pack.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitcore import ops_ternary
from bitcore.gradients import qat_gradients
from bitcore.ops import output_dtype
from bitcore.plain import is_memory
from bitcore.saved import share_codes


def qat_packed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    qweight: Tensor,
    scale: Tensor,
    activation: str,
    multiplier: Tensor | None = None,
) -> Tensor:
    """The forward and the straight-through gradients of `bitcore.ops.qat_linear`, bit for bit.

    Args:
        x: float32, bfloat16 or float16 [..., K].
        weight: What gets the weight's gradient, in its dtype, [N, K]; its values are not read.
        bias: float [N], or None.
        qweight: uint8 [ceil(N / 4), K], the codes. Like scales and multipliers it is kept for the
            backward pass as it is, not as a copy.
        scale: float32 [1], [N] or [N, K / G].
        activation: ``"int8_per_token"``, ``"int8_per_tensor"`` or ``"float"``.
        multiplier: uint8 [N, K / G] beside a scale [N], or None.

    Returns:
        [..., N] of x's dtype, or autocast's under autocast.

    Raises:
        ArgumentError: Sizes do not fit.
        ArgumentTypeError: A tensor has another dtype.
    """
    run: Callable[..., Tensor] = _QatPacked.apply
    return run(x, weight, bias, qweight, scale, activation, multiplier)


class _QatPacked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        qweight: Tensor,
        scale: Tensor,
        activation: str,
        multiplier: Tensor | None,
    ) -> Tensor:
        rows = weight.shape[0]
        # No op, so no dispatcher to make memory of what only stands for it.
        held = x if is_memory(x) else x.clone()
        args = (held, qweight, scale, bias, rows, activation, output_dtype(x), multiplier)
        inputs: tuple[Tensor, ...] = (x,)
        if activation == "float":
            y = ops_ternary.linear(*args)
        else:
            y, codes, x_scale = ops_ternary.linear_with_codes(*args)
            inputs = share_codes(x, activation, codes, x_scale)
        # A step is for packing again, which nothing here does.
        ctx.save_for_backward(qweight, None, scale, scale, multiplier, *inputs)
        ctx.is_learned, ctx.out_features, ctx.x_dtype = False, rows, x.dtype
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw, db, *_ = qat_gradients(ctx, grads[0])
        return dx, dw, db, None, None, None, None
