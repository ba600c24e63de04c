"""What sends each token through its experts: every expert runs once, on all of its tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def route(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    experts: int,
    expert: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """Returns the weighted sum of what the experts of each token give.

    Args:
        hidden_states: [M, H].
        top_k_index: int [M, k], the experts of each token; one that is not below the number of
            experts is none, and adds nothing.
        top_k_weights: float [M, k], what each expert's output is multiplied with.
        experts: E.
        expert: Called with the tokens [m, H] of an expert that has any, and its number; returns
            [m, H].

    Returns:
        [M, H] of the dtype of hidden_states.

    Numerics:
        A token's experts are added up in the order of its choice, whatever else is in the batch:
        not in that of the experts, and not by index_add, whose order depends on the device.
    """
    chosen = top_k_index.shape[-1]
    index = top_k_index.reshape(-1)
    order = torch.argsort(index, stable=True)
    counts = torch.bincount(index, minlength=experts)[:experts].tolist()
    outputs: list[Tensor] = []
    start = 0
    for number, count in enumerate(counts):
        if count:
            places = order[start : start + count]
            start += count
            outputs.append(expert(hidden_states.index_select(0, places // chosen), number))
    if not outputs:
        return torch.zeros_like(hidden_states)
    # In place, and weighted where they stand: no copy of them outlives this but the one that the
    # weights' gradient needs.
    given = torch.cat(outputs)
    del outputs
    rows = given.new_zeros(index.numel(), given.shape[-1]).index_copy_(0, order[:start], given)
    del given
    weighted = rows.view(-1, chosen, rows.shape[-1]) * top_k_weights.unsqueeze(-1)
    return weighted.sum(1).to(hidden_states.dtype)
