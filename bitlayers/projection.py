"""One projection of experts during one forward pass: called expert by expert, [m, K] to [m, N]."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bitcore import ops
from bitlayers.parts import Parts
from bitlayers.stack import Stack
from bitlayers.state import Packed
from bitlayers.training import mixed_product


class Projection:
    """What both kinds are asked for.

    Args:
        stack: How the tensors lie, and how they are quantized.
        bias: [E, N], or None.
    """

    def __init__(self, stack: Stack, bias: Tensor | None) -> None:
        self.stack = stack
        # In the backward pass one gradient of all experts; to index would make one each.
        self._biases: Sequence[Tensor] | None = None if bias is None else bias.unbind(0)

    def __call__(self, x: Tensor, expert: int) -> Tensor:
        """Returns x [m, K] through an expert's matrix: [m, N]."""
        return self._product(x, expert, None if self._biases is None else self._biases[expert])

    def _product(self, x: Tensor, expert: int, bias: Tensor | None) -> Tensor:
        raise NotImplementedError


class PackedProjection(Projection):
    """Multiplies with packed weights.

    Args:
        stack: How the tensors lie, and how they are quantized.
        packed: Gives an expert's packed tensors.
        bias: [E, N], or None.
        kept: Where they are kept if they have to be packed first; None of deployed ones.
    """

    def __init__(
        self,
        stack: Stack,
        packed: Callable[[int], Packed],
        bias: Tensor | None,
        kept: dict[int, Packed] | None,
    ) -> None:
        super().__init__(stack, bias)
        self._packed, self._kept = packed, kept

    def _product(self, x: Tensor, expert: int, bias: Tensor | None) -> Tensor:
        packed = None if self._kept is None else self._kept.get(expert)
        if packed is None:
            packed = self._packed(expert)
            if self._kept is not None:
                self._kept[expert] = packed
        qweight, scale, *multiplier = packed
        rows, activation = self.stack.out_features, self.stack.config.activation
        return ops.linear(x, qweight, scale, bias, rows, activation, *multiplier)


class TrainedProjection(Projection):
    """Multiplies with latent weights, ternarized on the way, with straight-through gradients.

    Args:
        stack: How the tensors lie, and how they are quantized.
        weight: The latent weights of all experts.
        bias: [E, N], or None.
        strength: How far the product is quantized, 0 to 1.
    """

    def __init__(self, stack: Stack, weight: Tensor, bias: Tensor | None, strength: float) -> None:
        super().__init__(stack, bias)
        self._weights, self._strength = Parts(weight), strength

    def _product(self, x: Tensor, expert: int, bias: Tensor | None) -> Tensor:
        stack, config = self.stack, self.stack.config
        # No copy where it is transposed: what is saved for the backward pass is the Parameter.
        part = self._weights[expert]
        weight = part.t() if stack.transposed else part
        step, scale, *multiplier = stack.scales(weight)
        if self._strength < 1:
            with torch.no_grad():
                qweight = ops.pack_codes(weight, step)
                rows = stack.out_features
                full = ops.unpack_weight(qweight, scale, rows, torch.float32, *multiplier)
                difference = self._strength * (full - weight)
            return mixed_product(x, weight + difference, bias, config.activation, self._strength)
        return ops.qat_linear(
            x,
            weight,
            bias,
            stack.granularity,
            config.group_size,
            config.activation,
            step,
            scale,
            *multiplier,
        )
