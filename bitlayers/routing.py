"""Routing: which expert each token goes to, and what becomes of what its experts give."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from bitcore import reference


class Routing:
    """The choice of one forward pass.

    A *row* is a token with one of its experts. All that has an entry a row has the rows of a token
    one after the other, in the order of its choice: train, eval and deployed modules compute what
    stands between two products on the same tensors, so with the same bits.

    Args:
        index: int [M, k], the experts of each token; one that is not below the number of experts
            is none, and adds nothing.
        experts: E.
    """

    def __init__(self, index: Tensor, experts: int) -> None:
        self.index, self.experts = index, experts

    @cached_property
    def visits(self) -> list[tuple[int, Tensor]]:
        """The number of each expert that has rows, and which rows, ascending."""
        return list(reference.by_expert(self.index, self.experts))

    @cached_property
    def places(self) -> Tensor:
        """The rows of `visits`, one expert after the other."""
        rows = [rows for _, rows in self.visits]
        return torch.cat(rows) if rows else self.index.new_empty(0, dtype=torch.int64)

    def gather(self, x: Tensor) -> list[Tensor]:
        """Returns the tokens of each of `visits`, of x [M, K] or with an entry a row."""
        each = self.index.numel() // max(len(x), 1)
        tokens = self.places // each if each > 1 else self.places
        sizes = [len(rows) for _, rows in self.visits]
        return list(torch.split(x.index_select(0, tokens), sizes))

    def scatter(self, outputs: list[Tensor]) -> Tensor:
        """Returns what each of `visits` gave, at least one, with an entry a row; zeros for none."""
        rows = outputs[0].new_zeros(self.index.numel(), outputs[0].shape[-1])
        # In place: no copy of them outlives this.
        return rows.index_copy_(0, self.places, torch.cat(outputs))

    def weighted_sum(self, rows: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns each token's weighted sum of its rows.

        Args:
            rows: [M k, H], what the experts gave.
            weights: float [M, k].
            dtype: Of the result.

        Returns:
            [M, H].

        Numerics:
            A token's experts are added up in the order of its choice, whatever else is in the
            batch: not in that of the experts, and not by index_add, whose order depends on the
            device.
        """
        # Of none there are zeros, unless a norm came after; and its weight can be anything.
        weights = weights.masked_fill(self.index >= self.experts, 0)
        weighted = rows.view(*self.index.shape, rows.shape[-1]) * weights.unsqueeze(-1)
        return weighted.sum(1).to(dtype)
