"""The gradients of ``torch.ops.bitlab.linear``, ``linear_int8`` and ``qat_linear``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from bitcore.errors import DerivativeError
from bitcore.quantize import group_scale
from bitcore.reference import multiplied_in
from bitcore.saved import share_codes
from bitcore.schemas import library as _library

# The part of a weight gradient that is computed at once on a CPU.
_BLOCK_ROWS, _BLOCK_COLUMNS = 512, 1024
# Packing the weight again reads it once, which is little beside the products of this many tokens,
# and the packed bytes of no layer wait for its backward pass. On a GPU that was not measured.
_REPACKED_TOKENS = 128


def _no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Keeps autocast from rounding what is computed here on purpose in another dtype."""
    device = tensor.device.type
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def input_gradient(
    dy: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    out_features: int,
    dtype: torch.dtype,
    multiplier: Tensor | None,
) -> Tensor:
    """``dx = dy @ (w_q * s_w)``."""
    dx: Tensor = torch.ops.bitlab.input_gradient(
        dy, qweight, weight_scale, out_features, dtype, multiplier
    )
    return dx


def weight_gradient(dy: Tensor, inputs: list[Tensor], dtype: torch.dtype) -> Tensor:
    """``dW = dy.T @ x`` [N, K] of a dtype, for dy [M, N] and x: [..., K], or its codes and scale.

    Computed in dy's dtype whatever autocast says, or in float32 on a CPU that does not multiply
    16-bit floats; on a CPU in blocks, so that no float copy of all of x, dy or dW is made.
    Elsewhere codes times scales are written in the dtype that is multiplied: float32 ones would be
    twice as large as x.
    """
    with _no_autocast(dy):
        return _weight_product(dy, inputs, dtype)


def _weight_product(dy: Tensor, inputs: list[Tensor], dtype: torch.dtype) -> Tensor:
    parts = [part.reshape(-1, part.shape[-1]) for part in inputs]
    n, k = dy.shape[1], parts[0].shape[1]
    if dy.device.type != "cpu":
        x = parts[0].to(dy.dtype) if len(parts) == 1 else dy.new_empty(parts[0].shape)
        if len(parts) == 2:
            torch.mul(parts[0], parts[1], out=x)
        return (dy.t() @ x).to(dtype)

    def columns(first: int, last: int) -> Tensor:
        # Promoted within the product: a float copy of the codes would be as large as x.
        part = parts[0][:, first:last]
        return part if len(parts) == 1 else part * parts[1]

    compute = multiplied_in(dy.dtype)
    dw = dy.new_empty((n, k), dtype=dtype)
    for left in range(0, k, _BLOCK_COLUMNS):
        right = min(left + _BLOCK_COLUMNS, k)
        x = columns(left, right).to(compute)
        for first in range(0, n, _BLOCK_ROWS):
            last = min(first + _BLOCK_ROWS, n)
            dw[first:last, left:right] = dy[:, first:last].to(compute).t() @ x
    return dw


def bias_gradient(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """``db = sum(dy)`` over the tokens, in float32 and rounded once."""
    return dy.reshape(-1, dy.shape[-1]).float().sum(0).to(dtype)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qweight, weight_scale, bias, out_features, _, _, multiplier = inputs
    ctx.save_for_backward(qweight, weight_scale, multiplier)
    ctx.out_features, ctx.x_dtype = out_features, x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Packed weights are constants: input (straight-through rounding) and bias have gradients."""
    qweight, weight_scale, multiplier = ctx.saved_tensors
    dx = db = None
    if ctx.needs_input_grad[0]:
        dx = input_gradient(dy, qweight, weight_scale, ctx.out_features, ctx.x_dtype, multiplier)
    if ctx.needs_input_grad[3]:
        db = bias_gradient(dy, ctx.bias_dtype)
    return dx, None, None, db, None, None, None, None


def _int8_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, qweight, weight_scale, bias, _ = inputs
    ctx.save_for_backward(qweight, weight_scale)
    ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype


def _int8_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """``dx = dy @ (qweight * weight_scale)``, ``db = sum(dy)``; the weights are constants."""
    qweight, weight_scale = ctx.saved_tensors
    dx = db = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.bitlab.input_gradient_int8(dy, qweight, weight_scale, ctx.x_dtype)
    if ctx.needs_input_grad[3]:
        db = bias_gradient(dy, ctx.bias_dtype)
    return dx, None, None, db, None


def _qat_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, granularity, _, activation, _, step, scale, multiplier = inputs
    _, qweight, weight_scale, kept_multiplier, codes, x_scale = output
    # Saved-tensor hooks would keep these outputs whole, with the node that keeps them: a cycle.
    weight_scale, kept_multiplier = weight_scale.detach(), kept_multiplier.detach()
    if step is None and granularity == "per_group":
        multiplier = kept_multiplier
    # Zeros for the outputs without a gradient would be as large as these.
    ctx.set_materialize_grads(False)
    # A scale without a step is a learned one: its gradient needs the weight that was rounded.
    ctx.is_learned = step is None and scale is not None
    saved = (x,) if activation == "float" else share_codes(x, activation, codes, x_scale)
    # A compiler would move the packing into the forward pass, and keep what it gives.
    repacks = x.device.type == "cpu" and not torch.compiler.is_compiling()
    repacks = repacks and x.numel() >= _REPACKED_TOKENS * x.shape[-1]
    ctx.save_for_backward(
        None if repacks else qweight,
        weight if repacks or ctx.is_learned else None,
        step,
        weight_scale if step is None else scale,
        multiplier,
        *saved,
    )
    ctx.out_features, ctx.x_dtype = weight.shape[0], x.dtype
    ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype


def qat_gradients(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """Straight-through gradients: ``dx = dy @ (w_q s_w)``, ``dW = dy.T @ (x_q s_x)``, clipped and
    with one of the scale where that is learned.
    """
    qweight, weight, step, weight_scale, multiplier, *inputs = ctx.saved_tensors
    dx = dw = db = dscale = None
    if step is None:
        step = weight_scale if multiplier is None else group_scale(weight_scale, multiplier)
    if ctx.needs_input_grad[0]:
        if qweight is None:
            qweight = torch.ops.bitlab.pack_codes(weight, step)
        dx = input_gradient(dy, qweight, weight_scale, ctx.out_features, ctx.x_dtype, multiplier)
        del qweight
    rows = dy.reshape(-1, ctx.out_features)
    # torch leaves trailing arguments out that have their defaults.
    if ctx.needs_input_grad[1] or (ctx.is_learned and ctx.needs_input_grad[8]):
        dtype = dy.dtype if ctx.is_learned else ctx.weight_dtype
        dw = weight_gradient(rows, inputs, dtype)
        if ctx.is_learned:
            dw, dscale = torch.ops.bitlab.learned_gradients(dw, weight, step)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
        db = bias_gradient(rows, ctx.bias_dtype)
    return dx, dw, db, None, None, None, None, None, dscale, None


def _register_without_gradient(op: str) -> None:
    """Gives an op without a gradient a backward pass that says so; torch's own only warns."""

    def backward(ctx: Any, *grads: Tensor) -> None:
        raise DerivativeError(f"{op}: the output has no gradient, got a backward pass through it")

    torch.library.register_autograd(op, backward, lib=_library)


for _op in (
    "quantize_activation",
    "pack_weight",
    "pack_codes",
    "learned_gradients",
    "estimate",
    "unpack_weight",
    "matmul",
    "input_gradient",
    "input_gradient_int8",
    "experts_input_gradient",
):
    _register_without_gradient(f"bitlab::{_op}")
torch.library.register_autograd(
    "bitlab::linear", _linear_backward, setup_context=_linear_setup, lib=_library
)
torch.library.register_autograd(
    "bitlab::linear_int8", _int8_backward, setup_context=_int8_setup, lib=_library
)
torch.library.register_autograd(
    "bitlab::qat_linear", qat_gradients, setup_context=_qat_setup, lib=_library
)
