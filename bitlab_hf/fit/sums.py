"""Where a layer's output is added to something, as to the residual stream of a decoder.

What layers before have put wrong into the stream stands beside the output in that sum, and so the
layer can take back as much of it as its inputs tell. Whether there is such a place, and where, is
found by trying: an output that is shifted shifts the sum by as much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitlab_hf.fit.room import Room
from bitlab_hf.fit.taps import AnyTap, Batch, Stop, Streams

# A module whose input the sum is; None for the unit's output.
Place = nn.Module | None
Run = Callable[[], Any]


def input_of(args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Returns what a module is given first."""
    return args[0] if args else next(iter(named.values()), None)


@contextmanager
def stopping_at(place: Place, noted: list[Any]) -> Iterator[None]:
    """Ends passes at a sum inside of a block, and notes it."""
    if place is None:
        yield
        return

    def stop(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        noted.append(input_of(args, named))
        raise Stop

    handle = place.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def noting(
    places: Mapping[AnyTap, Place], sums: dict[nn.Module, list[Tensor]], room: Room
) -> Iterator[None]:
    """Notes the sums that stand inside of a block in each pass."""

    def note(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        sums.setdefault(module, []).append(room.hold(input_of(args, named)))

    inside = {place for place in places.values() if place is not None}
    handles = [place.register_forward_pre_hook(note, with_kwargs=True) for place in inside]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class SumFinder:
    """Finds the places of the sums; blocks that are built alike are tried once.

    Args:
        streams: What the taps share.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._known: dict[Any, dict[str, str | None]] = {}

    def find(
        self, module: nn.Module, taps: list[AnyTap], batch: Batch, run: Run
    ) -> dict[AnyTap, Place]:
        """Returns the taps whose output is added to something, with the place of the sum.

        Args:
            module: A block.
            taps: Of its layers.
            batch: What it is called with.
            run: Runs it in the original stream; returns its output.
        """
        names = {inner: name for name, inner in module.named_modules()}
        modules = dict(module.named_modules())
        own = {names[tap.module]: tap for tap in taps}
        key = (type(module), tuple(own))
        if key not in self._known:
            found = self._try(module, taps, batch, run)
            self._known[key] = {
                names[tap.module]: None if place is None else names[place]
                for tap, place in found.items()
            }
        return {
            own[tap]: None if place is None else modules[place]
            for tap, place in self._known[key].items()
        }

    def _try(
        self, module: nn.Module, taps: list[AnyTap], batch: Batch, run: Run
    ) -> dict[AnyTap, Place]:
        stream = batch.first(original=True)
        before = _trace(module, stream.shape, run)
        size = stream.float().abs().mean().clamp(min=1e-6)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(stream.shape, generator=generator).to(stream.device) * size
        found: dict[AnyTap, Place] = {}
        for tap in taps:
            outputs: list[Tensor] = []

            def shift(output: Tensor, outputs: list[Tensor] = outputs) -> Tensor:
                outputs.append(output)
                if not _is_stream(output, noise):
                    return output
                return output + noise.to(output.dtype).view(output.shape)

            self._streams.heard = (tap, shift)
            try:
                after = _trace(module, stream.shape, run)
            finally:
                self._streams.heard = None
            if len(outputs) != 1 or not _is_stream(outputs[0], noise):
                continue
            output = outputs[0].reshape(noise.shape)
            for place in before:
                if place in after and _is_sum(before[place], after[place], output, noise):
                    found[tap] = place
                    break
        return found


def _trace(module: nn.Module, shape: torch.Size, run: Run) -> dict[Place, Tensor]:
    """Runs a block; returns what its modules are given, and its output, of the stream's shape.

    Modules that are called more than once are left out.
    """
    noted: dict[Place, list[Any]] = {}

    def note(inner: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        noted.setdefault(inner, []).append(input_of(args, named))

    handles = [
        inner.register_forward_pre_hook(note, with_kwargs=True)
        for inner in module.modules()
        if inner is not module
    ]
    try:
        noted[None] = [run()]
    finally:
        for handle in handles:
            handle.remove()
    return {
        place: given[0]
        for place, given in noted.items()
        if len(given) == 1 and isinstance(given[0], Tensor) and given[0].shape == shape
    }


def _is_stream(output: Tensor, stream: Tensor) -> bool:
    """Tells whether an output is of the stream's shape, or of its tokens in one row."""
    return output.shape[-1] == stream.shape[-1] and output.numel() == stream.numel()


def _is_sum(before: Tensor, after: Tensor, output: Tensor, shift: Tensor) -> bool:
    """Tells whether a tensor is the output and something else, added."""
    # The median: where outliers are rounded, the shift is lost.
    moved = (after.float() - before.float() - shift).abs().median()
    beside = (before.float() - output.float()).abs().median()
    return bool(moved < 0.05 * shift.abs().median()) and bool(beside > 0)
