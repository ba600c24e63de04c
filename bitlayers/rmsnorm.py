"""BitLinear with an RMS norm of its input, as the BitNet paper places it."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from bitcore.config import BitQuantConfig
from bitcore.norm import rms_norm
from bitlayers.bitlinear import BitLinear
from bitlayers.registry import register_layer


class InputRMSNorm(nn.Module):
    """`bitcore.norm.rms_norm` with its weight.

    Args:
        features: Length of the last axis.
        device: Where the weight is made.
        dtype: Its dtype.
    """

    def __init__(
        self,
        features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes x [..., features]; the result has its dtype, or the weight's if wider."""
        return rms_norm(x, self.weight)


@register_layer("RMSNormBitLinear")
class RMSNormBitLinear(BitLinear):
    """`BitLinear` behind an RMS norm of its input, so that codes are of normalized activations.

    The arguments are `BitLayerBase`'s, and in_features must be given.

    Attributes:
        rms_norm: The norm; its weight is part of the state dict and trains, deployed or not.
    """

    def __init__(self, in_features: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(in_features, *args, **kwargs)
        self.rms_norm = InputRMSNorm(in_features, kwargs.get("device"), kwargs.get("dtype"))

    def forward(self, x: Tensor) -> Tensor:
        """Runs the norm and the layer on x [..., in_features]; returns [..., out_features]."""
        return super().forward(self.rms_norm(x))

    @classmethod
    def from_linear(cls, linear: nn.Linear, quant_config: BitQuantConfig | None = None) -> Self:
        """Returns a latent layer that shares the linear layer's tensors, behind a norm of ones."""
        layer = super().from_linear(linear, quant_config)
        layer.rms_norm = InputRMSNorm(linear.in_features, linear.weight.device, linear.weight.dtype)
        return layer

    @classmethod
    def packed_skeleton(
        cls,
        in_features: int,
        out_features: int,
        bias: bool,
        quant_config: BitQuantConfig | None = None,
        device: torch.device | str | None = "meta",
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Returns a deployed layer with empty packed tensors, for a loader to fill."""
        layer = super().packed_skeleton(
            in_features, out_features, bias, quant_config, device, dtype
        )
        layer.rms_norm = InputRMSNorm(in_features, device, dtype)
        return layer
