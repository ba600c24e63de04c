"""Weights [N, K] whose codes and scales calibration chooses: what all have, and an expert's."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from bitcore import ops
from bitcore.config import BitQuantConfig
from bitcore.packing import pack_codes, unpack_ternary
from bitcore.quantize import quantize_activation
from bitlab_hf.fit.latent import latent_weight
from bitlab_hf.fit.solve import Scales
from bitlayers import learned_experts
from bitlayers.experts import BitExperts
from bitlayers.stack import Stack


class Matrix(ABC):
    """A weight [N, K] whose codes and scales are chosen.

    Attributes:
        name: What reports and files call it.
        config: How it is quantized.
    """

    name: str
    config: BitQuantConfig

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The latent weight, float [N, K]; perhaps a view."""

    @property
    @abstractmethod
    def codes(self) -> Tensor | None:
        """What was chosen, int8 [N, K]; None before."""

    @property
    @abstractmethod
    def scales(self) -> Scales | None:
        """Of the codes, likewise."""

    @abstractmethod
    def set(self, codes: Tensor, scales: Scales) -> None:
        """Makes it ternary in the ternary stream."""

    @abstractmethod
    def rounding(self) -> Tensor:
        """Returns what the weight is if it is rounded, float32 [N, K]."""

    @abstractmethod
    def scale_shape(self, part: Tensor) -> tuple[int, int]:
        """Returns the shape of the scales of a part [n, K] that `split` gives."""

    def split(self, matrix: Tensor) -> list[Tensor]:
        """Returns the rows of a matrix [N, K] that are solved together."""
        return [matrix]

    def joined(self, parts: list[tuple[Tensor, Scales]]) -> tuple[Tensor, Scales]:
        """Returns codes and scales of all rows."""
        return parts[0]


class ExpertMatrix(Matrix):
    """One projection of one expert.

    Args:
        module: The name of the experts module.
        experts: The module.
        stack: The projection.
        number: The expert.
    """

    def __init__(self, module: str, experts: BitExperts, stack: Stack, number: int) -> None:
        self.name, self.config = f"{module}.{number}.{stack.name}", stack.config
        self._experts, self._stack, self._number = experts, stack, number
        # Packed: there are as many as a layer of this width would have, times the experts.
        self._found: tuple[Tensor, Scales] | None = None
        self.keeps_rounding = False

    @property
    def _held(self) -> Tensor:
        """The expert's part of the Parameter, as it lies."""
        held: Tensor = self._experts._parameters[self._stack.name]  # type: ignore[assignment]
        return self._stack.apart(held)[self._number]

    @property
    def weight(self) -> Tensor:
        """The latent weight."""
        return self._held.t() if self._stack.transposed else self._held

    @property
    def codes(self) -> Tensor | None:
        """What was chosen."""
        if self._found is None:
            return None
        return unpack_ternary(self._found[0], self._stack.out_features)

    @property
    def scales(self) -> Scales | None:
        """Of the codes, with a scale a tensor given a row."""
        return None if self._found is None else self._found[1]

    def set(self, codes: Tensor, scales: Scales) -> None:
        """Makes it ternary in the ternary stream."""
        self._found = pack_codes(codes.to(torch.int8)), scales

    def rounding(self) -> Tensor:
        """Returns the rounded weight."""
        learned = learned_experts.of(self._experts, self._stack.name)
        own = None if learned is None else learned[self._number]
        qweight, scale, *multiplier = self._stack.pack(self._held, own)
        rows = self._stack.out_features
        return ops.unpack_weight(qweight, scale, rows, torch.float32, *multiplier)

    def ternary(self) -> Tensor | None:
        """Returns what the ternary stream multiplies with, float32 [N, K]; None for W itself."""
        if self.keeps_rounding:
            return self.rounding()
        codes, scales = self.codes, self.scales
        return None if codes is None or scales is None else codes * scales.full().float()

    def scale_shape(self, part: Tensor) -> tuple[int, int]:
        """Returns the shape of the scales of some rows."""
        rows = 1 if self.config.granularity == "per_tensor" else len(part)
        return rows, part.shape[1] // (self.config.group_size or part.shape[1])

    def split(self, matrix: Tensor) -> list[Tensor]:
        """Returns the logical matrices with a scale each, else all rows."""
        return self._stack.split(matrix)

    def joined(self, parts: list[tuple[Tensor, Scales]]) -> tuple[Tensor, Scales]:
        """Returns codes and scales of all rows; a scale for each of them, or more."""
        values = [s.values.expand(len(codes), -1) for codes, s in parts]
        columns, leveled = self._stack.in_features, parts[0][1].leveled
        codes = self._stack.joined([codes for codes, _ in parts])
        return codes, Scales(self._stack.joined(values), columns, leveled)

    def commit(self) -> None:
        """Gives the expert a latent weight with these codes and scales, if it has any."""
        codes, scales, stack = self.codes, self.scales, self._stack
        if codes is None or scales is None:
            return
        latents, chosen = [], []
        parts = zip(*map(stack.split, (self.weight, codes, scales.values)), strict=True)
        for weight, ones, values in parts:
            rows = self.scale_shape(weight)[0]
            held = Scales(values[:rows], stack.in_features, scales.leveled)
            latents.append(latent_weight(weight, ones.double(), held, self.config))
            chosen.append(held.values)
        learned = learned_experts.of(self._experts, stack.name)
        if learned is not None:
            learned[self._number] = torch.cat(chosen).reshape(stack.learned_shape[1:])
        self._held.copy_(stack.stored(stack.joined(latents)))


def quantized(x: Tensor, config: BitQuantConfig) -> Tensor:
    """Returns activations as a ternary layer multiplies them, in their dtype."""
    if config.activation == "float":
        return x
    codes, scale = quantize_activation(x, config.activation == "int8_per_tensor")
    return (codes.float() * scale).to(x.dtype)
