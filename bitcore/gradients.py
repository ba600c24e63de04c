"""The gradients of ``torch.ops.bitlab.linear``, ``linear_int8`` and ``qat_linear``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from bitcore.estimators import lsq_gradients
from bitcore.schemas import library as _library


def _no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Keeps autocast from rounding what is computed here on purpose in another dtype."""
    device = tensor.device.type
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def _input_gradient(
    dy: Tensor, qweight: Tensor, weight_scale: Tensor, out_features: int, dtype: torch.dtype
) -> Tensor:
    """``dx = dy @ (w_q * s_w)``."""
    dx: Tensor = torch.ops.bitlab.input_gradient(dy, qweight, weight_scale, out_features, dtype)
    return dx


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qweight, weight_scale, _, out_features, _, _ = inputs
    ctx.save_for_backward(qweight, weight_scale)
    ctx.out_features, ctx.x_dtype = out_features, x.dtype


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Packed weights are constants: only the input has a gradient (straight-through rounding)."""
    qweight, weight_scale = ctx.saved_tensors
    dx = _input_gradient(dy, qweight, weight_scale, ctx.out_features, ctx.x_dtype)
    return dx, None, None, None, None, None, None


def _int8_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qweight, weight_scale, _, _ = inputs
    ctx.save_for_backward(qweight, weight_scale)
    ctx.x_dtype = x.dtype


def _int8_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """``dx = dy @ (qweight * weight_scale)``; the weights are constants."""
    qweight, weight_scale = ctx.saved_tensors
    dx = torch.ops.bitlab.input_gradient_int8(dy, qweight, weight_scale, ctx.x_dtype)
    return dx, None, None, None, None


def _qat_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, _, activation, _, step, scale = inputs
    _, qweight, weight_scale, codes, x_scale = output
    # A scale without a step is a learned one: its gradient needs the weight that was rounded.
    ctx.is_learned = step is None and scale is not None
    saved = (x,) if activation == "float" else (codes, x_scale)
    learned = (weight, scale) if ctx.is_learned else ()
    ctx.save_for_backward(qweight, weight_scale if step is None else scale, *saved, *learned)
    ctx.out_features, ctx.x_dtype = weight.shape[0], x.dtype
    ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype


def _qat_backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """Straight-through gradients: ``dx = dy @ (w_q s_w)``, ``dW = dy.T @ (x_q s_x)``, clipped and
    with one of the scale where that is learned.
    """
    qweight, weight_scale, *inputs = ctx.saved_tensors
    learned = (inputs.pop(-2), inputs.pop()) if ctx.is_learned else None
    dx = dw = db = dscale = None
    if ctx.needs_input_grad[0]:
        dx = _input_gradient(dy, qweight, weight_scale, ctx.out_features, ctx.x_dtype)
    rows = dy.reshape(-1, ctx.out_features)
    # torch leaves trailing arguments out that have their defaults.
    if ctx.needs_input_grad[1] or (learned is not None and ctx.needs_input_grad[8]):
        with _no_autocast(dy):
            x = inputs[0] if len(inputs) == 1 else inputs[0].float() * inputs[1]
            x = x.to(dy.dtype).reshape(-1, x.shape[-1])
            dw = rows.t() @ x
            if learned is not None:
                dw, dscale = lsq_gradients(dw, *learned)
            dw = dw.to(ctx.weight_dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
        db = rows.float().sum(0).to(ctx.bias_dtype)
    return dx, dw, db, None, None, None, None, None, dscale


torch.library.register_autograd(
    "bitlab::linear", _linear_backward, setup_context=_linear_setup, lib=_library
)
torch.library.register_autograd(
    "bitlab::linear_int8", _int8_backward, setup_context=_int8_setup, lib=_library
)
torch.library.register_autograd(
    "bitlab::qat_linear", _qat_backward, setup_context=_qat_setup, lib=_library
)
