"""What stands in for a layer while a model runs in two streams: as it was, and ternary."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitcore.quantize import quantize_activation
from bitlab_hf.fit.latent import latent_weight
from bitlab_hf.fit.solve import Scales
from bitlab_hf.model.experts import expert_modules
from bitlab_hf.model.tree import Found, find_modules
from bitlayers.base import BitLayerBase
from bitlayers.experts import BitExperts


@dataclass
class Batch:
    """What a unit is called with for a batch; its first argument differs in the two streams."""

    original: Tensor
    ternary: Tensor
    rest: tuple[Any, ...]
    named: dict[str, Any]


class Stop(Exception):  # noqa: N818  (no error)
    """Ends a forward pass of which the rest is not needed."""


@dataclass
class Streams:
    """What all taps share.

    Attributes:
        original: Whether the pass at work is the original model's.
        calls: The taps called in it, with what they were given.
        last: The tap at which it ends, if not at its end.
        heard: A tap, and what is called with its output and says what goes on in its place.
    """

    original: bool = True
    calls: list[tuple[Tap, Tensor]] = field(default_factory=list)
    last: Tap | None = None
    heard: tuple[Tap, Callable[[Tensor], Tensor]] | None = None


class Tap:
    """Stands in for a layer's forward: notes what it multiplies, and runs it in either stream."""

    def __init__(self, found: Found[BitLayerBase], streams: Streams) -> None:
        self.name, self.layer = found.names[0], found.module
        # None until they are known. A byte a code: the float form is made anew in every pass.
        self.codes: Tensor | None = None
        self.scales: Scales | None = None
        self._streams = streams

    def set(self, codes: Tensor, scales: Scales) -> None:
        """Makes the layer ternary in the ternary stream."""
        self.codes, self.scales = codes.to(torch.int8), scales

    def commit(self) -> None:
        """Gives the layer itself a latent weight with these codes and scales, if it has any."""
        layer, codes, scales = self.layer, self.codes, self.scales
        if codes is None or scales is None:
            return
        layer.weight.copy_(latent_weight(layer.weight, codes.double(), scales, layer.quant_config))
        if layer.learned_scale is not None:
            layer.learned_scale.copy_(scales.values.reshape(layer.learned_scale.shape))
        layer.quant_strength = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        """Runs the layer on x [..., K] in the stream at work."""
        self._streams.calls.append((self, x))
        if self._streams.last is self:
            raise Stop
        weight: Tensor = self.layer.weight
        if self.codes is not None and self.scales is not None and not self._streams.original:
            x, weight = self.quantized(x), self.codes * self.scales.full().float()
        bias = None if self.layer.bias is None else self.layer.bias.to(x.dtype)
        output = F.linear(x, weight.to(x.dtype), bias)
        heard = self._streams.heard
        return heard[1](output) if heard is not None and heard[0] is self else output

    def quantized(self, x: Tensor) -> Tensor:
        """Returns activations as the ternary layer multiplies them, in their dtype."""
        activation = self.layer.quant_config.activation
        if activation == "float":
            return x
        codes, scale = quantize_activation(x, activation == "int8_per_tensor")
        return (codes.float() * scale).to(x.dtype)


class ExpertsTap:
    """Stands in for the forward of latent experts: in full precision in the original stream.

    Args:
        experts: The experts.
        streams: Whose stream at work counts.
        rounded: Whether they are ternary in the ternary stream; else in full precision there, too.
    """

    def __init__(self, experts: BitExperts, streams: Streams, rounded: bool) -> None:
        self._experts, self._streams, self._rounded = experts, streams, rounded

    def __call__(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        strength: float | None = None,
    ) -> Tensor:
        """Runs the experts on what their forward is given."""
        full = self._streams.original or not self._rounded
        strength = 0.0 if full else None
        experts = self._experts
        # The class's: the instance's is this object.
        return type(experts).run(experts, hidden_states, top_k_index, top_k_weights, strength)


@contextmanager
def tapped(
    model: nn.Module,
    left: Container[nn.Module] = (),
    rounded: Container[nn.Module] | None = None,
) -> Iterator[tuple[dict[nn.Module, Tap], Streams]]:
    """Puts taps into quantized layers, in eval mode; puts everything back at the end.

    Args:
        model: Any module tree.
        left: Layers, and experts, that stay as they are.
        rounded: The experts that are ternary in the ternary stream; None for all.
    """
    streams = Streams()
    taps: dict[nn.Module, Tap] = {
        found.module: Tap(found, streams)
        for found in find_modules(model, BitLayerBase)
        if found.module not in left
    }
    experts = [
        found.module
        for found in expert_modules(model)
        if found.module not in left and not found.module.is_deployed
    ]
    training = {module: module.training for module in model.modules()}
    model.eval()
    for layer, tap in taps.items():
        # An attribute of the instance hides the method of its class.
        vars(layer)["_eval_forward"] = tap
    for one in experts:
        vars(one)["run"] = ExpertsTap(one, streams, rounded is None or one in rounded)
    try:
        yield taps, streams
    finally:
        for layer in taps:
            del vars(layer)["_eval_forward"]
        for one in experts:
            del vars(one)["run"]
        for module, was in training.items():
            module.training = was
            if isinstance(module, BitLayerBase | BitExperts):
                module.invalidate_cache()
