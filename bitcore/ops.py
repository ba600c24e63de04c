"""The functions that call ``torch.ops.bitlab.*``.

Ops never look at values and never branch on them, so they are captured by torch.compile and export.

``activation`` is ``"int8_per_token"``, ``"int8_per_tensor"`` or ``"float"`` (not quantized).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# They register themselves.
from bitcore import (  # noqa: F401
    checks,
    gradients,
    ops_experts,
    ops_int8,
    ops_qat,
    ops_ternary,
)
from bitcore.kernels.registry import kernels_for
from bitcore.plain import is_memory


def output_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype that a linear layer gives for x: autocast's under autocast, else x's."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def pack_weight(weight: Tensor, granularity: str, group_size: int | None) -> tuple[Tensor, ...]:
    """Ternarizes and packs a float weight.

    Args:
        weight: float32, bfloat16 or float16 [N, K].
        granularity: ``"per_tensor"``, ``"per_channel"``, ``"per_group"`` (scales in two levels) or
            ``"per_group_float32"`` (a float32 scale for each group).
        group_size: G of groups, else None.

    Returns:
        qweight uint8 [ceil(N / 4), K] and its scale, float32 [1], [N] or [N, K / G]; for
        ``"per_group"`` qweight, a scale [N] and multipliers uint8 [N, K / G].
    """
    qweight, scale, multiplier = torch.ops.bitlab.pack_weight(weight, granularity, group_size or 0)
    return (qweight, scale, multiplier) if granularity == "per_group" else (qweight, scale)


def row_sums(weight: Tensor) -> Tensor:
    """Returns the sums of the magnitudes of each row, for a scale of more rows than are here.

    Not an op: no graph has it.

    Args:
        weight: float32, bfloat16 or float16 [N, K].

    Returns:
        float64 [N], each in the order of `bitcore.quantize.weight_scale`, whose scale of the tensor
        is ``mean_scale(total(sums), N * K)`` of the sums of all rows.

    Raises:
        ArgumentError: weight is not [N, K] with N and K at least 1 and K at most 131071.
        ArgumentTypeError: weight has another dtype.
    """
    checks.check_weight("row_sums", weight)
    checks.check_memory("row_sums", weight=weight)
    # No dispatcher to make memory of what only stands for it.
    weight = weight if is_memory(weight) else weight.clone()
    return kernels_for(weight.device.type).row_sums(weight)


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
) -> tuple[Tensor, ...]:
    """Returns the step and scale of a registered estimator, and multipliers where the scale is in
    two levels; see `bitcore.estimators.estimate`.

    One op, so that a compiled model gets the bits of an eager one. No gradient goes through it.
    """
    step, scale, multiplier = torch.ops.bitlab.estimate(
        weight.detach(), name, granularity, group_size or 0
    )
    return (step, scale, multiplier) if granularity == "per_group" else (step, scale)


def unpack_weight(
    qweight: Tensor,
    weight_scale: Tensor,
    out_features: int,
    dtype: torch.dtype,
    multiplier: Tensor | None = None,
) -> Tensor:
    """Returns codes (times multipliers, exactly) times scale as [N, K] of dtype: one float32
    product, one rounding.
    """
    weight: Tensor = torch.ops.bitlab.unpack_weight(
        qweight, weight_scale, out_features, dtype, multiplier
    )
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
    multiplier: Tensor | None = None,
) -> Tensor:
    """``y = (x_q @ w_q.T) * (x_scale * weight_scale) + bias`` on packed weights.

    Args:
        x: float32, bfloat16 or float16 [..., K].
        qweight: uint8 [ceil(N / 4), K].
        weight_scale: float32 [1], [N] or [N, K / G].
        bias: float [N], or None.
        out_features: N.
        activation: how x is quantized.
        multiplier: uint8 [N, K / G] up to 127, which the codes of a group are multiplied with
            first, beside a weight_scale [N]; or None.

    Returns:
        [..., N] of x's dtype, or autocast's under autocast. Gradients reach x and bias.

    Numerics:
        The sums are exact integers; every float32 operation is rounded in the order written, and
        the result once more to the output dtype. A token with NaN or infinity gives NaN.
    """
    y: Tensor = torch.ops.bitlab.linear(
        x, qweight, weight_scale, bias, out_features, activation, output_dtype(x), multiplier
    )
    return y


def experts_linear(
    x: Tensor,
    index: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
    multiplier: Tensor | None = None,
) -> Tensor:
    """`linear` of each token with the weights of its experts, those of all experts in one call.

    Args:
        x: float32, bfloat16 or float16 [M, K].
        index: int64 with S entries, as many for each token, one token after the other:
            the expert that each row of the result is of. Any number that is not one of an expert
            is none.
        qweight: uint8 [E, ceil(N / 4), K].
        weight_scale: float32 [E, 1], [E, N] or [E, N, K / G].
        bias: float [E, N], or None.
        out_features: N.
        activation: how x is quantized; with one scale a tensor, the tokens of an expert have one.
        multiplier: uint8 [E, N, K / G] up to 127, beside a weight_scale [E, N]; or None.

    Returns:
        [S, N] of x's dtype, or autocast's under autocast; zeros for no expert. Gradients reach x
        and bias.

    Numerics:
        The same bits as one `linear` for each expert with its tokens.
    """
    y: Tensor = torch.ops.bitlab.experts_linear(
        x,
        index,
        qweight,
        weight_scale,
        bias,
        out_features,
        activation,
        output_dtype(x),
        multiplier,
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
    multiplier: Tensor | None = None,
) -> Tensor:
    """The same forward as `linear`, from latent weights, with straight-through gradients.

    ``dx = dy @ (w_q s_w)``, ``dW = dy.T @ (x_q s_x)``, ``db = sum(dy)``; see `linear` and
    `pack_weight` for the arguments. The backward products are computed in the output's dtype.

    Which weights, and which straight-through estimator:

    - neither step nor scale: absmean, estimated and packed at once; gradients as above;
    - step and scale, float32 [1], [N] or [N, K / G], and multipliers where the scale is in two
      levels: constants, as `estimate` gives them; gradients as above, none through these;
    - scale alone: learned, and the step too, both brought to two levels with ``"per_group"``; it
      gets a gradient, and that of the weight stops where ``|W| >= 1.5 scale``:
      `bitcore.reference.learned_gradients`.

    Source: BitNet b1.58, arXiv 2402.17764, section 2; straight-through estimator, arXiv 1308.3432;
    learned scale, arXiv 1902.08153.
    """
    y: Tensor = torch.ops.bitlab.qat_linear(
        x,
        weight,
        bias,
        granularity,
        group_size or 0,
        activation,
        output_dtype(x),
        step,
        scale,
        multiplier,
    )[0]
    return y
