"""Calls of `learned_gradients`, and the sums of its native kernels in their order."""

from __future__ import annotations

from functools import reduce
from operator import add

import torch
from torch import Tensor

from bitcore.quantize import total

Call = tuple[Tensor, Tensor, Tensor]


def make_learned(shape: tuple[int, int, int], granularity: str, *dtypes: torch.dtype) -> Call:
    """dw, a weight that lies within the bound, beyond it and on every threshold, and its step.

    Args:
        shape: N, K and the columns of groups.
        granularity: ``"per_tensor"``, ``"per_channel"`` or ``"per_group"``.
        dtypes: Of dw and of the weight.
    """
    rows, columns, groups = shape
    steps = {"per_tensor": (1,), "per_channel": (rows,), "per_group": (rows, groups)}
    # Powers of two, so that there are ties.
    step = 2.0 ** torch.randint(-6, -3, steps[granularity]).float()
    thresholds = torch.tensor([0.5, -0.5, 1.5, -1.5, 0.0, -0.0])
    drawn = thresholds[torch.randint(len(thresholds), (rows, columns))]
    ratio = torch.where(torch.rand(rows, columns) < 0.1, drawn, torch.randn(rows, columns))
    weight = ratio.view(step.numel(), -1) * step.view(-1, 1)
    return torch.randn(rows, columns).to(dtypes[0]), weight.view(rows, columns).to(dtypes[1]), step


def step_gradient_in_lanes(dw: Tensor, weight: Tensor, step: Tensor) -> Tensor:
    """The gradient of the step: 16 float64 lanes a row or group, then these, then the rows."""
    parts = len(weight) if step.numel() == 1 else step.numel()
    ratio = weight.float().view(step.numel(), -1) * (1 / step.view(-1, 1))
    inside, codes = ratio.abs() < 1.5, ratio.round().clamp(-1, 1)
    terms = torch.where(inside, codes - ratio, codes) * dw.float().view(ratio.shape)
    terms = terms.view(parts, -1)
    padded = torch.nn.functional.pad(terms, (0, -terms.shape[1] % 16)).double()
    lanes = reduce(add, padded.view(parts, -1, 16).unbind(1))
    sums = reduce(add, lanes.unbind(1))
    if step.numel() == 1:
        sums = total(sums)
    return (sums / (weight.numel() // step.numel()) ** 0.5).float().view(step.shape)
