"""An output head whose weight a loss reads itself: what it is to see instead of the float one.

Fused losses take the base model's last hidden states and multiply them by the head's weight, tile
by tile, without calling the head. The head of a ternary model computes with rounded weights and
rounded activations: within `exposed_head` the reader is handed both, with straight-through
gradients, so that its logits are the head's, up to the order of float sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from bitcore import estimators, ops
from bitcore.errors import LifecycleError
from bitlayers.base import BitLayerBase
from bitlayers.bitlinear import BitLinear
from bitlayers.gathered import GatheredWeight
from bitlayers.int8 import Int8Linear


class _StraightThrough(torch.autograd.Function):
    """Returns other values of the same shape, with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


def is_rounded(head: nn.Module | None) -> bool:
    """Tells whether a head computes with other weights than a float weight of its own."""
    return isinstance(head, (BitLayerBase, Int8Linear))


@contextmanager
def exposed_head(model: Any) -> Iterator[None]:
    """Within the block, what reads a model's output head and last hidden states sees them rounded.

    The head is read as ``model.get_output_embeddings().weight``, the states are what the base
    model returns when it is called by itself; in the model's own forward both are as ever.

    Args:
        model: A transformers model.

    Raises:
        LifecycleError: The head has no weight to show: a layer of another kind, or one whose
            weight is in partitions (ZeRO-3).
    """
    known = vars(model).get("get_output_embeddings")
    if isinstance(known, _Reading):
        # A method that took the place of the forward, within the block that exposes the head.
        running, known.running = known.running, []
        try:
            yield
        finally:
            known.running = running
        return
    head = model.get_output_embeddings()
    if not is_rounded(head):
        yield
        return
    reading = _Reading(head)
    hooks = [
        model.register_forward_pre_hook(lambda *_: reading.running.append(True)),
        model.register_forward_hook(lambda *_: reading.ran(), always_call=True),
        model.base_model.register_forward_hook(lambda _m, _a, output: reading.seen(output)),
    ]
    # The instance's attribute hides the method until the block ends.
    model.get_output_embeddings = reading
    try:
        yield
    finally:
        del model.get_output_embeddings
        for hook in hooks:
            hook.remove()


class _Reading:
    """Stands for a model's ``get_output_embeddings`` while its head is exposed.

    Args:
        head: The head.

    Attributes:
        running: An entry for each forward pass of the model that has begun and not ended.
    """

    def __init__(self, head: Any) -> None:
        self._head = head
        # Once a block: its readers ask for the device, the weight and the bias in turn.
        self._shown = SimpleNamespace(weight=exposed_weight(head), bias=head.bias)
        self.running: list[bool] = []

    def __call__(self) -> Any:
        """Returns the head, or what is to be read of it."""
        return self._head if self.running else self._shown

    def ran(self) -> None:
        """Notes that a forward pass of the model has ended."""
        self.running.pop()

    def seen(self, output: Any) -> Any:
        """Returns the base model's output as the head rounds it, a copy, or as it is."""
        if self.running:
            return output
        rounded = exposed_states(self._head, output.last_hidden_state)
        return dataclasses.replace(output, last_hidden_state=rounded)


def exposed_weight(head: Any) -> Tensor:
    """Returns the weight [V, K] that a head multiplies with, in the dtype of its float weight.

    Of a latent head in training it has gradients: straight through to the latent weight, and to a
    learned scale as the estimator says.

    Raises:
        LifecycleError: The head is no `BitLinear` or `Int8Linear`, or its weight is in partitions.
    """
    if isinstance(head, Int8Linear):
        return head.dequantized_weight()
    if not isinstance(head, BitLinear) or hasattr(head._parameters.get("weight"), "ds_status"):
        raise LifecycleError(
            "bitlab: the head must be a BitLinear with its whole weight for a loss that reads it, "
            f'got {type(head).__name__}\nUse head="keep".'
        )
    if head.is_deployed:
        return head.dequantized_weight(head.float_dtype)
    weight: Any = head.weight
    # FSDP's shards are gathered: a scale is that of the whole matrix.
    latent: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    strength = head.quant_strength if head.training else 1.0
    if strength == 0:
        return latent
    if head.learned_scale is not None:
        granularity = head.quant_config.granularity
        rounded = estimators.learned_weight(latent, head.learned_scale.float(), granularity)
    else:
        with torch.no_grad():
            values = _dequantized(head, latent)
        rounded = _StraightThrough.apply(latent, values)
    return rounded if strength == 1 else latent + strength * (rounded - latent)


def _dequantized(head: BitLinear, weight: Tensor) -> Tensor:
    """Returns codes times scale [N, K] of a whole latent weight without a learned scale."""
    if isinstance(weight, GatheredWeight):
        qweight, scale, *multiplier = weight.packed
        return ops.unpack_weight(qweight, scale, head.out_features, weight.dtype, *multiplier)
    config = head.quant_config
    args = config.granularity, config.group_size
    if config.weight_quantizer == "absmean":
        qweight, scale, *multiplier = ops.pack_weight(weight, *args)
    else:
        step, scale, *multiplier = ops.estimate(weight, config.weight_quantizer, *args)
        qweight = ops.pack_codes(weight, step)
    return ops.unpack_weight(qweight, scale, head.out_features, weight.dtype, *multiplier)


def exposed_states(head: Any, states: Tensor) -> Tensor:
    """Returns the last hidden states [..., K] as the head rounds them, in their dtype."""
    norm = getattr(head, "rms_norm", None)
    x: Tensor = states if norm is None else norm(states)
    activation = "int8_per_token"
    strength = 1.0
    if isinstance(head, BitLayerBase):
        activation = head.quant_config.activation
        strength = head.quant_strength if head.training else 1.0
    if activation == "float" or strength == 0:
        return x
    with torch.no_grad():
        codes, scale = torch.ops.bitlab.quantize_activation(x, activation == "int8_per_tensor")
        values = (codes.float() * scale).to(x.dtype)
    rounded: Tensor = _StraightThrough.apply(x, values)
    return rounded if strength == 1 else x + strength * (rounded - x)
