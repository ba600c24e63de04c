"""Routing: each token's weighted sum, whatever else is in the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from bitlayers.routing import route


def expert(x: Tensor, number: int) -> Tensor:
    return x * (number + 1)


def test_sums_are_those_of_each_token_alone() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(7, 6, generator=generator)
    index = torch.stack([torch.randperm(5, generator=generator)[:3] for _ in range(7)])
    weights = torch.rand(7, 3, generator=generator)
    got = route(x, index, weights, 5, expert)
    for token in range(7):
        pairs = zip(index[token], weights[token], strict=True)
        first, second, third = (x[token] * float(one + 1) * weight for one, weight in pairs)
        assert torch.equal(got[token], first + second + third)
        own = slice(token, token + 1)
        assert torch.equal(got[own], route(x[own], index[own], weights[own], 5, expert))


def test_each_expert_runs_once_and_only_with_tokens() -> None:
    called: list[tuple[int, int]] = []

    def noting(x: Tensor, number: int) -> Tensor:
        called.append((number, len(x)))
        return x

    index = torch.tensor([[4, 1], [1, 4], [1, 3]])
    route(torch.ones(3, 2), index, torch.ones(3, 2), 6, noting)
    assert called == [(1, 3), (3, 1), (4, 2)]


def test_no_token_and_no_expert() -> None:
    none = route(torch.ones(0, 4), torch.zeros(0, 2).long(), torch.ones(0, 2), 3, expert)
    assert none.shape == (0, 4)
    # As transformers marks what is another device's: not below the number of experts.
    x = torch.ones(2, 4, dtype=torch.bfloat16)
    elsewhere = torch.full((2, 2), 3)
    assert torch.equal(route(x, elsewhere, torch.ones(2, 2), 3, expert), torch.zeros_like(x))
    elsewhere[1, 0] = 1
    got = route(x, elsewhere, torch.ones(2, 2), 3, expert)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, torch.tensor([[0.0], [2.0]]).expand(2, 4).bfloat16())


def test_gradients_reach_tokens_and_weights() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 2], [2, 1], [0, 1]])
    assert torch.autograd.gradcheck(lambda x, w: route(x, index, w, 3, expert), (x, weights))
