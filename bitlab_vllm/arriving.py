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
from bitlab_vllm.parts import DensePart, Int8Part, Part, TernaryPart
from bitlab_vllm.scheme import FLOAT, INT8, Form
from bitlab_vllm.slices import Codes, Slice, join, take, take_int8

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
        form: How it is held.
        normed: Whether it has an RMS norm of its input.
    """

    part: Slice
    form: Form
    normed: bool

    @property
    def leaves(self) -> list[str]:
        """The names of its tensors."""
        if self.form == FLOAT:
            return ["weight"]
        two_levels = isinstance(self.form, BitQuantConfig) and self.form.granularity == "per_group"
        leaves = ["qweight", "qweight_scale"] + ["qweight_multiplier"] * two_levels
        return leaves + [NORM] * self.normed


@dataclass(frozen=True)
class _Piece:
    """A stored layer cut to size; neighbours of one kind are multiplied as one."""

    kind: tuple[Any, ...]
    form: Form
    codes: Codes | None = None
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
        if leaf == "qweight" and all(one.form == INT8 for one in self._stored):
            dtype = torch.int8
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
        part, form = stored.part, stored.form
        if isinstance(form, BitQuantConfig):
            codes = take(part, form, tensors)
            alone = part.name if stored.normed else None
            kind = (form.activation, codes.columns, alone)
            return _Piece(kind, form, codes, tensors[NORM] if stored.normed else None)
        if form == INT8:
            return _Piece((INT8,), form, take_int8(part, tensors))
        return _Piece((part.name,), form, tensor=part.take_rows(tensors["weight"]))

    def _part(self, run: list[_Piece]) -> Part:
        first, device = run[0], self._device
        codes = [one.codes for one in run if one.codes is not None]
        if isinstance(first.form, BitQuantConfig):
            qweight, scale, multiplier = join(codes)
            return TernaryPart(
                qweight.to(device),
                scale.to(device),
                None if multiplier is None else multiplier.to(device),
                first.form.activation,
                None if first.tensor is None else first.tensor.to(device),
            )
        if first.form == INT8:
            qweight = torch.cat([one.codes for one in codes])
            return Int8Part(qweight.to(device), torch.cat([one.scale for one in codes]).to(device))
        assert first.tensor is not None
        return DensePart(first.tensor.to(device, self._dtype))
