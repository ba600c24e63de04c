"""The torch ops of int8 weights: implementations and fakes."""

from __future__ import annotations

import torch
from torch import Tensor

from bitcore import checks, reference
from bitcore.kernels.registry import kernels_for
from bitcore.schemas import DEVICES
from bitcore.schemas import library as _library


def _check_linear_int8(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    op = "bitlab::linear_int8"
    checks.check_devices(op, x, qweight, weight_scale, bias)
    checks.check_int8(op, qweight, weight_scale)
    checks.check_input(op, x, qweight.shape[1])
    checks.check_bias(op, bias, qweight.shape[0])
    checks.check_out_dtype(op, out_dtype)


def _linear_int8(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    _check_linear_int8(x, qweight, weight_scale, bias, out_dtype)
    checks.check_memory(
        "bitlab::linear_int8", x=x, qweight=qweight, weight_scale=weight_scale, bias=bias
    )
    return kernels_for(x.device.type).linear_int8(x, qweight, weight_scale, bias, out_dtype)


def _check_gradient_int8(
    dy: Tensor, qweight: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> None:
    op = "bitlab::input_gradient_int8"
    checks.check_devices(op, dy, qweight, weight_scale)
    checks.check_int8(op, qweight, weight_scale)
    checks.check_float(op, "dy", dy)
    checks.check_last_axis(op, "dy", dy, qweight.shape[0])
    checks.check_out_dtype(op, dtype)


def _input_gradient_int8(
    dy: Tensor, qweight: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    # On every device torch's own float product of blocks: it is not on the way of inference.
    _check_gradient_int8(dy, qweight, weight_scale, dtype)
    checks.check_memory(
        "bitlab::input_gradient_int8", dy=dy, qweight=qweight, weight_scale=weight_scale
    )
    return reference.input_gradient_int8(dy, qweight, weight_scale, dtype)


for _device in DEVICES:
    _library.impl("linear_int8", _linear_int8, _device)
    _library.impl("input_gradient_int8", _input_gradient_int8, _device)


@torch.library.register_fake("bitlab::linear_int8", lib=_library)
def _(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    _check_linear_int8(x, qweight, weight_scale, bias, out_dtype)
    return x.new_empty((*x.shape[:-1], qweight.shape[0]), dtype=out_dtype)


@torch.library.register_fake("bitlab::input_gradient_int8", lib=_library)
def _(dy: Tensor, qweight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    _check_gradient_int8(dy, qweight, weight_scale, dtype)
    return dy.new_empty((*dy.shape[:-1], qweight.shape[1]), dtype=dtype)
