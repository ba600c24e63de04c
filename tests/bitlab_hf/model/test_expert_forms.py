"""Experts of classes without transformers' decorator: each against its own float class."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.dbrx.modeling_dbrx import DbrxExperts
from transformers.models.inkling.modeling_inkling import InklingSharedExperts
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts

from bitcore.errors import ArgumentError, NonFiniteError
from bitlab_hf import BitLabConfig, deploy
from bitlab_hf.model.expert_forms import FORMS, give_back
from bitlab_hf.model.experts import expert_modules, find_experts, swap_experts
from bitlayers.experts import BitExperts

EXPERTS, HIDDEN, INNER, TOKENS = 5, 24, 20, 11
_SIZES = {"hidden_size": HIDDEN, "hidden_act": "silu", "intermediate_size": INNER}
FLOATS: dict[str, Callable[[], nn.Module]] = {
    "dbrx": lambda: DbrxExperts(
        SimpleNamespace(
            **_SIZES, ffn_hidden_size=INNER, moe_num_experts=EXPERTS, ffn_act_fn={"name": "silu"}
        )
    ),
    "inkling": lambda: InklingSharedExperts(
        SimpleNamespace(**_SIZES, n_shared_experts=EXPERTS, moe_intermediate_size=INNER)
    ),
    "jetmoe": lambda: JetMoeParallelExperts(EXPERTS, HIDDEN, INNER),
    "llama4": lambda: Llama4TextExperts(SimpleNamespace(**_SIZES, num_local_experts=EXPERTS)),
    "longcat_flash": lambda: LongcatFlashExperts(
        SimpleNamespace(
            **_SIZES, expert_ffn_hidden_size=INNER, n_routed_experts=EXPERTS, zero_expert_num=3
        )
    ),
}
SCHEMES: dict[str, dict[str, Any]] = {
    "tensor": {},
    "channel": {"weight_granularity": "per_channel"},
}


def make(name: str) -> nn.Module:
    """Returns a module that holds float experts."""
    torch.manual_seed(2)
    module = FLOATS[name]()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return nn.ModuleDict({"experts": module})


def ternary(holder: nn.Module, **fields: Any) -> tuple[nn.Module, BitExperts]:
    """Makes the experts ternary; returns what the model calls, and the experts."""
    found = find_experts(holder, [])
    assert len(found) == 1
    swap_experts(holder, found, BitLabConfig(**fields))
    return holder.get_submodule("experts"), expert_modules(holder)[0].module


def inputs(name: str) -> list[Any]:
    """Returns what the model calls the experts with; the last expert gets no token, except where
    all get every one.
    """
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    index = torch.stack([torch.randperm(EXPERTS - 1, generator=generator)[:2] for _ in x])
    weights = torch.rand(TOKENS, 2, generator=generator)
    if name == "inkling":
        return [x.view(1, TOKENS, HIDDEN), torch.rand(TOKENS, EXPERTS, generator=generator)]
    if name == "jetmoe":
        return [x, [4, 0, 5, 2, 0]]
    if name == "llama4":
        score = torch.zeros(TOKENS, EXPERTS).scatter(1, index, weights)
        return [x.repeat(EXPERTS, 1) * score.T.reshape(-1, 1)]
    if name == "longcat_flash":
        # Two tokens with an expert that computes nothing, one with no other.
        index[3, 0], index[7] = EXPERTS, torch.tensor([EXPERTS + 2, EXPERTS + 1])
    return [x, index, weights]


def run(module: Any, given: list[Any]) -> Tensor:
    with torch.no_grad():
        return module(*given)  # type: ignore[no-any-return]


def with_gradients(module: nn.Module, given: list[Any]) -> tuple[Tensor, list[Tensor]]:
    """Returns the output, and the gradients of what can have one among the inputs."""
    given = [
        one.clone().requires_grad_() if isinstance(one, Tensor) and one.is_floating_point() else one
        for one in given
    ]
    output: Tensor = module(*given)
    output.square().sum().backward()
    return output.detach(), [one.grad for one in given if getattr(one, "grad", None) is not None]


def test_there_is_a_case_for_each_form() -> None:
    held = {type(m).__name__ for name in FLOATS for m in FLOATS[name]().modules()}
    assert held >= FORMS.keys()
    assert len(FLOATS) == len(FORMS)


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_does_what_the_float_class_does_with_ternary_weights(scheme: str, name: str) -> None:
    holder = make(name)
    caller, module = ternary(holder, **SCHEMES[scheme], activation_dtype="float32")
    exact = make(name)
    floats = find_experts(exact, [])[0].module
    with torch.no_grad():
        for leaf in module.stacks:
            floats._parameters[leaf].copy_(module.dequantized(leaf))  # type: ignore[union-attr]
    given = inputs(name)
    want, wanted = with_gradients(exact.get_submodule("experts"), given)
    got, gradients = with_gradients(caller.train(), given)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert len(gradients) == len(wanted) > 0
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    for leaf in module.stacks:
        # Straight through the rounding, the weights' are those of the ternary ones.
        gradient, other = module._parameters[leaf].grad, floats._parameters[leaf].grad  # type: ignore[union-attr]
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-3)
        unreached = module.stacks[leaf].apart(gradient)[-1]  # type: ignore[arg-type]
        assert name == "inkling" or not unreached.any()


@pytest.mark.parametrize("name", FLOATS)
def test_train_eval_and_deployed_compute_the_same(name: str) -> None:
    holder, given = make(name), inputs(name)
    keys = list(holder.state_dict())
    caller, module = ternary(holder)
    assert list(holder.state_dict()) == keys
    trained, evaluated = (run(caller.train(mode), given) for mode in (True, False))
    assert torch.equal(trained, evaluated)
    module.deploy()
    for again in (holder, copy.deepcopy(holder), pickle.loads(pickle.dumps(holder))):
        assert torch.equal(run(again.get_submodule("experts"), given), trained)
        assert expert_modules(again)[0].module.is_deployed


@pytest.mark.parametrize("name", FLOATS)
def test_back_to_float(name: str) -> None:
    holder, given = make(name), inputs(name)
    shapes = {key: tensor.shape for key, tensor in holder.state_dict().items()}
    caller, module = ternary(holder, activation_dtype="float32")
    before = run(caller.eval(), given)
    give_back(holder, module.deploy().to_float())
    assert not expert_modules(holder)
    assert {key: tensor.shape for key, tensor in holder.state_dict().items()} == shapes
    assert type(caller) is type(FLOATS[name]())
    assert "forward" not in vars(caller)
    torch.testing.assert_close(run(caller, given), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FLOATS)
def test_no_token_at_all(name: str) -> None:
    caller, _ = ternary(make(name))
    given = inputs(name)
    none = {"inkling": [given[0][:, :0], given[-1][:0]], "jetmoe": [given[0][:0], [0] * EXPERTS]}
    empty = none.get(name, [one[:0] for one in given])
    output = run(caller.eval(), empty)
    assert output.numel() == 0
    assert output.shape[-1] == (INNER if name == "jetmoe" else HIDDEN)


class Block(nn.Module):
    """Two projections in a row, as both of JetMoe's blocks hold them."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.input_linear = JetMoeParallelExperts(EXPERTS, HIDDEN, rows)
        self.output_linear = JetMoeParallelExperts(EXPERTS, INNER, HIDDEN)
        for parameter in self.parameters():
            nn.init.normal_(parameter)


@pytest.mark.parametrize(("rows", "parts"), [(2 * INNER, [2, 1]), (INNER, [1, 1])])
def test_gate_and_up_of_jetmoe_are_apart_where_its_block_parts_them(
    rows: int, parts: list[int]
) -> None:
    holder = nn.ModuleDict({"block": Block(rows)})
    swap_experts(holder, find_experts(holder, []), BitLabConfig())
    stacks = [one.module.stacks["weight"] for one in expert_modules(holder)]
    assert [stack.parts for stack in stacks] == parts


def test_matrices_that_nobody_multiplies_with_are_not_looked_at() -> None:
    holder = make("longcat_flash")
    _, module = ternary(holder)
    weight = module._parameters["gate_up_proj"]
    assert weight is not None
    assert len(weight) == EXPERTS + 3
    with torch.no_grad():
        weight[EXPERTS:] = float("nan")
    deploy(holder)
    assert len(module.packed_stack("gate_up_proj")["qweight"]) == EXPERTS
    zeros = module.dequantized("gate_up_proj")[EXPERTS:]
    assert zeros.shape == (3, 2 * INNER, HIDDEN)
    assert not zeros.any()


@pytest.mark.parametrize("name", FLOATS)
def test_an_expert_that_is_not_finite_is_named(name: str) -> None:
    holder = make(name)
    _, module = ternary(holder)
    leaf = list(module.stacks)[-1]
    with torch.no_grad():
        module.stacks[leaf].apart(module._parameters[leaf])[3, 1, 1] = float("inf")  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError, match=rf"{leaf} must be finite, got .* in expert 3"):
        deploy(holder)
    assert not module.is_deployed


@pytest.mark.parametrize("name", FLOATS)
def test_tensors_of_other_sizes_are_left_alone(name: str) -> None:
    holder = make(name)
    module = find_experts(holder, [])[0].module
    leaf = next(reversed(module._parameters))
    module._parameters[leaf] = nn.Parameter(torch.randn(3, 4, 5, 6))
    assert not find_experts(holder, [])


def test_experts_that_share_their_weights_are_packed_once() -> None:
    def two() -> tuple[nn.ModuleDict, list[BitExperts]]:
        one, other = make("llama4").get_submodule("experts"), FLOATS["llama4"]()
        other._parameters.update(one._parameters)
        holder = nn.ModuleDict({"one": one, "other": other})
        swap_experts(holder, find_experts(holder, []), BitLabConfig())
        return holder, [found.module for found in expert_modules(holder)]

    holder, (one, other) = two()
    before = run(other.eval(), inputs("llama4"))
    deploy(holder)
    assert one._parameters["down_proj_qweight"] is other._parameters["down_proj_qweight"]
    assert sum(p.numel() for p in holder.parameters()) == sum(p.numel() for p in one.parameters())
    assert torch.equal(run(other, inputs("llama4")), before)

    holder, (one, other) = two()
    other.stacks["down_proj"] = replace(other.stacks["down_proj"], parts=2)
    with pytest.raises(ArgumentError, match="one and other share their weights"):
        deploy(holder)
    assert not one.is_deployed
