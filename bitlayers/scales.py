"""What every module with quantized weights does with its scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn


class Float32Scale(nn.Module):
    """Keeps ``qweight_scale`` and ``learned_scale`` in float32, whatever dtype the module is cast
    to.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scale = self._buffers.get("qweight_scale")
        learned = self._parameters.get("learned_scale")
        exact = None if learned is None else (learned.data, learned.grad)
        super()._apply(fn, recurse)
        learned = self._parameters.get("learned_scale")
        if exact is not None and learned is not None and learned.dtype != torch.float32:
            learned.data = exact[0].to(learned.device)
            learned.grad = None if exact[1] is None else exact[1].to(learned.device)
        moved = self._buffers.get("qweight_scale")
        if scale is not None and moved is not None and moved.dtype != torch.float32:
            # `.to(bfloat16)` moves the scale but must not round it.
            self._buffers["qweight_scale"] = scale.to(moved.device)
        return self
