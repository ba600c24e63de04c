"""The stored tensors of one of vLLM's layers while they come from the files, and what becomes of
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from bitcore.config import BitQuantConfig
from bitcore.errors import CheckpointError
from bitlab_vllm.parts import DensePart, Part, TernaryPart
from bitlab_vllm.slices import Codes, Slice, join, take

NORM = "rms_norm.weight"
# vLLM warns where a stored tensor's dtype is another than its parameter's.
_DTYPES = {
    "qweight": torch.uint8,
    "qweight_scale": torch.float32,
    "qweight_multiplier": torch.uint8,
}
# vLLM's names of the parts of a layer that it fuses; others are numbers.
_SHARDS = {"q": 0, "k": 1, "v": 2}


@dataclass(frozen=True)
class Stored:
    """A layer of the checkpoint, as one of those that vLLM fuses.

    Attributes:
        part: What this process has of it.
        config: How it is quantized; None where it stays float.
        normed: Whether it has an RMS norm of its input.
    """

    part: Slice
    config: BitQuantConfig | None
    normed: bool

    @property
    def leaves(self) -> list[str]:
        """The names of its tensors."""
        if self.config is None:
            return ["weight"]
        two_levels = self.config.granularity == "per_group"
        leaves = ["qweight", "qweight_scale"] + ["qweight_multiplier"] * two_levels
        return leaves + [NORM] * self.normed


@dataclass(frozen=True)
class _Piece:
    """A stored layer cut to size; neighbours of one kind are multiplied as one."""

    kind: tuple[Any, ...]
    codes: Codes | None = None
    activation: str = ""
    tensor: Tensor | None = None


class Arriving:
    """Keeps tensors until all of a layer are there, then packs them.

    Args:
        stored: The stored layers, in the order in which vLLM fuses them.
        device: Where the parts are to lie.
        dtype: Of what stays float.
    """

    def __init__(self, stored: Sequence[Stored], device: torch.device, dtype: torch.dtype) -> None:
        self._stored, self._device, self._dtype = stored, device, dtype
        self._tensors: list[dict[str, Tensor]] = [{} for _ in stored]
        self._parts: list[Part] | None = None

    def placeholder(self, leaf: str) -> nn.Parameter:
        """Returns an empty parameter whose loader, which vLLM calls, hands on what it is given."""

        def load(parameter: Any, loaded: Tensor, shard: Any = None) -> None:
            self.add(leaf, loaded, shard)

        dtype = _DTYPES.get(leaf, self._dtype)
        parameter: Any = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        parameter.weight_loader = load
        held: nn.Parameter = parameter
        return held

    def add(self, leaf: str, loaded: Tensor, shard: Any = None) -> None:
        """Keeps a tensor; packs the layer if it was the last.

        Args:
            leaf: Its name within the stored layer.
            loaded: The tensor; an empty one is the file's sentinel.
            shard: Which stored layer, as vLLM names it.

        Raises:
            CheckpointError: There is no such layer, or the tensors are not what they should be.
        """
        if not loaded.numel():
            return
        at = 0 if len(self._stored) == 1 else _SHARDS.get(shard, shard)
        if not isinstance(at, int) or not 0 <= at < len(self._stored):
            raise CheckpointError(
                f"bitlab: a tensor of a fused layer must be of one of "
                f"{[one.part.name for one in self._stored]}, got shard {shard!r}"
            )
        self._tensors[at][leaf] = loaded
        if not self._missing():
            self._pack()

    def parts(self) -> list[Part]:
        """Returns the packed parts.

        Raises:
            CheckpointError: A tensor has not come.
        """
        if self._parts is None:
            raise CheckpointError(
                f"{self._missing()[0]} must be in the checkpoint, got none\n"
                "The file is incomplete; fetch or write it again."
            )
        return self._parts

    def _missing(self) -> list[str]:
        return [
            f"{one.part.name}.{leaf}"
            for one, held in zip(self._stored, self._tensors, strict=True)
            for leaf in one.leaves
            if leaf not in held
        ]

    def _pack(self) -> None:
        pieces = [self._piece(*pair) for pair in zip(self._stored, self._tensors, strict=True)]
        self._tensors = [{} for _ in self._stored]
        self._parts = [
            self._part(list(run)) for _, run in groupby(pieces, key=lambda piece: piece.kind)
        ]

    def _piece(self, stored: Stored, tensors: dict[str, Tensor]) -> _Piece:
        name, config, norm = stored.part.name, stored.config, tensors.get(NORM)
        if config is None:
            return _Piece((name,), tensor=stored.part.take_rows(tensors["weight"]))
        codes = take(stored.part, config, tensors)
        alone = name if stored.normed else None
        kind = (config.activation, codes.columns, alone)
        return _Piece(kind, codes, config.activation, norm if stored.normed else None)

    def _part(self, run: list[_Piece]) -> Part:
        first = run[0]
        if first.codes is None:
            assert first.tensor is not None
            return DensePart(first.tensor.to(self._device, self._dtype))
        qweight, scale, multiplier = join([one.codes for one in run if one.codes is not None])
        norm = None if first.tensor is None else first.tensor.to(self._device)
        return TernaryPart(
            qweight.to(self._device),
            scale.to(self._device),
            None if multiplier is None else multiplier.to(self._device),
            first.activation,
            norm,
        )
