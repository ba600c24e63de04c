"""The argument checks of the ops: one checker serves the fake and the real implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from bitcore.errors import ArgumentError, ArgumentTypeError

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Groups have a float32 scale a row and an integer multiplier a group, or a float32 scale each.
GROUPED = ("per_group", "per_group_float32")
GRANULARITIES = ("per_tensor", "per_channel", *GROUPED)
GROUP_SIZES = (64, 128)
MOST_MULTIPLIER = 127
ACTIVATIONS = ("int8_per_token", "int8_per_tensor", "float")
# A sum of this many products of the int8 code -128 and the weight byte 128 still fits int32.
MAX_IN_FEATURES = 131071
# Tensors of a freed storage point at nothing, plus their offset. Few storages lie so low: what says
# it does is looked at.
LOWEST_ADDRESS = 2**32


def check_float(op: str, name: str, tensor: Tensor) -> None:
    """Checks that a tensor has one of the float dtypes that the kernels know."""
    if tensor.dtype not in FLOAT_DTYPES:
        raise ArgumentTypeError(
            f"{op}: {name} must be float32, bfloat16 or float16, got {tensor.dtype}"
        )


def check_dtype(op: str, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Checks that a tensor has exactly this dtype."""
    if tensor.dtype != dtype:
        raise ArgumentTypeError(f"{op}: {name} must be {dtype}, got {tensor.dtype}")


def check_devices(op: str, first: Tensor, *others: Tensor | None) -> None:
    """Checks that all tensors are on the first one's device: kernels are given bare pointers."""
    for other in others:
        if other is not None and other.device != first.device:
            raise ArgumentError(
                f"{op}: all tensors must be on {first.device}, got one on {other.device}"
            )


def check_memory(op: str, **tensors: Tensor | None) -> None:
    """Checks that tensors have memory: it can be freed behind a tensor's back, as FSDP does. For
    implementations only, since fakes have none.

    A storage that was made smaller, not freed, is found where it costs nothing only: looking at
    every storage would take a twentieth of a small layer's time.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.data_ptr() < LOWEST_ADDRESS:
            check_storage(op, name, tensor)


def check_linear_memory(
    x: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    multiplier: Tensor | None,
) -> None:
    """`check_memory` of what ``bitlab::linear`` takes."""
    if (
        x.data_ptr() < LOWEST_ADDRESS
        or qweight.data_ptr() < LOWEST_ADDRESS
        or weight_scale.data_ptr() < LOWEST_ADDRESS
        or (bias is not None and bias.data_ptr() < LOWEST_ADDRESS)
        or (multiplier is not None and multiplier.data_ptr() < LOWEST_ADDRESS)
    ):
        check_memory(
            "bitlab::linear",
            x=x,
            qweight=qweight,
            weight_scale=weight_scale,
            bias=bias,
            multiplier=multiplier,
        )


def check_storage(op: str, name: str, tensor: Tensor) -> None:
    """Checks that a storage holds all of a tensor."""
    if not tensor.numel():
        return
    held = tensor.untyped_storage().nbytes()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((size - 1) * stride for size, stride in steps)
    if held < (last + 1) * tensor.element_size():
        raise ArgumentError(
            f"{op}: {name} must have its memory, got {list(tensor.shape)} over a storage of "
            f"{held} bytes\nIt was freed or made smaller, as FSDP does between two passes."
        )


def check_weight(op: str, weight: Tensor) -> None:
    """Checks a float weight [N, K], N and K at least 1."""
    check_float(op, "weight", weight)
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ArgumentError(
            f"{op}: weight must be [N, K] with N and K at least 1, got {list(weight.shape)}"
        )
    check_in_features(op, weight.shape[1])


def check_in_features(op: str, in_features: int) -> None:
    """Checks that sums over K stay exact in int32."""
    if in_features > MAX_IN_FEATURES:
        raise ArgumentError(
            f"{op}: in_features must be at most {MAX_IN_FEATURES} for exact int32 sums, "
            f"got {in_features}"
        )


def check_group_size(op: str, in_features: int, granularity: str, group_size: int) -> None:
    """Checks that groups divide in_features; group_size is 0 where there are none."""
    if granularity not in GRANULARITIES:
        raise ArgumentError(
            f"{op}: granularity must be one of {GRANULARITIES}, got {granularity!r}"
        )
    if granularity not in GROUPED:
        return
    if granularity == "per_group" and group_size not in GROUP_SIZES:
        raise ArgumentError(f"{op}: group_size must be one of {GROUP_SIZES}, got {group_size}")
    if group_size <= 0 or group_size % 64 != 0:
        raise ArgumentError(f"{op}: group_size must be a multiple of 64, got {group_size}")
    if in_features % group_size != 0:
        raise ArgumentError(
            f"{op}: in_features must be a multiple of group_size {group_size}, got {in_features}\n"
            "Leave this layer out, or use another group size or weight_granularity."
        )


def check_packed(
    op: str,
    qweight: Tensor,
    weight_scale: Tensor | None,
    out_features: int,
    multiplier: Tensor | None = None,
) -> None:
    """Checks a packed weight, uint8 [ceil(N / 4), K], its float32 scale if one is used, and the
    multipliers of its groups if there are any.
    """
    check_dtype(op, "qweight", qweight, torch.uint8)
    rows = (out_features + 3) // 4
    if qweight.dim() != 2 or qweight.shape[0] != rows or out_features < 1 or qweight.shape[1] < 1:
        raise ArgumentError(
            f"{op}: qweight must be [{rows}, K] for out_features {out_features}, "
            f"got {list(qweight.shape)}"
        )
    check_in_features(op, qweight.shape[1])
    if weight_scale is None:
        return
    if multiplier is None:
        check_scale(op, "weight_scale", weight_scale, out_features, qweight.shape[1])
    else:
        check_multiplier(op, weight_scale, multiplier, out_features, qweight.shape[1])


def check_multiplier(
    op: str, weight_scale: Tensor, multiplier: Tensor, out_features: int, in_features: int
) -> None:
    """Checks scales in two levels: float32 [N], and uint8 [N, K / G] for groups of 64 or 128."""
    check_dtype(op, "weight_scale", weight_scale, torch.float32)
    check_dtype(op, "multiplier", multiplier, torch.uint8)
    if list(weight_scale.shape) != [out_features]:
        raise ArgumentError(
            f"{op}: weight_scale must be [{out_features}] beside multipliers of groups, got "
            f"{list(weight_scale.shape)}"
        )
    shapes = [[out_features, in_features // size] for size in GROUP_SIZES if not in_features % size]
    if list(multiplier.shape) in shapes:
        return
    raise ArgumentError(
        f"{op}: multiplier must be [{out_features}, {in_features} / group size] with groups of 64 "
        f"or 128, got {list(multiplier.shape)}"
    )


def check_scale(op: str, name: str, scale: Tensor, out_features: int, in_features: int) -> None:
    """Checks the shape of scales or steps: float32 [1], [N] or [N, K / G], G a multiple of 64."""
    check_dtype(op, name, scale, torch.float32)
    shape = scale.shape
    if len(shape) == 1 and (shape[0] == 1 or shape[0] == out_features):
        return
    if len(shape) == 2 and shape[0] == out_features:
        columns = shape[1]
        if columns > 0 and in_features % columns == 0 and in_features // columns % 64 == 0:
            return
    raise ArgumentError(
        f"{op}: {name} must be [1], [{out_features}] or [{out_features}, {in_features} / "
        f"group size] with groups of a multiple of 64, got {list(shape)}"
    )


def check_int8(op: str, qweight: Tensor, weight_scale: Tensor) -> None:
    """Checks an int8 weight [N, K] and its float32 scale [N]."""
    check_dtype(op, "qweight", qweight, torch.int8)
    check_dtype(op, "weight_scale", weight_scale, torch.float32)
    if qweight.dim() != 2 or qweight.shape[0] == 0 or qweight.shape[1] == 0:
        raise ArgumentError(
            f"{op}: qweight must be [N, K] with N and K at least 1, got {list(qweight.shape)}"
        )
    check_in_features(op, qweight.shape[1])
    if list(weight_scale.shape) != [qweight.shape[0]]:
        raise ArgumentError(
            f"{op}: weight_scale must be [{qweight.shape[0]}], got {list(weight_scale.shape)}"
        )


def check_input(op: str, x: Tensor, in_features: int) -> None:
    """Checks activations [..., K]."""
    check_float(op, "x", x)
    check_last_axis(op, "x", x, in_features)


def check_last_axis(op: str, name: str, tensor: Tensor, in_features: int) -> None:
    """Checks that the last axis is in_features."""
    if tensor.dim() == 0 or tensor.shape[-1] != in_features:
        raise ArgumentError(
            f"{op}: {name} must be [..., {in_features}] (in_features last), "
            f"got {list(tensor.shape)}"
        )


def check_tokens(op: str, name: str, tensor: Tensor) -> None:
    """Checks that a tensor has a last axis of at least one element, and not too many."""
    if tensor.dim() == 0 or tensor.shape[-1] == 0:
        raise ArgumentError(
            f"{op}: {name} must be [..., K] with K at least 1, got {list(tensor.shape)}"
        )
    check_in_features(op, tensor.shape[-1])


def check_bias(op: str, bias: Tensor | None, out_features: int) -> None:
    """Checks a bias [N] of any float dtype, or None."""
    if bias is None:
        return
    check_float(op, "bias", bias)
    if bias.dim() != 1 or bias.shape[0] != out_features:
        raise ArgumentError(f"{op}: bias must be [{out_features}], got {list(bias.shape)}")


def check_out_dtype(op: str, out_dtype: torch.dtype) -> None:
    """Checks the dtype of an output."""
    if out_dtype not in FLOAT_DTYPES:
        raise ArgumentTypeError(
            f"{op}: out_dtype must be float32, bfloat16 or float16, got {out_dtype}"
        )


def check_linear_weights(
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
    multiplier: Tensor | None = None,
) -> None:
    """Checks what ``bitlab::linear`` takes beside its input."""
    op = "bitlab::linear"
    check_packed(op, qweight, weight_scale, out_features, multiplier)
    check_bias(op, bias, out_features)
    if activation not in ACTIVATIONS:
        raise ArgumentError(f"{op}: activation must be one of {ACTIVATIONS}, got {activation!r}")
