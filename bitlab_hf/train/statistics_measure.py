"""What is counted of one layer: its codes, what changed in them, its weights, its input.

Everything is read from what the layer itself packs, so that it holds for every estimator and scale,
and from packed bytes, four codes at a time.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitcore.packing import unpack_ternary
from bitcore.quantize import row_blocks
from bitlayers.base import BitLayerBase

# Bins of weight / scale: 0.1 wide from -3 to 3; the outermost hold what lies beyond.
EDGE, BINS = 3.0, 60


def code_counts(qweight: Tensor, out_features: int) -> Tensor:
    """Counts the codes of a packed weight.

    Args:
        qweight: uint8 [ceil(N / 4), K].
        out_features: N; the rows after it are padding and are not counted.

    Returns:
        int64 [3] on the CPU: how many codes are -1, 0 and +1.
    """
    bytes_of = torch.bincount(qweight.flatten(), minlength=256).cpu()
    value = torch.arange(256)
    lanes = torch.stack([value >> shift & 3 for shift in (0, 2, 4, 6)])
    counts = torch.stack([((lanes == code).sum(0) * bytes_of).sum() for code in range(3)])
    # Padding is written as code 0.
    counts[1] -= (4 * qweight.shape[0] - out_features) * qweight.shape[1]
    return counts


def changed_codes(before: Tensor, after: Tensor) -> int:
    """Returns how many codes differ between two packed weights of one shape."""
    different = before ^ after
    # A code's two bits, folded onto the lower one.
    different = (different | different >> 1) & 0x55
    bytes_of = torch.bincount(different.flatten(), minlength=256).cpu()
    value = torch.arange(256)
    bits = sum((value >> shift & 1) for shift in (0, 2, 4, 6))
    return int((bits * bytes_of).sum())


def weight_histogram(weight: Tensor, qweight: Tensor, scale: Tensor) -> list[list[int]]:
    """Counts a layer's weights by their size in scales, and by the code that each has.

    Args:
        weight: float [N, K].
        qweight: uint8 [ceil(N / 4), K], the codes.
        scale: float32 [1], [N] or [N, K / G].

    Returns:
        Three lists of `BINS` counts, for the codes -1, 0 and +1: weights with ``weight / scale`` in
        bins of equal width from -`EDGE` to `EDGE`; what lies beyond is in the outermost bins.
    """
    rows, columns = weight.shape
    codes = unpack_ternary(qweight, rows)
    counts = torch.zeros(3 * BINS, dtype=torch.int64)
    for block in row_blocks(rows, columns):
        part = scale if scale.numel() == 1 else scale[block]
        groups = part.shape[1] if part.dim() == 2 else 1
        values = weight[block].float().reshape(-1, groups, columns // groups)
        ratio = values / part.view(-1, groups, 1)
        bins = ((ratio + EDGE) * (BINS / (2 * EDGE))).nan_to_num(0.0).clamp(0, BINS - 1).long()
        index = (codes[block].long() + 1) * BINS + bins.view(-1, columns)
        counts += torch.bincount(index.flatten(), minlength=3 * BINS).cpu()
    return [[int(count) for count in row] for row in counts.view(3, BINS)]


@contextmanager
def whole_weights(layer: BitLayerBase) -> Iterator[bool]:
    """Gives the layer its whole parameters for a moment, where they are DTensors (FSDP2).

    Gathering is a collective: every process of the group has to come here, in the same order.

    Yields:
        Whether the layer now has a weight matrix to look at. It has none where a sharding that is
        not DTensor's (DeepSpeed ZeRO-3, the first FSDP) keeps the rows elsewhere.
    """
    sharded = {
        name: parameter
        for name, parameter in layer._parameters.items()
        if parameter is not None and hasattr(parameter, "full_tensor")
    }
    for name, parameter in sharded.items():
        whole: Tensor = parameter.full_tensor()
        layer._parameters[name] = nn.Parameter(whole.detach(), requires_grad=False)
    try:
        weight = layer._parameters.get("weight")
        yield (
            weight is not None
            and weight.dim() == 2
            and weight.numel() == layer.out_features * layer.in_features
        )
    finally:
        layer._parameters.update(sharded)


class InputWatch:
    """Watches the inputs of layers while it is on: how many codes are at the end of their range.

    A forward pre-hook quantizes the input once more and counts; layers that read one tensor share
    the count. Nothing is copied to the CPU before `read`.

    Args:
        layers: The layers by name.
    """

    def __init__(self, layers: dict[str, BitLayerBase]) -> None:
        self._layers = layers
        self._handles: list[Any] = []
        self._sums: dict[str, list[Tensor]] = {}
        self._last: tuple[weakref.ref[Tensor], int, str, list[Tensor]] | None = None

    def start(self) -> None:
        """Forgets what was counted and starts counting."""
        self.stop()
        self._sums = {}
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_pre_hook(self._hook(name)))

    def stop(self) -> None:
        """Takes the hooks off; what was counted stays until `start`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._last = None

    def read(self, name: str) -> tuple[float | None, float | None]:
        """Returns a layer's share of codes at -127 or 127 (None if its input is not quantized) and
        its largest absolute input; two None if it saw nothing.
        """
        found = self._sums.get(name)
        if found is None:
            return None, None
        ends, count, most = (float(item) for item in found)
        return (None if ends < 0 else ends / max(1.0, count)), most

    def _hook(self, name: str) -> Any:
        def hook(layer: BitLayerBase, inputs: tuple[Any, ...]) -> None:
            if inputs and isinstance(inputs[0], Tensor) and inputs[0].numel():
                self._count(name, inputs[0], layer.quant_config.activation)

        return hook

    @torch.no_grad()
    def _count(self, name: str, x: Tensor, activation: str) -> None:
        last = self._last
        same = last is not None and last[0]() is x and last[1:3] == (x._version, activation)
        if same and last is not None:
            found = last[3]
        else:
            found = _input_counts(x.detach(), activation)
            self._last = (weakref.ref(x), x._version, activation, found)
        held = self._sums.get(name)
        if held is None:
            self._sums[name] = list(found)
        else:
            ends, count, most = found
            self._sums[name] = [held[0] + ends, held[1] + count, torch.maximum(held[2], most)]


def _input_counts(x: Tensor, activation: str) -> list[Tensor]:
    """Returns three scalars: codes at the ends (-1: not quantized), values, largest absolute."""
    count = torch.tensor(float(x.numel()), device=x.device)
    if activation == "float":
        return [-torch.ones_like(count), count, x.abs().amax().float()]
    codes, scale = torch.ops.bitlab.quantize_activation(x, activation == "int8_per_tensor")
    ends = ((codes == 127) | (codes <= -127)).sum().float()
    return [ends, count, scale.amax() * 127.0]
