"""The torch ops of the packed weights of all experts of a layer: implementations, fakes, gradients.

Importing this module registers them; `bitcore.ops` has the function that calls them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitcore import checks, reference
from bitcore.errors import ArgumentError
from bitcore.kernels.registry import kernels_for
from bitcore.plain import is_memory
from bitcore.schemas import DEVICES
from bitcore.schemas import library as _library

_LINEAR = "bitlab::experts_linear"


def check_experts_weights(
    op: str,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    multiplier: Tensor | None,
) -> None:
    """Checks the packed weights of all experts: each tensor those of one, stacked."""
    experts = qweight.shape[0] if qweight.dim() else 0
    if not experts:
        raise ArgumentError(
            f"{op}: qweight must be [E, R, K] with E at least 1, got {list(qweight.shape)}"
        )
    given = {"weight_scale": weight_scale, "bias": bias, "multiplier": multiplier}
    for name, one in given.items():
        if one is not None and (one.dim() == 0 or one.shape[0] != experts):
            raise ArgumentError(
                f"{op}: {name} must have one entry for each of {experts} experts, got "
                f"{list(one.shape)}"
            )
    first = [None if one is None else one[0] for one in (bias, multiplier)]
    checks.check_packed(op, qweight[0], weight_scale[0], out_features, first[1])
    checks.check_bias(op, first[0], out_features)


def check_experts(
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
    multiplier: Tensor | None,
) -> None:
    """Checks what `bitcore.ops.experts_linear` is given beside its input and index."""
    check_experts_weights(_LINEAR, qweight, weight_scale, bias, out_features, multiplier)
    if activation not in checks.ACTIVATIONS:
        raise ArgumentError(
            f"{_LINEAR}: activation must be one of {checks.ACTIVATIONS}, got {activation!r}"
        )


def is_index(index: Tensor, tokens: int, device: torch.device) -> bool:
    """Tells whether an index is on a device, has a dtype and a number of entries that fit so many
    tokens, and is its memory.
    """
    rows = index.numel()
    return (
        index.dtype is torch.int64
        and index.device == device
        and is_memory(index)
        and (rows == 0 or (tokens > 0 and rows % tokens == 0))
    )


def counts_on_host(device: str, activation: str) -> bool:
    """Tells whether `bitcore.ops.experts_linear` reads on the host how many tokens each expert has,
    on devices of this type: no captured graph can do so.
    """
    return activation == "float" or not hasattr(kernels_for(device), "prepare_experts")


def _check_index(op: str, index: Tensor, tokens: int) -> None:
    checks.check_dtype(op, "index", index, torch.int64)
    rows = index.numel()
    # Of a graph these are open, and would become constants if compared; its calls are checked.
    known = isinstance(rows, int) and isinstance(tokens, int)
    if known and rows and (not tokens or rows % tokens):
        raise ArgumentError(
            f"{op}: index must have as many entries for each of {tokens} tokens, got "
            f"{list(index.shape)}"
        )


def _check_linear(
    x: Tensor,
    index: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
    out_dtype: torch.dtype,
    multiplier: Tensor | None,
) -> None:
    op = _LINEAR
    checks.check_devices(op, x, index, qweight, weight_scale, bias, multiplier)
    check_experts(qweight, weight_scale, bias, out_features, activation, multiplier)
    checks.check_input(op, x, qweight.shape[2])
    if x.dim() != 2:
        raise ArgumentError(f"{op}: x must be [M, K], got {list(x.shape)}")
    _check_index(op, index, x.shape[0])
    checks.check_out_dtype(op, out_dtype)


def _linear(
    x: Tensor,
    index: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
    out_dtype: torch.dtype,
    multiplier: Tensor | None = None,
) -> Tensor:
    # First: the checks look at the part of one expert, which needs its memory.
    checks.check_memory(
        "bitlab::experts_linear",
        x=x,
        index=index,
        qweight=qweight,
        weight_scale=weight_scale,
        bias=bias,
        multiplier=multiplier,
    )
    _check_linear(
        x, index, qweight, weight_scale, bias, out_features, activation, out_dtype, multiplier
    )
    kernels = kernels_for(x.device.type)
    given = x, index, qweight, weight_scale, bias, out_features, activation, out_dtype, multiplier
    native = getattr(kernels, "experts_linear", None)
    y: Tensor = native(*given) if native else reference.experts_linear(*given, run=kernels.linear)
    return y


def _check_gradient(
    dy: Tensor,
    index: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    out_features: int,
    tokens: int,
    dtype: torch.dtype,
    multiplier: Tensor | None,
) -> None:
    op = "bitlab::experts_input_gradient"
    checks.check_devices(op, dy, index, qweight, weight_scale, multiplier)
    check_experts_weights(op, qweight, weight_scale, None, out_features, multiplier)
    checks.check_float(op, "dy", dy)
    _check_index(op, index, tokens)
    if list(dy.shape) != [index.numel(), out_features]:
        raise ArgumentError(
            f"{op}: dy must be [{index.numel()}, {out_features}], got {list(dy.shape)}"
        )
    checks.check_out_dtype(op, dtype)


def _input_gradient(
    dy: Tensor,
    index: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    out_features: int,
    tokens: int,
    dtype: torch.dtype,
    multiplier: Tensor | None = None,
) -> Tensor:
    op = "bitlab::experts_input_gradient"
    checks.check_memory(
        op, dy=dy, index=index, qweight=qweight, weight_scale=weight_scale, multiplier=multiplier
    )
    _check_gradient(dy, index, qweight, weight_scale, out_features, tokens, dtype, multiplier)
    kernels = kernels_for(dy.device.type)
    dx = dy.new_zeros((index.numel(), qweight.shape[2]), dtype=dtype)
    for expert, rows in reference.by_expert(index, len(qweight)):
        own = None if multiplier is None else multiplier[expert]
        weights = qweight[expert], weight_scale[expert], out_features
        dx[rows] = kernels.input_gradient(dy.index_select(0, rows), *weights, dtype, own)
    if index.numel() == tokens:
        return dx
    return dx.view(tokens, index.numel() // tokens, dx.shape[1]).sum(1)


for _device in DEVICES:
    _library.impl("experts_linear", _linear, _device)
    _library.impl("experts_input_gradient", _input_gradient, _device)


@torch.library.register_fake("bitlab::experts_linear", lib=_library)
def _(
    x: Tensor,
    index: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str,
    out_dtype: torch.dtype,
    multiplier: Tensor | None = None,
) -> Tensor:
    _check_linear(
        x, index, qweight, weight_scale, bias, out_features, activation, out_dtype, multiplier
    )
    return x.new_empty((index.numel(), out_features), dtype=out_dtype)


@torch.library.register_fake("bitlab::experts_input_gradient", lib=_library)
def _(
    dy: Tensor,
    index: Tensor,
    qweight: Tensor,
    weight_scale: Tensor,
    out_features: int,
    tokens: int,
    dtype: torch.dtype,
    multiplier: Tensor | None = None,
) -> Tensor:
    _check_gradient(dy, index, qweight, weight_scale, out_features, tokens, dtype, multiplier)
    return dy.new_empty((tokens, qweight.shape[2]), dtype=dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index, qweight, weight_scale, bias, out_features, _, _, multiplier = inputs
    ctx.save_for_backward(index, qweight, weight_scale, multiplier)
    ctx.out_features, ctx.tokens, ctx.x_dtype = out_features, x.shape[0], x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Packed weights are constants, as those of ``bitlab::linear``."""
    index, qweight, weight_scale, multiplier = ctx.saved_tensors
    dx = db = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.bitlab.experts_input_gradient(
            dy, index, qweight, weight_scale, ctx.out_features, ctx.tokens, ctx.x_dtype, multiplier
        )
    if ctx.needs_input_grad[4]:
        experts, index = qweight.shape[0], index.reshape(-1)
        # What no expert gets goes into a row more, and away.
        index = torch.where((index < 0) | (index >= experts), experts, index)
        sums = dy.new_zeros((experts + 1, ctx.out_features), dtype=torch.float32)
        db = sums.index_add(0, index, dy.float())[:experts].to(ctx.bias_dtype)
    return dx, None, None, None, db, None, None, None, None


torch.library.register_autograd(
    "bitlab::experts_linear", _backward, setup_context=_setup, lib=_library
)
