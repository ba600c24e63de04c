"""transformers' plan becomes BitLab's, or is refused; no process needed."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from bitcore.errors import ArgumentError
from bitlab_hf import replace_linear
from bitlab_hf.model.parallel import plan_experts, plan_parallel
from bitlab_hf.model.parts import Part, cut_experts, part_of, set_part
from tests.bitlab_hf.experts import MOE
from tests.bitlab_hf.models import CONFIGS


def skeleton(name: str = "llama", size: int = 2, **distributed: Any) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]))
    replace_linear(model)
    model.config.distributed_config = SimpleNamespace(tp_size=size, **distributed)
    return model


def test_layers_get_our_styles_and_float_modules_keep_theirs() -> None:
    for packs, name in ((False, "bitlab_"), (True, "bitlab_packed_")):
        model = skeleton()
        plan = dict(model.tp_plan)
        plan_parallel(model, plan, packs, set())
        assert plan["model.layers.*.self_attn.o_proj"] == f"{name}rowwise"
        assert plan["model.layers.*.mlp.up_proj"] == f"{name}colwise"
        assert plan["lm_head"] == "colwise_gather_output"
        assert plan["model.embed_tokens"] == "embedding_rowwise"


def test_what_will_be_int8_stays_whole() -> None:
    model = skeleton()
    plan = dict(model.tp_plan)
    plan_parallel(model, plan, True, {"lm_head"})
    assert "lm_head" not in plan


def test_int8_layers_are_refused_by_name() -> None:
    model = skeleton()
    plan = dict(model.tp_plan)
    names = ["model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"]
    said = "int8_layers must be empty in tensor parallel, got model.layers.1.mlp.down_proj and 1 m"
    with pytest.raises(ArgumentError, match=f"{said}ore\n.*device_map"):
        plan_parallel(model, plan, True, set(), names)
    assert plan == model.tp_plan
    model.config.distributed_config.tp_size = 1
    plan_parallel(model, plan, True, set(), names)
    assert plan == {}


def test_one_process_has_no_plan() -> None:
    model = skeleton(size=1)
    plan = dict(model.tp_plan)
    plan_parallel(model, plan, True, set())
    assert plan == {}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"size": 3}, "tp_size must divide num_attention_heads, got 3 for 4"),
        ({"size": 4}, "tp_size must divide num_key_value_heads, got 4 for 2"),
        ({"fsdp_size": 2}, "fsdp_size must be 1 beside tp_size=2 to run a model, got 2"),
        (
            {"size": 1, "ep_size": 2, "dp_replicate_size": 2},
            "dp_replicate_size must be 1 beside ep_size=2 to run a model, got 2",
        ),
        ({"pp_size": 2}, "pp_size must be 1 beside tp_size=2 to run a model, got 2"),
        ({"size": 1, "ep_size": 2, "ep_plan": {}}, "ep_plan must be the model's own, got {}"),
        ({"tp_plan": {"lm_head": "colwise"}}, "tp_plan must be the model's own, got {'lm_head'"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    model = skeleton(**changes)
    with pytest.raises(ArgumentError) as raised:
        plan_parallel(model, dict(model.tp_plan), True, set())
    assert said in str(raised.value)
    assert str(raised.value).count("\n") == 1


def test_another_style_is_refused() -> None:
    model = skeleton()
    plan = {"model.layers.*.mlp.up_proj": "packed_colwise"}
    with pytest.raises(ArgumentError, match="style of model.layers.0.mlp.up_proj must be one of"):
        plan_parallel(model, plan, True, set())


def mixture(name: str = "gpt_oss", ep_size: int = 2) -> PreTrainedModel:
    """A latent mixture whose experts are to be spread over processes."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(MOE[name]))
    replace_linear(model)
    model.config.distributed_config = SimpleNamespace(tp_size=2, ep_size=ep_size)
    return model


def test_experts_get_our_styles_with_their_biases() -> None:
    for packs, style in ((False, "bitlab_experts"), (True, "bitlab_packed_experts")):
        model, name = mixture(), "model.layers.*.mlp.experts"
        plan = dict(reversed(model.ep_plan.items()))
        plan_experts(model, plan, packs)
        assert plan.pop(name) == "ep_dispatch_experts"
        leaves = {f"{part}_proj{end}" for part in ("gate_up", "down") for end in ("", "_bias")}
        assert plan == {f"{name}.{leaf}": style for leaf in leaves}


def test_float_experts_keep_their_styles() -> None:
    model = AutoModelForCausalLM.from_config(copy.deepcopy(MOE["mixtral"]))
    model.config.distributed_config = SimpleNamespace(tp_size=2, ep_size=2)
    plan = dict(model.ep_plan)
    plan_experts(model, plan, False)
    assert plan == model.ep_plan


def test_without_expert_parallel_there_is_no_plan_for_experts() -> None:
    model = mixture(ep_size=1)
    plan = dict(model.ep_plan)
    plan_experts(model, plan, False)
    assert plan == {}


def test_a_plan_of_experts_alone_does_not_come_out_empty() -> None:
    """transformers would say that the model has none."""
    model = mixture("granitemoe")
    plan = dict(model.tp_plan)
    plan_parallel(model, plan, True, {"lm_head", "model.embed_tokens"})
    assert set(plan.values()) == {"replicate"}


@pytest.mark.parametrize(
    ("experts", "change", "said"),
    [
        (
            "qwen3_moe",
            {},
            "ep_size must divide the number of experts of model.layers.0.mlp.experts",
        ),
        (
            "gpt_oss",
            {"model.layers.*.mlp.experts": "rowwise"},
            "style of model.layers.*.mlp.experts must be 'ep_dispatch_experts' for ternary experts",
        ),
        (
            "gpt_oss",
            {"model.layers.*.mlp.experts.down_proj": "rowwise"},
            "style of model.layers.*.mlp.experts.down_proj must be 'grouped_gemm' for ternary",
        ),
    ],
)
def test_experts_that_cannot_be_spread_are_refused(
    experts: str, change: dict[str, str], said: str
) -> None:
    model = mixture(experts)
    with pytest.raises(ArgumentError) as raised:
        plan_experts(model, {**model.ep_plan, **change}, False)
    assert said in str(raised.value)
    assert str(raised.value).count("\n") == 1


def test_weights_beside_the_experts_are_not_trained_in_parts() -> None:
    model = mixture()
    experts: Any = model.get_submodule("model.layers.0.mlp.experts")
    experts.norm = nn.LayerNorm(4)
    plan_experts(model, dict(model.ep_plan), True)
    with pytest.raises(ArgumentError, match="must have no weights beside its experts' to train"):
        plan_experts(model, dict(model.ep_plan), False)


@pytest.mark.parametrize("rank", [0, 1])
def test_deployed_experts_are_cut_with_their_biases(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Part, "rank", rank)
    monkeypatch.setattr(Part, "count", 2)
    model = mixture()
    experts: Any = model.get_submodule("model.layers.0.mlp.experts")
    with torch.no_grad():
        experts.down_proj_bias.normal_(generator=torch.Generator().manual_seed(0))
    experts.deploy()
    whole = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    chosen, weights = torch.tensor([[2 * rank], [2 * rank + 1], [2 * rank]]), torch.ones(3, 1)
    expected = experts(x, chosen, weights)
    set_part(experts, Part(0, None))
    experts.num_experts = 2
    cut_experts(experts)
    own = slice(2 * rank, 2 * rank + 2)
    state = experts.state_dict()
    assert state.keys() == whole.keys()
    assert all(torch.equal(state[name], tensor[own]) for name, tensor in whole.items())
    assert part_of(experts).whole == {name: tuple(one.shape) for name, one in whole.items()}
    assert torch.equal(experts(x, chosen - 2 * rank, weights), expected)
    assert experts.packed_tensors()["down_proj_qweight"][1][0] == 2
