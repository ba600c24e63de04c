"""Groups of inputs that a pretrained model gets where nobody has asked for others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from bitlab_hf import BitLabConfig, deploy, replace_linear
from bitlab_hf.model.groups import choose_groups, group_fields, scales_in_words
from bitlab_hf.model.tree import quantized_layers


@pytest.mark.parametrize(
    ("inputs", "size", "rest"),
    [
        ([576, 1536], 64, []),
        ([640, 2048], 128, []),
        ([2560, 6912], 128, []),
        ([4096, 11008], 128, []),
        ([4096, 14336], 128, []),
        ([64], 64, []),
        ([128], 128, []),
        ([100], None, ["0"]),
        ([100, 130], None, ["0", "1"]),
        ([2560, 100, 6912], 128, ["1"]),
        ([100, 576, 1000, 2560], 64, ["0", "2"]),
        ([131008, 131072, 131071], 64, ["2"]),
        ([], None, []),
    ],
)
def test_choice(inputs: list[int], size: int | None, rest: list[str]) -> None:
    assert choose_groups({str(at): count for at, count in enumerate(inputs)}) == (size, rest)


def llama(hidden: int, intermediate: int) -> Any:
    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, vocab_size=97,
            )
        )  # fmt: skip


@pytest.mark.parametrize(
    ("hidden", "intermediate", "size"), [(576, 1536, 64), (2560, 6912, 128), (4096, 11008, 128)]
)
def test_of_a_model(hidden: int, intermediate: int, size: int) -> None:
    fields = group_fields(llama(hidden, intermediate), BitLabConfig())
    assert fields == {"weight_granularity": "per_group", "group_size": size, "overrides": {}}
    said = scales_in_words(BitLabConfig(**fields))
    assert said == f"per group of {size} (7-bit multipliers of a row's)"


def test_layers_that_no_group_divides() -> None:
    """They get one scale a row; the model converts, deploys and says which they are."""
    fields = group_fields(llama(128, 100), BitLabConfig())
    names = [f"model.layers.{at}.mlp.down_proj" for at in range(2)]
    rows = {"weight_granularity": "per_channel", "group_size": None}
    assert fields["group_size"] == 128
    assert fields["overrides"] == dict.fromkeys(names, rows)
    config = BitLabConfig(**fields)
    assert f"per channel, since no group divides their inputs: {', '.join(names)}" in (
        scales_in_words(config)
    )
    model = LlamaForCausalLM(llama(128, 100).config)
    deploy(replace_linear(model, config))
    for found in quantized_layers(model):
        expected = None if found.names[0] in names else 128
        assert found.module.quant_config.group_size == expected
    assert model(input_ids=torch.arange(8)[None]).logits.isfinite().all()


def test_a_model_without_a_fitting_layer() -> None:
    fields = group_fields(llama(100, 130), BitLabConfig())
    assert fields == {"weight_granularity": "per_channel", "group_size": None}
    assert scales_in_words(BitLabConfig(**fields)) == "per channel"


def test_only_what_is_converted_counts() -> None:
    """Neither the head, nor what is named, nor routers."""
    model = llama(128, 96)
    skipped = BitLabConfig(modules_to_not_convert=["down_proj"])
    assert group_fields(model, skipped)["overrides"] == {}
    ternary = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "hidden_size": 192}))
    ternary.lm_head = nn.Linear(100, 97, bias=False)
    assert group_fields(ternary, BitLabConfig())["group_size"] == 64
    with torch.device("meta"):
        sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1,
                 "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 97,
                 "num_local_experts": 4}  # fmt: skip
        mixture = AutoModelForCausalLM.from_config(MixtralConfig(**sizes))
    assert isinstance(mixture, MixtralForCausalLM)
    assert group_fields(mixture, BitLabConfig())["overrides"] == {}
