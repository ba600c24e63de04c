"""Activation codes that layers keep for the backward pass, held once for all readers of a tensor.

Layers that read the same activations (queries, keys and values; gate and up) quantize them to the
same codes. Each would keep a copy of its own; here the second takes the first one's. Only the last
tensor of a thread is remembered, weakly: layers that share one run one after the other, and a
remembered tensor is freed as if it were not.

The codes cannot be shared before, within the op: what an op returns must be memory of its own, or
compiled code that writes into one output would change another's.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

_last = threading.local()


def share_codes(
    x: Tensor, activation: str, codes: Tensor, x_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the codes and scales to keep: the last layer's if it read the same, else these.

    The same is the same tensor object, not written to since, quantized in the same way. A write
    through ``x.data`` is not seen, as it is not by autograd itself.

    Args:
        x: The activations, float [..., K].
        activation: How they are quantized.
        codes: int8 [..., K], their codes.
        x_scale: float32 [..., 1], the scales.

    Returns:
        codes and x_scale, without a graph.
    """
    own = codes.detach(), x_scale.detach()
    if torch.compiler.is_compiling() or type(codes) is not Tensor or x.is_inference():
        return own
    key: tuple[Any, ...] = (x._version, activation, codes.shape)
    last = getattr(_last, "entry", None)
    if last is not None and last[1] == key and last[0]() is x:
        kept = last[2](), last[3]()
        if kept[0] is not None and kept[1] is not None:
            return kept
    _last.entry = TensorWeakRef(x), key, TensorWeakRef(own[0]), TensorWeakRef(own[1])
    return own
