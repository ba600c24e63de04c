"""What every module with quantized weights does with its scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn


class Float32Scale(nn.Module):
    """Keeps the buffer ``qweight_scale`` in float32, whatever dtype the module is cast to."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scale = self._buffers.get("qweight_scale")
        super()._apply(fn, recurse)
        moved = self._buffers.get("qweight_scale")
        if scale is not None and moved is not None and moved.dtype != torch.float32:
            # `.to(bfloat16)` moves the scale but must not round it.
            self._buffers["qweight_scale"] = scale.to(moved.device)
        return self
