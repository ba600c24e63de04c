"""What stands in for a layer while a model runs in two streams: as it was, and ternary."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitlab_hf.fit.latent import latent_weight
from bitlab_hf.fit.matrix import ExpertMatrix, Matrix, quantized
from bitlab_hf.fit.room import Room
from bitlab_hf.fit.solve import Scales
from bitlab_hf.model.experts import expert_modules
from bitlab_hf.model.tree import Found, find_modules
from bitlayers.base import BitLayerBase
from bitlayers.experts import BitExperts
from bitlayers.projection import Projection
from bitlayers.stack import Stack


@dataclass
class Batch:
    """What a unit is called with for a batch; its first argument differs in the two streams, and
    is held wherever there is room.
    """

    original: Tensor
    ternary: Tensor
    device: torch.device
    rest: tuple[Any, ...]
    named: dict[str, Any]

    def first(self, original: bool) -> Tensor:
        """Returns its first argument in one of the streams, on the device that the unit wants."""
        return (self.original if original else self.ternary).to(self.device)


class Stop(Exception):  # noqa: N818  (no error)
    """Ends a forward pass of which the rest is not needed."""


@dataclass
class Streams:
    """What all taps share.

    Attributes:
        original: Whether the pass at work is the original model's.
        wanted: The taps whose calls are noted: what all layers of a model read fills the memory.
        check: Called with each tap, noted or not, and what it is given.
        calls: The noted taps called in it, with what they were given.
        last: The tap at which it ends, if not at its end.
        heard: A tap, and what is called with its output and says what goes on in its place.
        room: Where what is needed again later is held.
    """

    original: bool = True
    wanted: Container[AnyTap] = ()
    check: Callable[[AnyTap, Tensor], None] | None = None
    calls: list[tuple[AnyTap, Tensor]] = field(default_factory=list)
    last: AnyTap | None = None
    heard: tuple[AnyTap, Callable[[Tensor], Tensor]] | None = None
    room: Room = field(default_factory=Room)

    def begin(self, tap: AnyTap, x: Tensor) -> None:
        """Notes a call; ends the pass if it is the last one."""
        if self.check is not None:
            self.check(tap, x)
        if tap in self.wanted:
            self.calls.append((tap, x))
        if self.last is tap:
            raise Stop

    def end(self, tap: AnyTap, output: Tensor) -> Tensor:
        """Returns what goes on of a tap's output."""
        heard = self.heard
        return heard[1](output) if heard is not None and heard[0] is tap else output


class Tap(Matrix):
    """Stands in for a layer's forward: notes what it multiplies, and runs it in either stream."""

    def __init__(self, found: Found[BitLayerBase], streams: Streams) -> None:
        self.name, self.layer = found.names[0], found.module
        self.config = self.layer.quant_config
        # None until they are known. A byte a code: the float form is made anew in every pass.
        self._codes: Tensor | None = None
        self._scales: Scales | None = None
        self._streams = streams

    @property
    def module(self) -> nn.Module:
        """The layer."""
        return self.layer

    @property
    def matrices(self) -> list[Matrix]:
        """Itself."""
        return [self]

    @property
    def weight(self) -> Tensor:
        """The latent weight."""
        weight: Tensor = self.layer.weight
        return weight

    @property
    def codes(self) -> Tensor | None:
        """What was chosen."""
        return self._codes

    @property
    def scales(self) -> Scales | None:
        """Of the codes."""
        return self._scales

    def set(self, codes: Tensor, scales: Scales) -> None:
        """Makes the layer ternary in the ternary stream."""
        self._codes, self._scales = codes.to(torch.int8), scales

    def rounding(self) -> Tensor:
        """Returns the rounded weight."""
        return self.layer.dequantized_weight()

    def scale_shape(self, part: Tensor) -> tuple[int, int]:
        """Returns the shape of all scales."""
        rows, *groups = self.layer.estimated_shape()
        return rows, math.prod(groups)

    def commit(self) -> None:
        """Gives the layer itself a latent weight with these codes and scales, if it has any."""
        layer, codes, scales = self.layer, self.codes, self.scales
        if codes is None or scales is None:
            return
        layer.weight.copy_(latent_weight(layer.weight, codes.double(), scales, self.config))
        if layer.learned_scale is not None:
            layer.learned_scale.copy_(scales.values.reshape(layer.learned_scale.shape))
        layer.quant_strength = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        """Runs the layer on x [..., K] in the stream at work."""
        self._streams.begin(self, x)
        weight = self.weight
        if self.codes is not None and self.scales is not None and not self._streams.original:
            x, weight = self.quantized(x), self.codes * self.scales.full().float()
        bias = None if self.layer.bias is None else self.layer.bias.to(x.dtype)
        return self._streams.end(self, F.linear(x, weight.to(x.dtype), bias))

    def quantized(self, x: Tensor) -> Tensor:
        """Returns activations as the ternary layer multiplies them, in their dtype."""
        return quantized(x, self.config)


class _StreamedProjection(Projection):
    """Multiplies as the stream at work does."""

    def __init__(
        self, stack: Stack, bias: Tensor | None, matrices: list[ExpertMatrix], streams: Streams
    ) -> None:
        super().__init__(stack, bias)
        self._matrices, self._streams = matrices, streams

    def _product(self, x: Tensor, expert: int, bias: Tensor | None) -> Tensor:
        matrix = self._matrices[expert]
        weight = None if self._streams.original else matrix.ternary()
        if weight is None:
            weight = matrix.weight
        else:
            x = quantized(x, matrix.config)
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class ExpertsTap:
    """Stands in for the forward of latent experts: notes what goes where, and runs them in either
    stream.

    Attributes:
        stages: The projections, in the order of use: each expert's matrix.
        routing: What the first call of the pass at work was given beside the tokens: the experts of
            each [M, k], and their weights [M, k].
    """

    def __init__(self, found: Found[BitExperts], streams: Streams) -> None:
        self.name, self.experts = found.names[0], found.module
        self.stages = [
            [ExpertMatrix(self.name, found.module, stack, one) for one in range(stack.experts)]
            for stack in found.module.stacks.values()
        ]
        self.routing: tuple[Tensor, Tensor] | None = None
        self._streams = streams

    @property
    def module(self) -> nn.Module:
        """The experts."""
        return self.experts

    @property
    def matrices(self) -> list[ExpertMatrix]:
        """All of them, in the order in which they are solved."""
        return [matrix for stage in self.stages for matrix in stage]

    def projections(self) -> list[Projection]:
        """Returns the projections as the stream at work multiplies them."""
        found: list[Projection] = []
        for (name, stack), matrices in zip(self.experts.stacks.items(), self.stages, strict=True):
            bias = self.experts._parameters.get(f"{name}_bias")
            found.append(_StreamedProjection(stack, bias, matrices, self._streams))
        return found

    def inner(self, x: Tensor, number: int, original: bool) -> Tensor:
        """Returns what an expert's last projection reads for tokens [m, H] in a stream."""
        self._streams.original = original
        *firsts, _ = self.projections()
        return self.experts.activated(*(one.of(x, number) for one in firsts)) if firsts else x

    def commit(self) -> None:
        """Gives the experts latent weights with what was chosen."""
        for matrix in self.matrices:
            matrix.commit()
        self.experts.quant_strength = 1.0

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Runs the experts on what their forward is given."""
        tokens, index, weights = self.experts.routed(hidden_states, *args, **kwargs)
        if all(tap is not self for tap, _ in self._streams.calls):
            self.routing = index, weights
        self._streams.begin(self, tokens)
        output = self.experts.through(self.projections(), hidden_states, *args, **kwargs)
        return self._streams.end(self, output)


AnyTap = Tap | ExpertsTap


@contextmanager
def tapped(
    model: nn.Module, left: Container[nn.Module] = (), room: Room | None = None
) -> Iterator[tuple[dict[nn.Module, AnyTap], Streams]]:
    """Puts taps into quantized layers and experts, in eval mode; puts everything back at the end.

    Args:
        model: Any module tree.
        left: Layers, and experts, that stay as they are.
        room: Where what is needed again later is held; None for wherever it is made.
    """
    streams = Streams(room=room or Room())
    layers = [one for one in find_modules(model, BitLayerBase) if one.module not in left]
    experts = [
        one
        for one in expert_modules(model)
        if one.module not in left and not one.module.is_deployed
    ]
    # An attribute of the instance hides the method of its class.
    hidden: list[tuple[nn.Module, str, AnyTap]] = [
        *((one.module, "_eval_forward", Tap(one, streams)) for one in layers),
        *((one.module, "forward", ExpertsTap(one, streams)) for one in experts),
    ]
    training = {module: module.training for module in model.modules()}
    model.eval()
    for module, method, tap in hidden:
        vars(module)[method] = tap
    try:
        yield {module: tap for module, _, tap in hidden}, streams
    finally:
        for module, method, _ in hidden:
            del vars(module)[method]
        for module, was in training.items():
            module.training = was
            if isinstance(module, BitLayerBase | BitExperts):
                module.invalidate_cache()
