"""Routing: each token's weighted sum, whatever else is in the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from bitlayers.routing import Routing


def run(x: Tensor, index: Tensor, weights: Tensor, experts: int) -> Tensor:
    """Expert n multiplies with n + 1."""
    routing = Routing(index, experts)
    outputs = [
        tokens * (number + 1)
        for (number, _), tokens in zip(routing.visits, routing.gather(x), strict=True)
    ]
    rows = routing.scatter(outputs) if outputs else x.new_zeros(index.numel(), x.shape[1])
    return routing.weighted_sum(rows, weights, x.dtype)


def test_sums_are_those_of_each_token_alone() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(7, 6, generator=generator)
    index = torch.stack([torch.randperm(5, generator=generator)[:3] for _ in range(7)])
    weights = torch.rand(7, 3, generator=generator)
    got = run(x, index, weights, 5)
    for token in range(7):
        pairs = zip(index[token], weights[token], strict=True)
        first, second, third = (x[token] * float(one + 1) * weight for one, weight in pairs)
        assert torch.equal(got[token], first + second + third)
        own = slice(token, token + 1)
        assert torch.equal(got[own], run(x[own], index[own], weights[own], 5))


def test_experts_without_tokens_are_not_visited() -> None:
    routing = Routing(torch.tensor([[4, 1], [1, 4], [1, 3]]), 6)
    assert [(number, rows.tolist()) for number, rows in routing.visits] == [
        (1, [1, 2, 4]),
        (3, [5]),
        (4, [0, 3]),
    ]
    # Of tokens, and of what has an entry a row.
    tokens, rows = torch.arange(3.0)[:, None], torch.arange(6.0)[:, None]
    assert [one.flatten().tolist() for one in routing.gather(tokens)] == [[0, 1, 2], [2], [0, 1]]
    assert [one.flatten().tolist() for one in routing.gather(rows)] == [[1, 2, 4], [5], [0, 3]]
    assert torch.equal(routing.scatter(routing.gather(rows)), rows)


def test_no_token_and_no_expert() -> None:
    none = run(torch.ones(0, 4), torch.zeros(0, 2).long(), torch.ones(0, 2), 3)
    assert none.shape == (0, 4)
    # As transformers marks what is another device's: not below the number of experts.
    x = torch.ones(2, 4, dtype=torch.bfloat16)
    elsewhere = torch.full((2, 2), 3)
    weights = torch.tensor([[float("nan"), 1.0], [1.0, float("inf")]])
    assert torch.equal(run(x, elsewhere, weights, 3), torch.zeros_like(x))
    elsewhere[1, 0] = 1
    got = run(x, elsewhere, weights, 3)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, torch.tensor([[0.0], [2.0]]).expand(2, 4).bfloat16())


def test_what_a_norm_makes_of_no_expert_adds_nothing() -> None:
    routing = Routing(torch.tensor([[2, 0]]), 2)
    rows = torch.tensor([[5.0, 5.0], [1.0, 2.0]])
    got = routing.weighted_sum(rows, torch.tensor([[1.0, 3.0]]), torch.float32)
    assert got.tolist() == [[3.0, 6.0]]


def test_gradients_reach_tokens_and_weights() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 2], [2, 1], [0, 1]])
    assert torch.autograd.gradcheck(lambda x, w: run(x, index, w, 3), (x, weights))
