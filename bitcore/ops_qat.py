"""The ops of training, ``bitlab::qat_linear`` and what estimators need: implementations and fakes.

Importing this module registers them; `bitcore.ops` has the functions that call them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitcore import checks, estimators
from bitcore import ops_ternary as ops
from bitcore.errors import ArgumentError
from bitcore.kernels.registry import kernels_for
from bitcore.ops_ternary import given_multiplier
from bitcore.schemas import DEVICES
from bitcore.schemas import library as _library

# The output, then what the backward pass reads: qweight, its scale, multipliers; x_q, its scale.
QatOutputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _check_step(op: str, name: str, weight: Tensor, step: Tensor) -> None:
    checks.check_devices(op, weight, step)
    checks.check_weight(op, weight)
    checks.check_scale(op, name, step, *weight.shape)


def _pack_codes(weight: Tensor, step: Tensor) -> Tensor:
    _check_step("bitlab::pack_codes", "step", weight, step)
    checks.check_memory("bitlab::pack_codes", weight=weight, step=step)
    return kernels_for(weight.device.type).pack_codes(weight, step)


def _check_learned(dw: Tensor, weight: Tensor, step: Tensor) -> None:
    op = "bitlab::learned_gradients"
    checks.check_devices(op, dw, weight, step)
    checks.check_float(op, "dw", dw)
    checks.check_float(op, "weight", weight)
    if weight.dim() != 2:
        raise ArgumentError(f"{op}: weight must be [N, K], got {list(weight.shape)}")
    checks.check_in_features(op, weight.shape[1])
    if dw.shape != weight.shape:
        raise ArgumentError(f"{op}: dw must be {list(weight.shape)}, got {list(dw.shape)}")
    checks.check_scale(op, "step", step, *weight.shape)


def _learned_gradients(dw: Tensor, weight: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    _check_learned(dw, weight, step)
    checks.check_memory("bitlab::learned_gradients", dw=dw, weight=weight, step=step)
    if not weight.numel():
        return weight.new_empty(weight.shape), step.new_zeros(step.shape)
    return kernels_for(weight.device.type).learned_gradients(dw, weight, step)


def _check_estimate(weight: Tensor, name: str, granularity: str, group_size: int) -> None:
    estimators.get_estimator(name)
    ops.check_pack("bitlab::estimate", weight, granularity, group_size)


def _estimate(
    weight: Tensor, name: str, granularity: str, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    _check_estimate(weight, name, granularity, group_size)
    checks.check_memory("bitlab::estimate", weight=weight)
    step, scale, multiplier = estimators.estimate(weight, name, granularity, group_size)
    # No output of an op may be another one of its outputs.
    scale = scale.clone() if scale.data_ptr() == step.data_ptr() else scale
    return step, scale, ops.no_multiplier(scale) if multiplier is None else multiplier


def _qat_scale(
    weight: Tensor,
    granularity: str,
    step: Tensor | None,
    scale: Tensor | None,
    multiplier: Tensor | None,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Returns the step that packs, the scale that multiplies and its multipliers; None, and
    nothing, for absmean.
    """
    op = "bitlab::qat_linear"
    if scale is None:
        if step is not None or multiplier is not None:
            given = "a step" if multiplier is None else "multipliers"
            raise ArgumentError(f"{op}: scale must be given with {given}, got None")
        return None, weight.new_empty(0, dtype=torch.float32), None
    if multiplier is not None:
        if step is None:
            raise ArgumentError(f"{op}: step must be given with multipliers, got None")
        checks.check_devices(op, weight, scale, multiplier)
        checks.check_weight(op, weight)
        checks.check_multiplier(op, scale, multiplier, *weight.shape)
        return step, scale, multiplier
    # Before it is computed with.
    _check_step(op, "scale", weight, scale)
    if step is not None:
        return step, scale, None
    return estimators.learned_scales(scale, granularity)


def _qat_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    granularity: str,
    group_size: int,
    activation: str,
    out_dtype: torch.dtype,
    step: Tensor | None = None,
    scale: Tensor | None = None,
    multiplier: Tensor | None = None,
) -> QatOutputs:
    op = "bitlab::qat_linear"
    checks.check_memory(op, weight=weight, step=step, scale=scale, multiplier=multiplier)
    used = _qat_scale(weight, granularity, step, scale, multiplier)
    used_step, used_scale, used_multiplier = used
    if used_step is None:
        qweight, used_scale, packed = ops.pack_weight(weight, granularity, group_size)
        used_multiplier = given_multiplier(packed)
    else:
        qweight = _pack_codes(weight, used_step)
    args = (x, qweight, used_scale, bias, weight.shape[0], activation, out_dtype, used_multiplier)
    if activation == "float":
        y, codes = ops.linear(*args), x.new_empty(0, dtype=torch.int8)
        x_scale = x.new_empty(0, dtype=torch.float32)
    else:
        y, codes, x_scale = ops.linear_with_codes(*args)
    # An input must not be an output too; the backward pass keeps it by itself.
    if step is not None:
        used_scale, used_multiplier = used_scale.new_empty(0), None
    kept = ops.no_multiplier(x) if used_multiplier is None else used_multiplier
    return y, qweight, used_scale, kept, codes, x_scale


for _device in DEVICES:
    _library.impl("pack_codes", _pack_codes, _device)
    _library.impl("learned_gradients", _learned_gradients, _device)
    _library.impl("estimate", _estimate, _device)
    _library.impl("qat_linear", _qat_linear, _device)


@torch.library.register_fake("bitlab::pack_codes", lib=_library)
def _fake_pack_codes(weight: Tensor, step: Tensor) -> Tensor:
    _check_step("bitlab::pack_codes", "step", weight, step)
    return weight.new_empty(((weight.shape[0] + 3) // 4, weight.shape[1]), dtype=torch.uint8)


@torch.library.register_fake("bitlab::learned_gradients", lib=_library)
def _(dw: Tensor, weight: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    _check_learned(dw, weight, step)
    return weight.new_empty(weight.shape), step.new_empty(step.shape)


@torch.library.register_fake("bitlab::estimate", lib=_library)
def _(
    weight: Tensor, name: str, granularity: str, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    _check_estimate(weight, name, granularity, group_size)
    shape = ops.scale_shape(weight, granularity, group_size)
    step = weight.new_empty(shape, dtype=torch.float32)
    return step, *ops.fake_scale(weight, granularity, group_size)


@torch.library.register_fake("bitlab::qat_linear", lib=_library)
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    granularity: str,
    group_size: int,
    activation: str,
    out_dtype: torch.dtype,
    step: Tensor | None = None,
    scale: Tensor | None = None,
    multiplier: Tensor | None = None,
) -> QatOutputs:
    used = _qat_scale(weight, granularity, step, scale, multiplier)
    used_step, used_scale, used_multiplier = used
    if used_step is None:
        qweight, used_scale, packed = ops.fake_pack(weight, granularity, group_size)
        used_multiplier = packed if granularity == "per_group" else None
    else:
        qweight = _fake_pack_codes(weight, used_step)
    y = ops.fake_linear(
        x, qweight, used_scale, bias, weight.shape[0], activation, out_dtype, used_multiplier
    )
    quantized = activation != "float"
    codes = x.new_empty(x.shape if quantized else (0,), dtype=torch.int8)
    x_scale = x.new_empty((*x.shape[:-1], 1) if quantized else (0,), dtype=torch.float32)
    if step is not None:
        used_scale, used_multiplier = used_scale.new_empty(0), None
    kept = ops.no_multiplier(x) if used_multiplier is None else used_multiplier
    return y, qweight, used_scale, kept, codes, x_scale
