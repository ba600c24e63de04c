"""Two streams of activations through a model: as it was, and as it is with ternary weights."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bitcore.errors import ArgumentError, NonFiniteError
from bitlab_hf.fit.room import Room
from bitlab_hf.fit.solve import Moments
from bitlab_hf.fit.sums import Place, SumFinder, noting, stopping_at
from bitlab_hf.fit.taps import AnyTap, Batch, ExpertsTap, Stop, Streams, Tap


class Unit:
    """A part of the model that is run by itself: a block, or all of it."""

    def __init__(
        self, module: nn.Module, taps: list[AnyTap], streams: Streams, whole: bool = False
    ) -> None:
        self.module, self.taps, self.whole = module, taps, whole
        self._streams = streams

    def run(self, batch: Batch, original: bool, last: AnyTap | None = None) -> Any:
        """Runs it in one of the streams; returns its output, or None if it ended before."""
        self._streams.original, self._streams.last = original, last
        self._streams.wanted = self.taps
        self._streams.calls.clear()
        try:
            output = self.module(batch.first(original), *batch.rest, **batch.named)
        except Stop:
            return None
        return output[0] if isinstance(output, tuple) else output

    def originals(self, batches: list[Batch], finder: SumFinder) -> Originals:
        """Runs it once in the original stream.

        Of a block, what its layers read and what it gives are kept: a few times its width a token.
        Of all of the model they would fill the memory.

        Args:
            batches: What it is called with.
            finder: Of the sums in a block.
        """
        kept = Originals()
        if not self.whole:
            first = batches[0]
            kept.places = finder.find(
                self.module, self.taps, first, lambda: self.run(first, original=True)
            )
        wanted, seen = set(self.taps), set()
        for number, batch in enumerate(batches):
            with noting(kept.places, kept.sums, self._streams.room):
                output = self.run(batch, original=True)
            if not self.whole:
                kept.outputs.append(self._streams.room.hold(output))
            last: Tensor | None = None
            for tap, x in self._streams.calls:
                if tap in wanted and tap not in seen:
                    same = x is last and _multiply_alike(kept.groups[-1][0], tap)
                    kept.groups[-1].append(tap) if same else kept.groups.append([tap])
                    seen.add(tap)
                    # A layer whose output is added to something is fitted to the sum.
                    is_added = isinstance(tap, Tap) and tap in kept.places
                    if not same and not self.whole and not is_added:
                        kept.inputs[tap] = [None] * len(batches)
                # A layer that is called again is fitted to its first call.
                if tap in kept.inputs and kept.inputs[tap][number] is None:
                    kept.inputs[tap][number] = self._streams.room.hold(_as_multiplied(x))
                last = x
            if self.whole and seen == wanted:
                break
        self._streams.calls.clear()
        return kept

    def moments(self, group: list[Tap], batches: list[Batch], kept: Originals) -> Moments:
        """Sums up the inputs of a group of taps over all batches.

        Args:
            group: Taps that read one tensor.
            batches: What the unit is called with.
            kept: What it does in the original stream.
        """
        tap = group[0]
        moments = Moments.zeros(tap.weight.shape[1], tap.weight.device)
        is_added = len(group) == 1 and tap in kept.places
        for number, batch in enumerate(batches):
            if is_added:
                output, missing = self._sum(tap, number, batch, kept)
                x = next(x for other, x in self._streams.calls if other is tap)
                wanted = output.float() + missing
                if tap.layer.bias is not None:
                    wanted = wanted - tap.layer.bias.float()
                moments.add_wanted(wanted.flatten(0, -2), tap.quantized(x).flatten(0, -2))
                continue
            pair = self.inputs(tap, number, batch, kept)
            if pair is not None:
                original_x, x = pair
                moments.add(original_x.flatten(0, -2), tap.quantized(x).flatten(0, -2))
        return moments

    def inputs(
        self, tap: AnyTap, number: int, batch: Batch, kept: Originals
    ) -> tuple[Tensor, Tensor] | None:
        """Returns what a tap is first called with in both streams; None where it is not.

        Args:
            tap: The tap.
            number: Of the batch.
            batch: What the unit is called with.
            kept: What it does in the original stream.
        """
        held = kept.inputs.get(tap)
        original = self._input(tap, batch, original=True) if held is None else held[number]
        x = self._input(tap, batch, original=False)
        if x is None:
            return None
        # Routed tokens can be others in the two streams: then there is no original of them.
        if original is None or original.shape != x.shape:
            return x, x
        return original.to(x.device), x

    def missing(self, tap: AnyTap, number: int, batch: Batch, kept: Originals) -> Tensor | None:
        """Returns what a tap's output would have to have more of, float32 of its shape, for the
        sum to be the original one; None of an output that is not added to anything.
        """
        return self._sum(tap, number, batch, kept)[1] if tap in kept.places else None

    def _sum(
        self, tap: AnyTap, number: int, batch: Batch, kept: Originals
    ) -> tuple[Tensor, Tensor]:
        """Returns a tap's output in the ternary stream, and what is missing of it."""
        place, outputs, sums = kept.places[tap], list[Tensor](), list[Tensor]()

        def note(output: Tensor) -> Tensor:
            outputs.append(output)
            return output

        self._streams.heard = (tap, note)
        try:
            with stopping_at(place, sums):
                whole = self.run(batch, original=False)
        finally:
            self._streams.heard = None
        now = whole if place is None else sums[0]
        before = kept.outputs[number] if place is None else kept.sums[place][number]
        missing = before.to(now.device).float() - now.float()
        return outputs[0], missing.view(outputs[0].shape)

    def _input(self, tap: AnyTap, batch: Batch, original: bool) -> Tensor | None:
        """Returns what a tap is first called with, if it is."""
        self.run(batch, original, last=tap)
        return next((x for other, x in self._streams.calls if other is tap), None)

    def advance(self, batches: list[Batch]) -> list[Tensor]:
        """Returns its outputs in the ternary stream."""
        hold = self._streams.room.hold
        return [hold(self.run(batch, original=False)) for batch in batches]


@dataclass
class Originals:
    """What a unit does in the original stream.

    Attributes:
        groups: Its taps in the order of their calls, together where they read one tensor.
        inputs: Of the first tap of each group, its inputs [..., K] in each batch; none of a layer
            whose output is added to something, and of a whole model.
        outputs: Of the unit in each batch, likewise.
        places: Taps whose outputs are added to something, and where the sum stands.
        sums: Of the places in the block, the sums in each batch.
    """

    groups: list[list[AnyTap]] = field(default_factory=list)
    inputs: dict[AnyTap, list[Tensor | None]] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)
    places: dict[AnyTap, Place] = field(default_factory=dict)
    sums: dict[nn.Module, list[Tensor]] = field(default_factory=dict)


def _multiply_alike(one: AnyTap, other: AnyTap) -> bool:
    """Tells whether two taps make the same of an input; experts get tokens of their own."""
    if isinstance(one, ExpertsTap) or isinstance(other, ExpertsTap):
        return False
    return one.config.activation == other.config.activation


def _as_multiplied(x: Tensor) -> Tensor:
    """Returns an input in the dtype that a matrix product under autocast takes it in."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class _Recorder:
    """Notes what blocks are called with, and whether each takes what the one before gave.

    Args:
        blocks: The model's.
        wanted: Whose inputs are needed: the first one's, from which the others' are computed.
            A pass ends behind the last one, unless that is the model's last.
        room: Where these are held.
    """

    def __init__(self, blocks: list[nn.Module], wanted: range, room: Room) -> None:
        self._ends, self._room = wanted.stop < len(blocks), room
        self.blocks, self._wanted = blocks[: wanted.stop], wanted
        self.calls: dict[nn.Module, list[Batch]] = {block: [] for block in self.blocks}
        self.chained = True
        self._last: Any = None
        self._hooks = [
            hook
            for block in self.blocks
            for hook in (
                block.register_forward_pre_hook(self._before, with_kwargs=True),
                block.register_forward_hook(self._after),
            )
        ]

    def _before(self, block: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        named = dict(named)
        first = args[0] if args else named.pop("hidden_states", None)
        self.chained &= block is self.blocks[0] or first is self._last
        if not isinstance(first, Tensor):
            self.chained = False
            return
        kept: Any = None
        if block is self.blocks[self._wanted.start]:
            kept = self._room.hold(first)
        self.calls[block].append(Batch(kept, kept, first.device, args[1:], named))

    def _after(self, block: nn.Module, _args: Any, output: Any) -> None:
        self._last = output[0] if isinstance(output, tuple) else output
        if self._ends and block is self.blocks[-1]:
            raise Stop

    def close(self, batches: int) -> bool:
        """Ends it; returns whether the blocks can be run one after another."""
        for hook in self._hooks:
            hook.remove()
        return self.chained and all(len(calls) == batches for calls in self.calls.values())


def find_units(
    model: nn.Module,
    blocks: list[nn.Module],
    wanted: range | None,
    ids: list[Tensor],
    taps: dict[nn.Module, AnyTap],
    streams: Streams,
) -> list[tuple[Unit, list[Batch]]]:
    """Runs the original model once; returns its units in order, with what they are called with.

    Blocks of which each takes what the one before gave are units. What is outside of them, or all
    of the model where it is not so, is one more.

    Args:
        model: The model, with taps in it.
        blocks: Its transformer layers.
        wanted: Which of them, by number; what is outside comes with the last one. None for all.
        ids: Token ids [B, L] of each batch.
        taps: By their modules.
        streams: Theirs.

    Raises:
        ArgumentError: There are no such blocks, or they do not run one after another.
        NonFiniteError: A layer's input holds NaN or infinity; the message names it.
    """
    span = range(len(blocks)) if wanted is None else wanted
    if wanted is not None and not (0 <= span.start < span.stop <= len(blocks) and span.step == 1):
        raise ArgumentError(
            f"calibrate: blocks must be of the {len(blocks)} decoder layers, got {wanted}"
        )
    whole = whole_calls(model, ids)
    everything = Unit(model, [], streams, whole=True)
    recorder = _Recorder(blocks, span, streams.room)
    streams.check = _check_finite
    try:
        for batch in whole:
            everything.run(_without_logits(model, batch), original=True)
    finally:
        streams.check = None
        chained = recorder.close(len(whole))
    if wanted is not None and not chained:
        raise ArgumentError(
            "calibrate: blocks must be left out for a model whose decoder layers do not run one "
            f"after another, got {wanted}"
        )
    units: list[tuple[Unit, list[Batch]]] = []
    for block in blocks[span.start : span.stop] if chained else []:
        layers = [taps[module] for module in block.modules() if module in taps]
        units.append((Unit(block, layers, streams), recorder.calls[block]))
    inside = {module for block in blocks if chained for module in block.modules()}
    outside = [tap for layer, tap in taps.items() if layer not in inside]
    if not outside or span.stop < len(blocks):
        return units
    return [*units, (Unit(model, outside, streams, whole=True), whole)]


def _check_finite(tap: AnyTap, x: Tensor) -> None:
    if not bool(torch.isfinite(x).all()):
        raise NonFiniteError(
            f"calibrate: the input of {tap.name} must be finite, got NaN or infinity; nothing "
            "changed\n"
            "It is so in the original model: run that in float32 or bfloat16, whose range is wide, "
            "or look for NaN in the weights before this layer."
        )


def whole_calls(model: nn.Module, ids: list[Tensor], with_logits: bool = True) -> list[Batch]:
    """Returns what all of a model is called with.

    Args:
        model: The model.
        ids: Token ids [B, L] of each batch.
        with_logits: Of all tokens; else of the last ones alone, where the model can.
    """
    options = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    whole = [Batch(part, part, part.device, (), dict(options)) for part in ids]
    return whole if with_logits else [_without_logits(model, batch) for batch in whole]


def _without_logits(model: nn.Module, batch: Batch) -> Batch:
    """Returns a call of a model that leaves its logits out, but for the last token's, if it can."""
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return batch
    return replace(batch, named={**batch.named, "logits_to_keep": 1})
