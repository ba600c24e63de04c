"""The torch ops ``torch.ops.bitlab.*``: implementations and fakes.

Ops never look at values and never branch on them, so they are captured by torch.compile and export.

``activation`` is ``"int8_per_token"``, ``"int8_per_tensor"`` or ``"float"`` (not quantized).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitcore import checks, gradients, ops_int8  # noqa: F401  (they register themselves)
from bitcore.errors import ArgumentTypeError
from bitcore.kernels.registry import kernels_for
from bitcore.plain import is_memory
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
) -> None:
    op = "bitlab::linear"
    checks.check_devices(op, x, qweight, weight_scale, bias)
    checks.check_linear_weights(qweight, weight_scale, bias, out_features, activation)
    checks.check_input(op, x, qweight.shape[1])
    checks.check_out_dtype(op, out_dtype)


def _check_pack(op: str, weight: Tensor, granularity: str, group_size: int) -> None:
    checks.check_weight(op, weight)
    checks.check_group_size(op, weight.shape[1], granularity, group_size)


def _check_quantize(x: Tensor) -> None:
    checks.check_float("bitlab::quantize_activation", "x", x)
    checks.check_tokens("bitlab::quantize_activation", "x", x)


def _check_unpack(
    qweight: Tensor, weight_scale: Tensor, out_features: int, dtype: torch.dtype
) -> None:
    op = "bitlab::unpack_weight"
    checks.check_devices(op, qweight, weight_scale)
    checks.check_packed(op, qweight, weight_scale, out_features)
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


def _pack_weight(weight: Tensor, granularity: str, group_size: int) -> tuple[Tensor, Tensor]:
    _check_pack("bitlab::pack_weight", weight, granularity, group_size)
    checks.check_memory("bitlab::pack_weight", weight=weight)
    return kernels_for(weight.device.type).pack_weight(weight, granularity, group_size)


def _unpack_weight(
    qweight: Tensor, weight_scale: Tensor, out_features: int, dtype: torch.dtype
) -> Tensor:
    _check_unpack(qweight, weight_scale, out_features, dtype)
    checks.check_memory("bitlab::unpack_weight", qweight=qweight, weight_scale=weight_scale)
    return kernels_for(qweight.device.type).unpack_weight(
        qweight, weight_scale, out_features, dtype
    )


def _matmul(codes: Tensor, qweight: Tensor, out_features: int) -> Tensor:
    _check_matmul(codes, qweight, out_features)
    checks.check_memory("bitlab::matmul", codes=codes, qweight=qweight)
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
    checks.check_linear_memory(x, qweight, weight_scale, bias)
    return kernels_for(x.device.type).linear(
        x, qweight, weight_scale, bias, out_features, activation, out_dtype
    )


def _linear_with_codes(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_linear(x, qweight, weight_scale, bias, out_features, activation, out_dtype)
    checks.check_linear_memory(x, qweight, weight_scale, bias)
    return kernels_for(x.device.type).linear_with_codes(
        x, qweight, weight_scale, bias, out_features, activation, out_dtype
    )


def _check_gradient(
    dy: Tensor, qweight: Tensor, weight_scale: Tensor, out_features: int, dtype: torch.dtype
) -> None:
    op = "bitlab::input_gradient"
    checks.check_devices(op, dy, qweight, weight_scale)
    checks.check_packed(op, qweight, weight_scale, out_features)
    checks.check_float(op, "dy", dy)
    checks.check_last_axis(op, "dy", dy, out_features)
    checks.check_out_dtype(op, dtype)


def _input_gradient_op(
    dy: Tensor, qweight: Tensor, weight_scale: Tensor, out_features: int, dtype: torch.dtype
) -> Tensor:
    _check_gradient(dy, qweight, weight_scale, out_features, dtype)
    checks.check_memory("bitlab::input_gradient", dy=dy, qweight=qweight, weight_scale=weight_scale)
    return kernels_for(dy.device.type).input_gradient(
        dy, qweight, weight_scale, out_features, dtype
    )


for _device in DEVICES:
    _library.impl("quantize_activation", _quantize_activation, _device)
    _library.impl("pack_weight", _pack_weight, _device)
    _library.impl("unpack_weight", _unpack_weight, _device)
    _library.impl("matmul", _matmul, _device)
    _library.impl("linear", _linear, _device)
    _library.impl("input_gradient", _input_gradient_op, _device)


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
    _check_unpack(qweight, weight_scale, out_features, dtype)
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


@torch.library.register_fake("bitlab::input_gradient", lib=_library)
def _(
    dy: Tensor, qweight: Tensor, weight_scale: Tensor, out_features: int, dtype: torch.dtype
) -> Tensor:
    _check_gradient(dy, qweight, weight_scale, out_features, dtype)
    return dy.new_empty((*dy.shape[:-1], qweight.shape[1]), dtype=dtype)


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


def pack_codes(weight: Tensor, step: Tensor) -> Tensor:
    """Ternarizes with a given step, ``clamp(round(W * (1 / step)), -1, 1)``, and packs.

    Args:
        weight: float32, bfloat16 or float16 [N, K].
        step: float32 [1], [N] or [N, K / G], positive.

    Returns:
        qweight uint8 [ceil(N / 4), K]; multiply it by any scale of the step's shape.
    """
    qweight: Tensor = torch.ops.bitlab.pack_codes(weight, step)
    return qweight


def estimate(
    weight: Tensor, name: str, granularity: str, group_size: int | None
) -> tuple[Tensor, Tensor]:
    """Returns the step and scale of a registered estimator; see `bitcore.estimators.estimate`.

    One op, so that a compiled model gets the bits of an eager one. No gradient goes through it.
    """
    scales: tuple[Tensor, Tensor] = torch.ops.bitlab.estimate(
        weight.detach(), name, granularity, group_size or 0
    )
    return scales


def unpack_weight(
    qweight: Tensor, weight_scale: Tensor, out_features: int, dtype: torch.dtype
) -> Tensor:
    """Returns codes times scale as [N, K] of dtype: one float32 product, one rounding."""
    weight: Tensor = torch.ops.bitlab.unpack_weight(qweight, weight_scale, out_features, dtype)
    return weight


def has_invalid_code(qweight: Tensor) -> bool:
    """Tells whether any of the four codes of any byte is 3, which no writer produces.

    Not an op: it looks at values, and waits for them on a GPU.

    Args:
        qweight: uint8, any shape.

    Raises:
        ArgumentTypeError: qweight is not uint8.
    """
    return find_invalid_code([qweight]) is not None


def find_invalid_code(qweights: Sequence[Tensor]) -> int | None:
    """Finds the first of several packed matrices that holds the code 3, which no writer produces.

    Reads those of each device type in one go, which is quicker than one by one.

    Args:
        qweights: uint8, any shapes.

    Returns:
        Its index, or None.

    Raises:
        ArgumentTypeError: A matrix is not uint8.
    """
    op = "find_invalid_code"
    for qweight in qweights:
        checks.check_dtype(op, "qweight", qweight, torch.uint8)
        checks.check_memory(op, qweight=qweight)
    # No op, so no dispatcher to make memory of what only stands for it.
    qweights = [one if is_memory(one) else one.clone() for one in qweights]
    found: list[int] = []
    for device in {qweight.device.type for qweight in qweights}:
        held = [index for index, one in enumerate(qweights) if one.device.type == device]
        first = kernels_for(device).find_invalid_code([qweights[index] for index in held])
        found += [] if first is None else [held[first]]
    return min(found, default=None)


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
        bias: float [N], or None.
        out_features: N.
        activation: how x is quantized.

    Returns:
        [..., N] of x's dtype, or autocast's under autocast. Gradients reach x and bias.

    Numerics:
        The sums are exact integers; every float32 operation is rounded in the order written, and
        the result once more to the output dtype. A token with NaN or infinity gives NaN.
    """
    y: Tensor = torch.ops.bitlab.linear(
        x, qweight, weight_scale, bias, out_features, activation, output_dtype(x)
    )
    return y


def linear_int8(x: Tensor, qweight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """``y = (x_q @ qweight.T) * (x_scale * weight_scale) + bias`` on int8 weights.

    Args:
        x: float32, bfloat16 or float16 [..., K]; quantized to int8 per token.
        qweight: int8 [N, K].
        weight_scale: float32 [N].
        bias: float [N], or None.

    Returns:
        [..., N] of x's dtype, or autocast's under autocast. Gradients reach x and bias.

    Numerics:
        As `linear`: exact integer sums, every float32 operation rounded in the order written.
    """
    y: Tensor = torch.ops.bitlab.linear_int8(x, qweight, weight_scale, bias, output_dtype(x))
    return y


def qat_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    granularity: str,
    group_size: int | None,
    activation: str,
    step: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """The same forward as `linear`, from latent weights, with straight-through gradients.

    ``dx = dy @ (w_q s_w)``, ``dW = dy.T @ (x_q s_x)``, ``db = sum(dy)``; see `linear` and
    `pack_weight` for the arguments. The backward products are computed in the output's dtype.

    Which weights, and which straight-through estimator:

    - neither step nor scale: absmean, estimated and packed at once; gradients as above;
    - step and scale, float32 [1], [N] or [N, K / G]: constants, as `estimate` gives them; gradients
      as above, none through step or scale;
    - scale alone: learned, and the step too; it gets a gradient, and that of the weight stops
      where ``|W| >= 1.5 scale``: `bitcore.estimators.lsq_gradients`. Granularity and group_size
      are not read in the last two: the shapes say them.

    Source: BitNet b1.58, arXiv 2402.17764, section 2; straight-through estimator, arXiv 1308.3432;
    learned scale, arXiv 1902.08153.
    """
    y: Tensor = torch.ops.bitlab.qat_linear(
        x, weight, bias, granularity, group_size or 0, activation, output_dtype(x), step, scale
    )[0]
    return y
