"""The experts of a layer of vLLM's, over one process and several: the bits of BitLab's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bitcore.config import BitQuantConfig
from bitcore.errors import ArgumentError, CheckpointError
from bitcore.ops import linear
from bitlab_vllm.stacks import ArrivingExperts, ExpertsPart, Stack, own_experts, weighted_sum
from tests.bitlab_vllm.test_slices import GRANULARITIES, spoil, stored

EXPERTS, HIDDEN, INNER = 5, 128, 64
CPU = torch.device("cpu")


def stacks(kind: str) -> tuple[Stack, Stack]:
    config = BitQuantConfig(**GRANULARITIES[kind])
    return (
        Stack("gate_up_proj", EXPERTS, 2 * INNER, HIDDEN, config),
        # No multiple of four.
        Stack("down_proj", EXPERTS, HIDDEN - 1, INNER, config),
    )


def tensors_of(stack: Stack) -> dict[str, Tensor]:
    """What a checkpoint holds, by the ends of the names; a scale a tensor is stored a row."""
    rows = stack.rows
    each = [stored(rows, stack.columns, stack.config, seed) for seed in range(stack.experts)]
    if stack.config.granularity == "per_tensor":
        each = [{**one, "qweight_scale": one["qweight_scale"].expand(rows)} for one in each]
    return {leaf: torch.stack([one[leaf] for one in each]) for leaf in each[0]}


def arrived(kind: str, own: range, order: int = 1) -> list[ExpertsPart]:
    both = stacks(kind)
    arriving = ArrivingExperts("mlp.experts", both, own, CPU)
    named = [
        (f"{one.name}_{leaf}", tensor) for one in both for leaf, tensor in tensors_of(one).items()
    ][::order]
    assert list(arriving.load(named)) == [name for name, _ in named]
    return arriving.parts()


def one_by_one(kind: str, x: Tensor, index: Tensor) -> Tensor:
    """A row for each expert of each token, each expert a layer of its own."""
    rows = []
    for token, chosen in zip(x, index, strict=True):
        for expert in chosen.tolist():
            y = token[None]
            for one in stacks(kind):
                held = {leaf: tensor[expert] for leaf, tensor in tensors_of(one).items()}
                y = linear(y, held["qweight"], held["qweight_scale"], None, one.rows,
                           one.config.activation, held.get("qweight_multiplier"))  # fmt: skip
                if one.name == "gate_up_proj":
                    gate, up = y.chunk(2, -1)
                    y = F.silu(gate) * up
            rows.append(y[0])
    return torch.stack(rows)


@pytest.mark.parametrize("kind", GRANULARITIES)
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_what_all_processes_give_adds_up_to_every_expert_alone(kind: str, processes: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, HIDDEN)
    index = torch.stack([torch.randperm(EXPERTS)[:3] for _ in range(7)])
    total = torch.zeros(21, HIDDEN - 1)
    for rank in range(processes):
        own = own_experts(EXPERTS, rank, processes)
        first, second = arrived(kind, own, order=1 if rank else -1)
        assert first.qweight.shape[0] == len(own)
        local = (index - own.start).reshape(-1)
        gate, up = first(x, local).chunk(2, -1)
        total += second(F.silu(gate) * up, local)
    assert torch.equal(total, one_by_one(kind, x, index))


def test_every_expert_has_one_process() -> None:
    for processes in range(1, 9):
        parts = [own_experts(8, rank, processes) for rank in range(processes)]
        assert [expert for part in parts for expert in part] == list(range(8))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(ArgumentError, match="must be at most 2, the number of experts, got 3"):
        [own_experts(2, rank, 3) for rank in range(3)]


def test_a_process_keeps_its_experts_alone_and_apart_from_the_file() -> None:
    stack = stacks("groups")[0]
    given = tensors_of(stack)
    arriving = ArrivingExperts("mlp.experts", [stack], range(1, 3), CPU)
    list(arriving.load((f"gate_up_proj_{leaf}", tensor) for leaf, tensor in given.items()))
    (part,) = arriving.parts()
    expected = given["qweight"][1:3].clone()
    given["qweight"].fill_(0)
    assert torch.equal(part.qweight, expected)
    assert part.qweight.untyped_storage().nbytes() == expected.numel()


def test_experts_are_added_up_in_the_order_of_a_tokens_choice() -> None:
    torch.manual_seed(0)
    rows, weights = torch.randn(3 * 4, 5), torch.rand(3, 4)
    expected = torch.zeros(3, 5)
    for place in range(4):
        expected += rows.view(3, 4, 5)[:, place] * weights[:, place, None]
    torch.testing.assert_close(weighted_sum(rows, weights), expected)
    assert weighted_sum(rows.bfloat16(), weights).dtype == torch.bfloat16
    assert weighted_sum(rows[:0], weights[:0]).shape == (0, 5)


@pytest.mark.parametrize("leaf", ["qweight", "qweight_scale", "qweight_multiplier"])
def test_a_tensor_that_has_not_come_is_named(leaf: str) -> None:
    both = stacks("groups")
    arriving = ArrivingExperts("mlp.experts", both, range(EXPERTS), CPU)
    names = {f"{one.name}_{leaf}": t for one in both for leaf, t in tensors_of(one).items()}
    del names[f"down_proj_{leaf}"]
    list(arriving.load(names.items()))
    with pytest.raises(
        CheckpointError, match=f"mlp.experts.down_proj_{leaf} must be in the checkpoint, got none"
    ):
        arriving.parts()


@pytest.mark.parametrize("name", ["gate_up_proj_bias", "0.up_proj.qweight", "up_proj_qweight"])
def test_a_tensor_of_no_projection_is_refused(name: str) -> None:
    arriving = ArrivingExperts("mlp.experts", stacks("groups"), range(EXPERTS), CPU)
    with pytest.raises(CheckpointError, match=rf"mlp.experts.{name} must be of one of .*gate_up"):
        list(arriving.load([(name, torch.zeros(1))]))


@pytest.mark.parametrize(
    ("leaf", "how", "message"),
    [
        ("qweight", "cut", r"down_proj_qweight must be torch.uint8 \[5, 32, 64\], got .*\[4, 32"),
        ("qweight_scale", "cast", "down_proj_qweight_scale must be .* got torch.float16"),
        ("qweight", "three", "down_proj_qweight must hold the codes 0, 1 and 2, got 3"),
        ("qweight_scale", "nan", "down_proj_qweight_scale must be finite and positive"),
        ("qweight_multiplier", "large", "down_proj_qweight_multiplier must be from 0 to 127"),
    ],
)
def test_damage_is_named(leaf: str, how: str, message: str) -> None:
    stack = stacks("groups")[1]
    tensors: dict[str, Any] = tensors_of(stack)
    spoil(tensors, leaf, how)
    # Of another process's experts too.
    arriving = ArrivingExperts("mlp.experts", [stack], range(4, 5), CPU)
    with pytest.raises(CheckpointError, match=f"mlp.experts.{message}"):
        list(arriving.load((f"down_proj_{name}", one) for name, one in tensors.items()))
