"""BitLinear: ``nn.Linear`` with ternary weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitcore import ops
from bitcore.prepared import PreparedLinear, is_preparable
from bitcore.qat_packed import qat_packed
from bitlayers.base import BitLayerBase
from bitlayers.gathered import GatheredWeight
from bitlayers.registry import register_layer
from bitlayers.state import Packed
from bitlayers.training import mixed_linear, training_scales


@register_layer("BitLinear")
class BitLinear(BitLayerBase, nn.Linear):
    """A linear layer with 1.58-bit weights: ``y = (x_q @ w_q.T) * (x_scale * weight_scale) +
    bias``.

    Training, evaluation and the deployed layer compute the same forward, so with int8 activations
    their float32 outputs are equal bit for bit. The arguments are `BitLayerBase`'s.

    Attributes:
        weight: Latent weights [N, K]; once deployed a view of codes times scale.
        bias: [N], or None.
        qweight: uint8 [ceil(N / 4), K], in eval mode and once deployed.
        qweight_scale: float32 [1] or [N] (with groups' float32 scales [N, K / G]), in eval mode and
            once deployed.
        qweight_multiplier: uint8 [N, K / G] with groups, in eval mode and once deployed.

    Source: BitNet b1.58, arXiv 2402.17764.
    """

    def _train_forward(self, x: Tensor) -> Tensor:
        if self.quant_strength < 1:
            return mixed_linear(self, x)
        config, weight = self.quant_config, self.weight
        if isinstance(weight, GatheredWeight):
            qweight, weight_scale, *given = weight.packed
            return qat_packed(
                x, weight, self.bias, qweight, weight_scale, config.activation, *given
            )
        step, scale, *multiplier = training_scales(self)
        return ops.qat_linear(
            x,
            weight,
            self.bias,
            config.granularity,
            config.group_size,
            config.activation,
            step,
            scale,
            *multiplier,
        )

    def _eval_forward(self, x: Tensor) -> Tensor:
        qweight, scale, *multiplier = self.packed()
        held = self._parameters
        # A pruned one is an attribute; as such any other would cost as much as a small layer.
        bias: Tensor | None = held["bias"] if "bias" in held else self.bias  # noqa: SIM401
        # An adapter may train the bias of a deployed layer (LoRA's bias="all").
        trains = bias is not None and self._is_deployed and bias.requires_grad
        trains = trains and torch.is_grad_enabled()
        alone = trains or torch.compiler.is_compiling()
        prepared = None if alone else self._prepared
        if prepared is None or not prepared.holds(qweight, scale, bias, *multiplier):
            if alone or not is_preparable(x, qweight, scale, bias, *multiplier):
                bias = bias if trains or bias is None else bias.detach()
                rows, activation = self.out_features, self._activation
                return ops.linear(x, qweight, scale, bias, rows, activation, *multiplier)
            prepared = PreparedLinear(
                qweight, scale, bias, self.out_features, self._activation, *multiplier
            )
            self._prepared = prepared
        return prepared(x)

    def _on_enter_training_mode(self) -> None:
        self.invalidate_cache()

    def _on_enter_eval_mode(self) -> None:
        # Packed at first use: an eval() right before another train() costs nothing.
        self.invalidate_cache()

    def _perform_deployment(self) -> Packed:
        return self._pack()
