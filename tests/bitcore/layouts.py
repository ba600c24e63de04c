"""Tensors of the same values that lie in memory in other ways."""

from __future__ import annotations

import random

import torch
from torch import Tensor

# What the dispatcher leaves to the kernels.
STRIDED = ["contiguous", "transposed", "sliced", "spread", "offset", "expanded"]
# What it makes plain memory of; kernels alone do not see it.
VIRTUAL = ["negated", "zeros"]


def _poison(tensor: Tensor) -> Tensor:
    return tensor.fill_(float("nan") if tensor.is_floating_point() else 0x7F)


def lay_out(values: Tensor, layout: str) -> Tensor:
    """Returns a tensor of a layout with these values; of those named expanded and zeros, the first
    row repeated and zeros.
    """
    shape = list(values.shape)
    if layout == "transposed" and values.dim() > 1:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        whole = _poison(values.new_empty([*shape[:-1], shape[-1] + 5]))
        view = whole[..., 3 : 3 + shape[-1]]
        return view.copy_(values)
    if layout == "spread":
        whole = _poison(values.new_empty([*shape[:-1], 2 * shape[-1]]))
        return whole[..., ::2].copy_(values)
    if layout == "offset":
        whole = _poison(values.new_empty([shape[0] + 2, *shape[1:]]))
        return whole[1 : 1 + shape[0]].copy_(values)
    if layout == "expanded" and shape[0]:
        return values[:1].clone().expand(shape)
    if layout == "negated":
        return torch._neg_view(-values)
    if layout == "zeros":
        return torch._efficientzerotensor(shape, dtype=values.dtype)
    return values.clone()


def some_layout(values: Tensor, rng: random.Random) -> Tensor:
    """Returns a tensor of any layout; see `lay_out`."""
    return lay_out(values, rng.choice(STRIDED + VIRTUAL))


def plain(tensor: Tensor) -> Tensor:
    """Returns the same values, contiguous."""
    return (tensor + torch.zeros((), dtype=tensor.dtype)).contiguous().clone()
