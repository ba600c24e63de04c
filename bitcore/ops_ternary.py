"""The torch ops of packed ternary weights: implementations and fakes.

Ops never look at values and never branch on them, so they are captured by torch.compile and export.

Importing this module registers them; `bitcore.ops` has the functions that call them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitcore import checks
from bitcore.errors import ArgumentTypeError
from bitcore.kernels.registry import kernels_for
from bitcore.schemas import DEVICES
from bitcore.schemas import library as _library


def _check_linear(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
    out_dtype: torch.dtype,
    multiplier: Tensor | None,
) -> None:
    op = "bitlab::linear"
    checks.check_devices(op, x, qweight, weight_scale, bias, multiplier)
    checks.check_linear_weights(qweight, weight_scale, bias, out_features, activation, multiplier)
    checks.check_input(op, x, qweight.shape[1])
    checks.check_out_dtype(op, out_dtype)


def check_pack(op: str, weight: Tensor, granularity: str, group_size: int) -> None:
    """Checks what ``bitlab::pack_weight`` takes."""
    checks.check_weight(op, weight)
    checks.check_group_size(op, weight.shape[1], granularity, group_size)


def _check_quantize(x: Tensor) -> None:
    checks.check_float("bitlab::quantize_activation", "x", x)
    checks.check_tokens("bitlab::quantize_activation", "x", x)


def _check_unpack(
    qweight: Tensor,
    weight_scale: Tensor,
    out_features: int,
    dtype: torch.dtype,
    multiplier: Tensor | None,
) -> None:
    op = "bitlab::unpack_weight"
    checks.check_devices(op, qweight, weight_scale, multiplier)
    checks.check_packed(op, qweight, weight_scale, out_features, multiplier)
    if not dtype.is_floating_point:
        raise ArgumentTypeError(f"{op}: dtype must be a float dtype, got {dtype}")


def _check_matmul(codes: Tensor, qweight: Tensor, out_features: int) -> None:
    op = "bitlab::matmul"
    checks.check_devices(op, codes, qweight)
    checks.check_dtype(op, "codes", codes, torch.int8)
    checks.check_packed(op, qweight, None, out_features)
    checks.check_last_axis(op, "codes", codes, qweight.shape[1])


def _quantize_activation(x: Tensor, per_tensor: bool) -> tuple[Tensor, Tensor]:
    _check_quantize(x)
    checks.check_memory("bitlab::quantize_activation", x=x)
    return kernels_for(x.device.type).quantize_activation(x, per_tensor)


def no_multiplier(like: Tensor) -> Tensor:
    """What an op returns where there are no multipliers: an op has no optional outputs."""
    return like.new_empty(0, dtype=torch.uint8)


def given_multiplier(multiplier: Tensor) -> Tensor | None:
    """Returns the multipliers that an op returned; None where there are none."""
    return multiplier if multiplier.numel() else None


def pack_weight(weight: Tensor, granularity: str, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """``bitlab::pack_weight``."""
    check_pack("bitlab::pack_weight", weight, granularity, group_size)
    checks.check_memory("bitlab::pack_weight", weight=weight)
    kernels = kernels_for(weight.device.type)
    qweight, scale, multiplier = kernels.pack_weight(weight, granularity, group_size)
    return qweight, scale, no_multiplier(qweight) if multiplier is None else multiplier


def _unpack_weight(
    qweight: Tensor,
    weight_scale: Tensor,
    out_features: int,
    dtype: torch.dtype,
    multiplier: Tensor | None = None,
) -> Tensor:
    _check_unpack(qweight, weight_scale, out_features, dtype, multiplier)
    checks.check_memory(
        "bitlab::unpack_weight", qweight=qweight, weight_scale=weight_scale, multiplier=multiplier
    )
    return kernels_for(qweight.device.type).unpack_weight(
        qweight, weight_scale, out_features, dtype, multiplier
    )


def _matmul(codes: Tensor, qweight: Tensor, out_features: int) -> Tensor:
    _check_matmul(codes, qweight, out_features)
    checks.check_memory("bitlab::matmul", codes=codes, qweight=qweight)
    return kernels_for(codes.device.type).matmul(codes, qweight, out_features)


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
    """``bitlab::linear``."""
    _check_linear(x, qweight, weight_scale, bias, out_features, activation, out_dtype, multiplier)
    checks.check_linear_memory(x, qweight, weight_scale, bias, multiplier)
    return kernels_for(x.device.type).linear(
        x, qweight, weight_scale, bias, out_features, activation, out_dtype, multiplier
    )


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
    """``bitlab::linear``, and the codes and scales of x."""
    _check_linear(x, qweight, weight_scale, bias, out_features, activation, out_dtype, multiplier)
    checks.check_linear_memory(x, qweight, weight_scale, bias, multiplier)
    return kernels_for(x.device.type).linear_with_codes(
        x, qweight, weight_scale, bias, out_features, activation, out_dtype, multiplier
    )


def _check_gradient(
    dy: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    out_features: int,
    dtype: torch.dtype,
    multiplier: Tensor | None,
) -> None:
    op = "bitlab::input_gradient"
    checks.check_devices(op, dy, qweight, weight_scale, multiplier)
    checks.check_packed(op, qweight, weight_scale, out_features, multiplier)
    checks.check_float(op, "dy", dy)
    checks.check_last_axis(op, "dy", dy, out_features)
    checks.check_out_dtype(op, dtype)


def _input_gradient_op(
    dy: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    out_features: int,
    dtype: torch.dtype,
    multiplier: Tensor | None = None,
) -> Tensor:
    op = "bitlab::input_gradient"
    _check_gradient(dy, qweight, weight_scale, out_features, dtype, multiplier)
    checks.check_memory(
        op, dy=dy, qweight=qweight, weight_scale=weight_scale, multiplier=multiplier
    )
    return kernels_for(dy.device.type).input_gradient(
        dy, qweight, weight_scale, out_features, dtype, multiplier
    )


for _device in DEVICES:
    _library.impl("quantize_activation", _quantize_activation, _device)
    _library.impl("pack_weight", pack_weight, _device)
    _library.impl("unpack_weight", _unpack_weight, _device)
    _library.impl("matmul", _matmul, _device)
    _library.impl("linear", linear, _device)
    _library.impl("input_gradient", _input_gradient_op, _device)


@torch.library.register_fake("bitlab::quantize_activation", lib=_library)
def _(x: Tensor, per_tensor: bool) -> tuple[Tensor, Tensor]:
    _check_quantize(x)
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty((*x.shape[:-1], 1), dtype=torch.float32),
    )


def scale_shape(weight: Tensor, granularity: str, group_size: int) -> tuple[int, ...]:
    """Of the scales that multiply, or of a step for each group."""
    if granularity in checks.GROUPED:
        return (weight.shape[0], weight.shape[1] // group_size)
    return (1,) if granularity == "per_tensor" else (weight.shape[0],)


@torch.library.register_fake("bitlab::pack_weight", lib=_library)
def fake_pack(weight: Tensor, granularity: str, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """What ``bitlab::pack_weight`` returns, without values."""
    check_pack("bitlab::pack_weight", weight, granularity, group_size)
    rows = (weight.shape[0] + 3) // 4
    qweight = weight.new_empty((rows, weight.shape[1]), dtype=torch.uint8)
    return qweight, *fake_scale(weight, granularity, group_size)


def fake_scale(weight: Tensor, granularity: str, group_size: int) -> tuple[Tensor, Tensor]:
    """A scale and multipliers, or none of these."""
    shape = scale_shape(weight, granularity, group_size)
    if granularity != "per_group":
        return weight.new_empty(shape, dtype=torch.float32), no_multiplier(weight)
    row = weight.new_empty(shape[0], dtype=torch.float32)
    return row, weight.new_empty(shape, dtype=torch.uint8)


@torch.library.register_fake("bitlab::unpack_weight", lib=_library)
def _(
    qweight: Tensor,
    weight_scale: Tensor,
    out_features: int,
    dtype: torch.dtype,
    multiplier: Tensor | None = None,
) -> Tensor:
    _check_unpack(qweight, weight_scale, out_features, dtype, multiplier)
    return qweight.new_empty((out_features, qweight.shape[1]), dtype=dtype)


@torch.library.register_fake("bitlab::matmul", lib=_library)
def _(codes: Tensor, qweight: Tensor, out_features: int) -> Tensor:
    _check_matmul(codes, qweight, out_features)
    return codes.new_empty((*codes.shape[:-1], out_features), dtype=torch.int32)


@torch.library.register_fake("bitlab::linear", lib=_library)
def fake_linear(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
    out_dtype: torch.dtype,
    multiplier: Tensor | None = None,
) -> Tensor:
    """What ``bitlab::linear`` returns, without values."""
    _check_linear(x, qweight, weight_scale, bias, out_features, activation, out_dtype, multiplier)
    return x.new_empty((*x.shape[:-1], out_features), dtype=out_dtype)


@torch.library.register_fake("bitlab::input_gradient", lib=_library)
def _(
    dy: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    out_features: int,
    dtype: torch.dtype,
    multiplier: Tensor | None = None,
) -> Tensor:
    _check_gradient(dy, qweight, weight_scale, out_features, dtype, multiplier)
    return dy.new_empty((*dy.shape[:-1], qweight.shape[1]), dtype=dtype)
