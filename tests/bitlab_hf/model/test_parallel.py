"""transformers' plan becomes BitLab's, or is refused; no process needed."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from bitcore.errors import ArgumentError
from bitlab_hf import replace_linear
from bitlab_hf.model.parallel import plan_parallel
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
        ({"fsdp": 2, "dp_size": 2}, "dp_size must be 1 beside tp_size=2, got 2"),
        ({"ep_size": 2, "size": 1}, "ep_size must be 1 or tp_size, 1, got 2"),
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
