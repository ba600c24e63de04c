"""The RMS norm of a layer's input, as BitNet places it (arXiv 2402.17764)."""

from __future__ import annotations

import torch
from torch import Tensor

# transformers' default for its BitNet layers.
EPSILON = 1e-6


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """``weight * (x / sqrt(mean(x^2) + 1e-6))`` over the last axis, in float32 up to the weight.

    Args:
        x: float [..., K].
        weight: float [K].

    Returns:
        [..., K] of x's dtype, or of the weight's if that is wider.

    Source: Zhang and Sennrich, arXiv 1910.07467; the order of operations is that of transformers'
    Llama.
    """
    values = x.float()
    scale = torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + EPSILON)
    return weight * (values * scale).to(x.dtype)
