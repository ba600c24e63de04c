"""The torch ops ``torch.ops.bitlab.*``: schemas, fakes, autograd.

Ops never look at values and never branch on them, so they are captured by torch.compile and export.

``activation`` is ``"int8_per_token"``, ``"int8_per_tensor"`` or ``"float"`` (not quantized).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from bitcore import checks, reference
from bitcore.kernels.registry import kernels_for

_library = torch.library.Library("bitlab", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library.define("quantize_activation(Tensor x, bool per_tensor) -> (Tensor, Tensor)", tags=_TAGS)
_library.define(
    "pack_weight(Tensor weight, str granularity, int group_size) -> (Tensor, Tensor)", tags=_TAGS
)
_library.define(
    "unpack_weight(Tensor qweight, Tensor weight_scale, SymInt out_features, ScalarType dtype)"
    " -> Tensor",
    tags=_TAGS,
)
_library.define("matmul(Tensor codes, Tensor qweight, SymInt out_features) -> Tensor", tags=_TAGS)
_library.define(
    "linear(Tensor x, Tensor qweight, Tensor weight_scale, Tensor? bias, SymInt out_features,"
    " str activation, ScalarType out_dtype) -> Tensor",
    tags=_TAGS,
)
_library.define(
    "qat_linear(Tensor x, Tensor weight, Tensor? bias, str granularity, int group_size,"
    " str activation, ScalarType out_dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)

_DEVICES = ("CPU", "CUDA")


def _check_linear(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
    out_dtype: torch.dtype,
) -> None:
    checks.check_packed("bitlab::linear", qweight, weight_scale, out_features)
    checks.check_in_features("bitlab::linear", qweight.shape[1])
    checks.check_input("bitlab::linear", x, qweight.shape[1])
    checks.check_bias("bitlab::linear", bias, out_features)
    checks.check_activation("bitlab::linear", activation, out_dtype)


def _check_pack(op: str, weight: Tensor, granularity: str, group_size: int) -> None:
    checks.check_weight(op, weight)
    checks.check_group_size(op, weight.shape[1], granularity, group_size)


def _check_quantize(x: Tensor) -> None:
    checks.check_float("bitlab::quantize_activation", "x", x)
    checks.check_tokens("bitlab::quantize_activation", "x", x)


def _check_matmul(codes: Tensor, qweight: Tensor, out_features: int) -> None:
    checks.check_dtype("bitlab::matmul", "codes", codes, torch.int8)
    checks.check_packed("bitlab::matmul", qweight, None, out_features)
    checks.check_in_features("bitlab::matmul", qweight.shape[1])
    checks.check_last_axis("bitlab::matmul", "codes", codes, qweight.shape[1])


def _quantize_activation(x: Tensor, per_tensor: bool) -> tuple[Tensor, Tensor]:
    _check_quantize(x)
    return kernels_for(x.device.type).quantize_activation(x, per_tensor)


def _pack_weight(weight: Tensor, granularity: str, group_size: int) -> tuple[Tensor, Tensor]:
    _check_pack("bitlab::pack_weight", weight, granularity, group_size)
    return kernels_for(weight.device.type).pack_weight(weight, granularity, group_size)


def _unpack_weight(
    qweight: Tensor, weight_scale: Tensor, out_features: int, dtype: torch.dtype
) -> Tensor:
    checks.check_packed("bitlab::unpack_weight", qweight, weight_scale, out_features)
    return reference.unpack_weight(qweight, weight_scale, out_features, dtype)


def _matmul(codes: Tensor, qweight: Tensor, out_features: int) -> Tensor:
    _check_matmul(codes, qweight, out_features)
    return kernels_for(codes.device.type).matmul(codes, qweight, out_features)


def _linear(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    _check_linear(x, qweight, weight_scale, bias, out_features, activation, out_dtype)
    return kernels_for(x.device.type).linear(
        x, qweight, weight_scale, bias, out_features, activation, out_dtype
    )


def _qat_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    granularity: str,
    group_size: int,
    activation: str,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    qweight, scale = _pack_weight(weight, granularity, group_size)
    y = _linear(x, qweight, scale, bias, weight.shape[0], activation, out_dtype)
    if activation == "float":
        codes, x_scale = x.new_empty(0, dtype=torch.int8), x.new_empty(0, dtype=torch.float32)
    else:
        codes, x_scale = _quantize_activation(x, activation == "int8_per_tensor")
    return y, qweight, scale, codes, x_scale


for _device in _DEVICES:
    _library.impl("quantize_activation", _quantize_activation, _device)
    _library.impl("pack_weight", _pack_weight, _device)
    _library.impl("unpack_weight", _unpack_weight, _device)
    _library.impl("matmul", _matmul, _device)
    _library.impl("linear", _linear, _device)
    _library.impl("qat_linear", _qat_linear, _device)


@torch.library.register_fake("bitlab::quantize_activation", lib=_library)
def _(x: Tensor, per_tensor: bool) -> tuple[Tensor, Tensor]:
    _check_quantize(x)
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty((*x.shape[:-1], 1), dtype=torch.float32),
    )


def _scale_shape(weight: Tensor, granularity: str, group_size: int) -> tuple[int, ...]:
    if granularity == "per_group":
        return (weight.shape[0], weight.shape[1] // group_size)
    return (1,) if granularity == "per_tensor" else (weight.shape[0],)


@torch.library.register_fake("bitlab::pack_weight", lib=_library)
def _fake_pack(weight: Tensor, granularity: str, group_size: int) -> tuple[Tensor, Tensor]:
    _check_pack("bitlab::pack_weight", weight, granularity, group_size)
    rows = (weight.shape[0] + 3) // 4
    return (
        weight.new_empty((rows, weight.shape[1]), dtype=torch.uint8),
        weight.new_empty(_scale_shape(weight, granularity, group_size), dtype=torch.float32),
    )


@torch.library.register_fake("bitlab::unpack_weight", lib=_library)
def _(qweight: Tensor, weight_scale: Tensor, out_features: int, dtype: torch.dtype) -> Tensor:
    checks.check_packed("bitlab::unpack_weight", qweight, weight_scale, out_features)
    return qweight.new_empty((out_features, qweight.shape[1]), dtype=dtype)


@torch.library.register_fake("bitlab::matmul", lib=_library)
def _(codes: Tensor, qweight: Tensor, out_features: int) -> Tensor:
    _check_matmul(codes, qweight, out_features)
    return codes.new_empty((*codes.shape[:-1], out_features), dtype=torch.int32)


@torch.library.register_fake("bitlab::linear", lib=_library)
def _fake_linear(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
    out_dtype: torch.dtype,
) -> Tensor:
    _check_linear(x, qweight, weight_scale, bias, out_features, activation, out_dtype)
    return x.new_empty((*x.shape[:-1], out_features), dtype=out_dtype)


@torch.library.register_fake("bitlab::qat_linear", lib=_library)
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    granularity: str,
    group_size: int,
    activation: str,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    qweight, scale = _fake_pack(weight, granularity, group_size)
    y = _fake_linear(x, qweight, scale, bias, weight.shape[0], activation, out_dtype)
    quantized = activation != "float"
    codes = x.new_empty(x.shape if quantized else (0,), dtype=torch.int8)
    x_scale = x.new_empty((*x.shape[:-1], 1) if quantized else (0,), dtype=torch.float32)
    return y, qweight, scale, codes, x_scale


def _no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Keeps autocast from rounding what is computed here on purpose in another dtype."""
    device = tensor.device.type
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def _input_gradient(
    dy: Tensor, qweight: Tensor, weight_scale: Tensor, out_features: int, dtype: torch.dtype
) -> Tensor:
    """``dx = dy @ (w_q * s_w)``, computed in dy's dtype."""
    with _no_autocast(dy):
        weight = torch.ops.bitlab.unpack_weight(qweight, weight_scale, out_features, dy.dtype)
        dx: Tensor = (dy @ weight).to(dtype)
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


def _qat_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, _, activation, _ = inputs
    _, qweight, weight_scale, codes, x_scale = output
    if activation == "float":
        ctx.save_for_backward(qweight, weight_scale, x)
    else:
        ctx.save_for_backward(qweight, weight_scale, codes, x_scale)
    ctx.out_features, ctx.x_dtype = weight.shape[0], x.dtype
    ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype


def _qat_backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """Straight-through gradients: ``dx = dy @ (w_q s_w)``, ``dW = dy.T @ (x_q s_x)``."""
    qweight, weight_scale, *inputs = ctx.saved_tensors
    dx = dw = db = None
    if ctx.needs_input_grad[0]:
        dx = _input_gradient(dy, qweight, weight_scale, ctx.out_features, ctx.x_dtype)
    rows = dy.reshape(-1, ctx.out_features)
    if ctx.needs_input_grad[1]:
        with _no_autocast(dy):
            x = inputs[0] if len(inputs) == 1 else inputs[0].float() * inputs[1]
            x = x.to(dy.dtype).reshape(-1, x.shape[-1])
            dw = (rows.t() @ x).to(ctx.weight_dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
        db = rows.float().sum(0).to(ctx.bias_dtype)
    return dx, dw, db, None, None, None, None


torch.library.register_autograd(
    "bitlab::linear", _linear_backward, setup_context=_linear_setup, lib=_library
)
torch.library.register_autograd(
    "bitlab::qat_linear", _qat_backward, setup_context=_qat_setup, lib=_library
)


def output_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype that a linear layer gives for x: autocast's under autocast, else x's."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def pack_weight(weight: Tensor, granularity: str, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Ternarizes and packs a float weight.

    Args:
        weight: float32, bfloat16 or float16 [N, K].
        granularity: ``"per_tensor"``, ``"per_channel"`` or ``"per_group"``.
        group_size: G with ``"per_group"``, else None.

    Returns:
        qweight uint8 [ceil(N / 4), K] and its scale, float32 [1], [N] or [N, K / G].
    """
    packed: tuple[Tensor, Tensor] = torch.ops.bitlab.pack_weight(
        weight, granularity, group_size or 0
    )
    return packed


def unpack_weight(
    qweight: Tensor, weight_scale: Tensor, out_features: int, dtype: torch.dtype
) -> Tensor:
    """Returns codes times scale as [N, K] of dtype: one float32 product, one rounding."""
    weight: Tensor = torch.ops.bitlab.unpack_weight(qweight, weight_scale, out_features, dtype)
    return weight


def linear(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
) -> Tensor:
    """``y = (x_q @ w_q.T) * (x_scale * weight_scale) + bias`` on packed weights.

    Args:
        x: float32, bfloat16 or float16 [..., K].
        qweight: uint8 [ceil(N / 4), K].
        weight_scale: float32 [1], [N] or [N, K / G].
        bias: float [N], or None; it gets no gradient.
        out_features: N.
        activation: how x is quantized.

    Returns:
        [..., N] of x's dtype, or autocast's under autocast. Its gradient reaches x only.

    Numerics:
        The sums are exact integers; every float32 operation is rounded in the order written, and
        the result once more to the output dtype. A token with NaN or infinity gives NaN.
    """
    y: Tensor = torch.ops.bitlab.linear(
        x, qweight, weight_scale, bias, out_features, activation, output_dtype(x)
    )
    return y


def qat_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    granularity: str,
    group_size: int | None,
    activation: str,
) -> Tensor:
    """The same forward as `linear`, from latent weights, with straight-through gradients.

    ``dx = dy @ (w_q s_w)``, ``dW = dy.T @ (x_q s_x)``, ``db = sum(dy)``; see `linear` and
    `pack_weight` for the arguments. The backward products are computed in the output's dtype.

    Source: BitNet b1.58, arXiv 2402.17764, section 2; straight-through estimator, arXiv 1308.3432.
    """
    y: Tensor = torch.ops.bitlab.qat_linear(
        x, weight, bias, granularity, group_size or 0, activation, output_dtype(x)
    )[0]
    return y
