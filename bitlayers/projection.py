"""One projection of experts during one forward pass: a row for each expert of each token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bitcore import estimators, ops
from bitcore.prepared import PreparedExperts, is_preparable
from bitlayers.parts import Parts
from bitlayers.routing import Routing
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

    def __call__(self, x: Tensor, routing: Routing) -> Tensor:
        """Returns each token through the matrices of its experts.

        Args:
            x: [M, K], or a row for each expert of a token.
            routing: Who gets which token.

        Returns:
            A row of N for each expert of a token; zeros for none.
        """
        outputs = [
            self.of(tokens, expert)
            for (expert, _), tokens in zip(routing.visits, routing.gather(x), strict=True)
        ]
        if not outputs:
            return x.new_zeros(routing.index.numel(), self.stack.out_features)
        return routing.scatter(outputs)

    def of(self, x: Tensor, expert: int) -> Tensor:
        """Returns x [m, K] through one expert's matrix: [m, N]."""
        return self._product(x, expert, None if self._biases is None else self._biases[expert])

    def _product(self, x: Tensor, expert: int, bias: Tensor | None) -> Tensor:
        raise NotImplementedError


class PackedProjection(Projection):
    """Multiplies with weights that are packed expert by expert.

    Args:
        stack: How the tensors lie, and how they are quantized.
        packed: Gives an expert's packed tensors.
        bias: [E, N], or None.
        kept: Where they are kept.
    """

    def __init__(
        self,
        stack: Stack,
        packed: Callable[[int], Packed],
        bias: Tensor | None,
        kept: dict[int, Packed],
    ) -> None:
        super().__init__(stack, bias)
        self._packed, self._kept = packed, kept

    def _product(self, x: Tensor, expert: int, bias: Tensor | None) -> Tensor:
        packed = self._kept.get(expert)
        if packed is None:
            packed = self._kept[expert] = self._packed(expert)
        qweight, scale, *multiplier = packed
        rows, activation = self.stack.out_features, self.stack.config.activation
        return ops.linear(x, qweight, scale, bias, rows, activation, *multiplier)


class DeployedProjection(Projection):
    """Multiplies with the packed weights of all experts, in one call.

    Args:
        stack: How the tensors lie, and how they are quantized.
        packed: The packed tensors of all experts.
        bias: [E, N], or None.
        prepared: What is kept of these from one forward pass to the next, by the stack's name.
    """

    def __init__(
        self,
        stack: Stack,
        packed: Packed,
        bias: Tensor | None,
        prepared: dict[str, PreparedExperts],
    ) -> None:
        self.stack, self._packed, self._bias, self._prepared = stack, packed, bias, prepared

    def __call__(self, x: Tensor, routing: Routing) -> Tensor:
        """See `Projection`."""
        stack, bias = self.stack, self._bias
        qweight, scale, *multiplier = self._packed
        rows, activation = stack.out_features, stack.config.activation
        trains = bias is not None and bias.requires_grad and torch.is_grad_enabled()
        alone = trains or torch.compiler.is_compiling()
        prepared = None if alone else self._prepared.get(stack.name)
        if prepared is None or not prepared.holds(qweight, scale, bias, *multiplier):
            if alone or not is_preparable(x, qweight, scale, bias, *multiplier):
                return ops.experts_linear(
                    x, routing.index, qweight, scale, bias, rows, activation, *multiplier
                )
            prepared = PreparedExperts(qweight, scale, bias, rows, activation, *multiplier)
            self._prepared[stack.name] = prepared
        return prepared(x, routing.index)


class TrainedProjection(Projection):
    """Multiplies with latent weights, ternarized on the way, with straight-through gradients.

    Args:
        stack: How the tensors lie, and how they are quantized.
        weight: The latent weights of all experts.
        bias: [E, N], or None.
        strength: How far the product is quantized, 0 to 1.
        learned: The learned scales of all experts, or None.
    """

    def __init__(
        self,
        stack: Stack,
        weight: Tensor,
        bias: Tensor | None,
        strength: float,
        learned: Tensor | None = None,
    ) -> None:
        super().__init__(stack, bias)
        self._weights, self._strength = Parts(stack.apart(weight)), strength
        self._learned = None if learned is None else Parts(learned)

    def _product(self, x: Tensor, expert: int, bias: Tensor | None) -> Tensor:
        stack, config = self.stack, self.stack.config
        # No copy where it is transposed: what is saved for the backward pass is the Parameter.
        part = self._weights[expert]
        weight = part.t() if stack.transposed else part
        learned = None
        if self._learned is not None:
            # FSDP's mixed precision rounds parameters for a forward pass.
            learned = stack.of_rows(self._learned[expert].float())
        if self._strength < 1 and learned is not None:
            exact = estimators.learned_weight(weight, learned, stack.granularity)
            mixed = weight + self._strength * (exact - weight)
            return mixed_product(x, mixed, bias, config.activation, self._strength)
        step, scale, *multiplier = stack.scales(weight) if learned is None else (None, learned)
        if self._strength < 1:
            assert step is not None
            assert scale is not None
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
