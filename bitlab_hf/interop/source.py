"""Tensors of another format, which give their rows as floats: matrices, and those of experts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor


class Source(Protocol):
    """A tensor of the other format, which gives its rows as floats.

    Attributes:
        ternary: Whether its format means it to be ternary.
        shape: Rows first.
        dtype: Of the values that it gives: float32, float16 or bfloat16.
        n_bytes: Its size in the file.
    """

    ternary: bool
    shape: tuple[int, ...]
    dtype: torch.dtype
    n_bytes: int

    def numel(self) -> int:
        """Returns the number of values."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice) -> Tensor: ...


class Joined:
    """Matrices of as many columns, one above the other, as one [N, K].

    Args:
        parts: The matrices; what gives their rows as floats.
        dtype: Of the values.
    """

    def __init__(self, parts: list[Source], dtype: torch.dtype) -> None:
        self.parts, self.dtype = parts, dtype
        self.shape = (sum(map(len, parts)), parts[0].shape[1])

    def numel(self) -> int:
        """Returns the number of values."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(len(self))
        held, at = [torch.empty(0, self.shape[1], dtype=self.dtype)], 0
        for part in self.parts:
            first, last = max(start - at, 0), min(stop - at, len(part))
            if first < last:
                held.append(part[first:last].to(self.dtype))
            at += len(part)
        return torch.cat(held)


class Experts:
    """The matrices of all experts of one projection, as a `Source` [E, N, K] that gives experts.

    Args:
        parts: Of each expert, the logical matrices that lie one above the other, such as gate and
            up.
    """

    def __init__(self, parts: list[list[Source]]) -> None:
        self._parts = parts
        every = [part for one in parts for part in one]
        self.dtype = reduce(torch.promote_types, {part.dtype for part in every})
        self.ternary = any(part.ternary for part in every)
        self.shape: tuple[int, ...] = (len(parts), *self.matrix(0).shape)
        self.n_bytes = sum(part.n_bytes for part in every)

    def numel(self) -> int:
        """Returns the number of values."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        return len(self._parts)

    def matrix(self, expert: int) -> Joined:
        """Returns an expert's [N, K]."""
        return Joined(self._parts[expert], self.dtype)

    def __getitem__(self, experts: slice) -> Tensor:
        return torch.stack([self.matrix(at)[:] for at in range(len(self))[experts]])


def matrices(weight: Any) -> Iterator[Any]:
    """Yields the matrices [N, K] of what is one, or of `Experts`."""
    if len(weight.shape) == 2:
        yield weight
        return
    for expert in range(len(weight)):
        yield weight.matrix(expert)
