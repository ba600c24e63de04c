"""Two streams of activations through a model: as it was, and as it is with ternary weights."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitcore.errors import NonFiniteError
from bitcore.quantize import quantize_activation
from bitlab_hf.fit.latent import latent_weight
from bitlab_hf.fit.solve import Moments, Scales
from bitlab_hf.model.tree import Found, find_modules
from bitlayers.base import BitLayerBase


@dataclass
class Batch:
    """What a unit is called with for a batch; its first argument differs in the two streams."""

    original: Tensor
    ternary: Tensor
    rest: tuple[Any, ...]
    named: dict[str, Any]


class _Stop(Exception):  # noqa: N818  (no error)
    """Ends a forward pass of which the rest is not needed."""


@dataclass
class Streams:
    """What all taps share.

    Attributes:
        original: Whether the pass at work is the original model's.
        calls: The taps called in it, with what they were given.
        last: The tap at which it ends, if not at its end.
    """

    original: bool = True
    calls: list[tuple[Tap, Tensor]] = field(default_factory=list)
    last: Tap | None = None


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

    def __call__(self, x: Tensor) -> Tensor:
        """Runs the layer on x [..., K] in the stream at work."""
        self._streams.calls.append((self, x))
        if self._streams.last is self:
            raise _Stop
        weight: Tensor = self.layer.weight
        if self.codes is not None and self.scales is not None and not self._streams.original:
            x, weight = self.quantized(x), self.codes * self.scales.full().float()
        bias = None if self.layer.bias is None else self.layer.bias.to(x.dtype)
        return F.linear(x, weight.to(x.dtype), bias)

    def quantized(self, x: Tensor) -> Tensor:
        """Returns activations as the ternary layer multiplies them, in their dtype."""
        activation = self.layer.quant_config.activation
        if activation == "float":
            return x
        codes, scale = quantize_activation(x, activation == "int8_per_tensor")
        return (codes.float() * scale).to(x.dtype)


@contextmanager
def tapped(model: nn.Module) -> Iterator[tuple[dict[nn.Module, Tap], Streams]]:
    """Puts taps into all quantized layers, in eval mode; puts everything back at the end."""
    streams = Streams()
    taps: dict[nn.Module, Tap] = {
        found.module: Tap(found, streams) for found in find_modules(model, BitLayerBase)
    }
    training = {module: module.training for module in model.modules()}
    model.eval()
    for layer, tap in taps.items():
        # An attribute of the instance hides the method of its class.
        vars(layer)["_eval_forward"] = tap
    try:
        yield taps, streams
    finally:
        for layer in taps:
            del vars(layer)["_eval_forward"]
        for module, was in training.items():
            module.training = was
            if isinstance(module, BitLayerBase):
                module.invalidate_cache()


class Unit:
    """A part of the model that is run by itself: a block, or all of it."""

    def __init__(
        self, module: nn.Module, taps: list[Tap], streams: Streams, whole: bool = False
    ) -> None:
        self.module, self.taps, self.whole = module, taps, whole
        self._streams = streams

    def run(self, batch: Batch, original: bool, last: Tap | None = None) -> Any:
        """Runs it in one of the streams; returns its output, or None if it ended before."""
        self._streams.original, self._streams.last = original, last
        self._streams.calls.clear()
        first = batch.original if original else batch.ternary
        try:
            return self.module(first, *batch.rest, **batch.named)
        except _Stop:
            return None

    def originals(self, batches: list[Batch]) -> Originals:
        """Runs it once in the original stream.

        Of a block, what its layers read and what it gives are kept: a few times its width a token.
        Of all of the model they would fill the memory.
        """
        groups: list[list[Tap]] = []
        kept: dict[Tap, list[Tensor | None]] = {}
        wanted, seen = set(self.taps), set()
        outputs = []
        for number, batch in enumerate(batches):
            output = self.run(batch, original=True)
            if not self.whole:
                outputs.append(_first(output))
            last: Tensor | None = None
            for tap, x in self._streams.calls:
                if tap in wanted and tap not in seen:
                    same = x is last and tap.layer.quant_config.activation == (
                        groups[-1][0].layer.quant_config.activation
                    )
                    groups[-1].append(tap) if same else groups.append([tap])
                    seen.add(tap)
                    if not same and not self.whole:
                        kept[tap] = [None] * len(batches)
                # A layer that is called again is fitted to its first call.
                if tap in kept and kept[tap][number] is None:
                    kept[tap][number] = _as_multiplied(x)
                last = x
            if self.whole and seen == wanted:
                break
        self._streams.calls.clear()
        return Originals(groups, kept, outputs)

    def moments(self, tap: Tap, batches: list[Batch], kept: list[Tensor | None] | None) -> Moments:
        """Sums up the inputs of a tap over all batches.

        Args:
            tap: The tap.
            batches: What the unit is called with.
            kept: The tap's inputs in the original stream, a batch each; None to compute them.
        """
        weight = tap.layer.weight
        moments = Moments.zeros(weight.shape[1], weight.device)
        for number, batch in enumerate(batches):
            original_x = self._input(tap, batch, original=True) if kept is None else kept[number]
            x = self._input(tap, batch, original=False)
            if x is not None:
                inputs = tap.quantized(x)
                # Routed tokens can be others in the two streams: then there is no original of them.
                if original_x is None or original_x.shape != inputs.shape:
                    original_x = inputs
                moments.add(original_x.flatten(0, -2), inputs.flatten(0, -2))
        return moments

    def _input(self, tap: Tap, batch: Batch, original: bool) -> Tensor | None:
        """Returns what a tap is first called with, if it is."""
        self.run(batch, original, last=tap)
        return next((x for other, x in self._streams.calls if other is tap), None)

    def advance(self, batches: list[Batch]) -> list[Tensor]:
        """Returns its outputs in the ternary stream."""
        return [_first(self.run(batch, original=False)) for batch in batches]


@dataclass
class Originals:
    """What a unit does in the original stream.

    Attributes:
        groups: Its taps in the order of their calls, together where they read one tensor.
        inputs: Of the first tap of each group, its inputs [..., K] in each batch; empty for a whole
            model.
        outputs: Of the unit in each batch, likewise.
    """

    groups: list[list[Tap]]
    inputs: dict[Tap, list[Tensor | None]]
    outputs: list[Tensor]


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _as_multiplied(x: Tensor) -> Tensor:
    """Returns an input in the dtype that a matrix product under autocast takes it in."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class _Recorder:
    """Notes what blocks are called with, and whether each takes what the one before gave."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        self.blocks = blocks
        self.calls: dict[nn.Module, list[Batch]] = {block: [] for block in blocks}
        self.chained = True
        self._last: Any = None
        self._hooks = [
            hook
            for block in blocks
            for hook in (
                block.register_forward_pre_hook(self._before, with_kwargs=True),
                block.register_forward_hook(self._after),
            )
        ]

    def _before(self, block: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        named = dict(named)
        first = args[0] if args else named.pop("hidden_states", None)
        is_first = block is self.blocks[0]
        self.chained &= isinstance(first, Tensor) and (is_first or first is self._last)
        # The others' inputs are computed from the first one's.
        kept: Any = first if is_first else None
        self.calls[block].append(Batch(kept, kept, args[1:], named))

    def _after(self, _block: nn.Module, _args: Any, output: Any) -> None:
        self._last = output[0] if isinstance(output, tuple) else output

    def close(self, batches: int) -> bool:
        """Ends it; returns whether the blocks can be run one after another."""
        for hook in self._hooks:
            hook.remove()
        return self.chained and all(len(calls) == batches for calls in self.calls.values())


def find_units(
    model: nn.Module,
    blocks: list[nn.Module],
    ids: list[Tensor],
    taps: dict[nn.Module, Tap],
    streams: Streams,
) -> list[tuple[Unit, list[Batch]]]:
    """Runs the original model once; returns its units in order, with what they are called with.

    Blocks of which each takes what the one before gave are units. What is outside of them, or all
    of the model where it is not so, is one more.

    Args:
        model: The model, with taps in it.
        blocks: Its transformer layers.
        ids: Token ids [B, L] of each batch.
        taps: By their layers.
        streams: Theirs.

    Raises:
        NonFiniteError: A layer's input holds NaN or infinity; the message names it.
    """
    options = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    whole = [Batch(part, part, (), dict(options)) for part in ids]
    everything = Unit(model, list(taps.values()), streams, whole=True)
    recorder = _Recorder(blocks)
    try:
        for batch in whole:
            everything.run(_without_logits(model, batch), original=True)
            for tap, x in streams.calls:
                if not bool(torch.isfinite(x).all()):
                    raise NonFiniteError(
                        f"calibrate: the input of {tap.name} must be finite, got NaN or infinity; "
                        "nothing changed"
                    )
            streams.calls.clear()
    finally:
        chained = recorder.close(len(whole))
    units: list[tuple[Unit, list[Batch]]] = []
    inside: set[nn.Module] = set()
    for block in blocks if chained else []:
        layers = [module for module in block.modules() if module in taps]
        units.append(
            (Unit(block, [taps[layer] for layer in layers], streams), recorder.calls[block])
        )
        inside.update(layers)
    outside = [tap for layer, tap in taps.items() if layer not in inside]
    return [*units, (Unit(model, outside, streams, whole=True), whole)] if outside else units


def _without_logits(model: nn.Module, batch: Batch) -> Batch:
    """Returns a call of a model that leaves its logits out, but for the last token's, if it can."""
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return batch
    return replace(batch, named={**batch.named, "logits_to_keep": 1})
