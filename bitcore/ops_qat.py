"""The ops of training, ``bitlab::qat_linear`` and what estimators need: implementations and fakes.

Importing this module registers them; `bitcore.ops` has the functions that call them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitcore import checks, estimators, ops
from bitcore.errors import ArgumentError
from bitcore.kernels.registry import kernels_for
from bitcore.schemas import DEVICES
from bitcore.schemas import library as _library


def _check_step(op: str, name: str, weight: Tensor, step: Tensor) -> None:
    checks.check_devices(op, weight, step)
    checks.check_weight(op, weight)
    checks.check_scale(op, name, step, *weight.shape)


def _pack_codes(weight: Tensor, step: Tensor) -> Tensor:
    _check_step("bitlab::pack_codes", "step", weight, step)
    checks.check_memory("bitlab::pack_codes", weight=weight, step=step)
    return kernels_for(weight.device.type).pack_codes(weight, step)


def _check_estimate(weight: Tensor, name: str, granularity: str, group_size: int) -> None:
    estimators.get_estimator(name)
    ops._check_pack("bitlab::estimate", weight, granularity, group_size)


def _estimate(
    weight: Tensor, name: str, granularity: str, group_size: int
) -> tuple[Tensor, Tensor]:
    _check_estimate(weight, name, granularity, group_size)
    checks.check_memory("bitlab::estimate", weight=weight)
    step, scale = estimators.estimate(weight, name, granularity, group_size)
    # No output of an op may be another one of its outputs.
    return step, scale.clone() if scale.data_ptr() == step.data_ptr() else scale


def _qat_scale(
    weight: Tensor, step: Tensor | None, scale: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Returns the step that packs and the scale that multiplies; None, and nothing, for absmean."""
    op = "bitlab::qat_linear"
    if scale is None:
        if step is not None:
            raise ArgumentError(f"{op}: scale must be given with a step, got None")
        return None, torch.empty(0)
    # Before it is computed with.
    _check_step(op, "scale", weight, scale)
    if step is not None:
        return step, scale
    learned = estimators.learned_step(scale)
    return learned, learned


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    checks.check_memory("bitlab::qat_linear", weight=weight, step=step, scale=scale)
    used_step, used_scale = _qat_scale(weight, step, scale)
    if used_step is None:
        qweight, used_scale = ops._pack_weight(weight, granularity, group_size)
    else:
        qweight = _pack_codes(weight, used_step)
    args = (x, qweight, used_scale, bias, weight.shape[0], activation, out_dtype)
    if activation == "float":
        y, codes = ops._linear(*args), x.new_empty(0, dtype=torch.int8)
        x_scale = x.new_empty(0, dtype=torch.float32)
    else:
        y, codes, x_scale = ops._linear_with_codes(*args)
    # An input must not be an output too; the backward pass keeps it by itself.
    kept = used_scale if step is None else used_scale.new_empty(0)
    return y, qweight, kept, codes, x_scale


for _device in DEVICES:
    _library.impl("pack_codes", _pack_codes, _device)
    _library.impl("estimate", _estimate, _device)
    _library.impl("qat_linear", _qat_linear, _device)


@torch.library.register_fake("bitlab::pack_codes", lib=_library)
def _fake_pack_codes(weight: Tensor, step: Tensor) -> Tensor:
    _check_step("bitlab::pack_codes", "step", weight, step)
    return weight.new_empty(((weight.shape[0] + 3) // 4, weight.shape[1]), dtype=torch.uint8)


@torch.library.register_fake("bitlab::estimate", lib=_library)
def _(weight: Tensor, name: str, granularity: str, group_size: int) -> tuple[Tensor, Tensor]:
    _check_estimate(weight, name, granularity, group_size)
    shape = ops._scale_shape(weight, granularity, group_size)
    return (
        weight.new_empty(shape, dtype=torch.float32),
        weight.new_empty(shape, dtype=torch.float32),
    )


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    used_step, used_scale = _qat_scale(weight, step, scale)
    if used_step is None:
        qweight, used_scale = ops._fake_pack(weight, granularity, group_size)
    else:
        qweight = _fake_pack_codes(weight, used_step)
    y = ops._fake_linear(x, qweight, used_scale, bias, weight.shape[0], activation, out_dtype)
    quantized = activation != "float"
    codes = x.new_empty(x.shape if quantized else (0,), dtype=torch.int8)
    x_scale = x.new_empty((*x.shape[:-1], 1) if quantized else (0,), dtype=torch.float32)
    kept = used_scale if step is None else used_scale.new_empty(0)
    return y, qweight, kept, codes, x_scale
