"""The matrices of all experts apart, with one gradient for all of them.

``unbind`` would keep the gradient of every expert until the last one is there, make zeros for those
that got no tokens, and then copy all into one tensor: twice the memory of the weights. Here each
gradient is written to its place as soon as it is known.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Parts:
    """The parts of a tensor [E, ...] in one forward pass.

    Args:
        whole: The tensor.
    """

    def __init__(self, whole: Tensor) -> None:
        self._whole = whole.detach()
        self._trains = torch.is_grad_enabled() and whole.requires_grad
        self._gradient: Tensor | None = None
        self._written: set[int] = set()
        # A number that stands for the tensor in the graph: the backward pass comes to it when it
        # has been through all parts.
        self._anchor = whole
        if self._trains:
            self._anchor = _Whole.apply(whole, self)  # type: ignore[no-untyped-call]

    def __getitem__(self, number: int) -> Tensor:
        """Returns one part, a view."""
        part = self._whole[number]
        if self._trains:
            part = _Part.apply(self._anchor, part, self, number)  # type: ignore[no-untyped-call]
        return part

    def write(self, number: int, gradient: Tensor) -> None:
        """Adds a part's gradient."""
        if self._gradient is None:
            self._gradient = torch.empty_like(self._whole)
        place = self._gradient[number]
        if number in self._written:
            place.add_(gradient)
        else:
            place.copy_(gradient)
            self._written.add(number)

    def take(self) -> Tensor | None:
        """Returns the gradient of the whole tensor, zeros where there was none; None where there
        was none at all.
        """
        gradient = self._gradient
        if gradient is not None:
            for number in range(len(gradient)):
                if number not in self._written:
                    gradient[number].zero_()
        self._gradient, self._written = None, set()
        return gradient


class _Whole(torch.autograd.Function):
    """Gives a number in a tensor's place."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, parts: Parts) -> Tensor:
        ctx.parts = parts
        return whole.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, None]:
        return ctx.parts.take(), None


class _Part(torch.autograd.Function):
    """Gives a part of the tensor for the number."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, part: Tensor, parts: Parts, number: int) -> Tensor:
        ctx.parts, ctx.number = parts, number
        return part.view_as(part)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        gradient = gradients[0]
        ctx.parts.write(ctx.number, gradient)
        return gradient.new_zeros(()), None, None, None
