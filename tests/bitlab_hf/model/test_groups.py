"""Groups of inputs that a pretrained model gets where nobody has asked for others."""

from __future__ import annotations

import json
import logging
from pathlib import Path
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
    TrainingArguments,
)

from bitcore.errors import ArgumentError, ArgumentTypeError, ConfigError
from bitlab_hf import BitLabConfig, deploy, pretrained_config, replace_linear
from bitlab_hf.model.groups import (
    advise_groups,
    choose_groups,
    group_fields,
    scales_in_words,
)
from bitlab_hf.model.tree import quantized_layers
from bitlab_hf.train import BitLabTrainer, Recipe
from tests.bitlab_hf.models import make_float_model, training_data


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


def described(folder: Path, hidden: int, intermediate: int) -> Path:
    """A folder without weights."""
    llama(hidden, intermediate).config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("hidden", "intermediate", "size"), [(576, 1536, 64), (2560, 6912, 128), (100, 130, None)]
)
def test_pretrained(tmp_path: Path, hidden: int, intermediate: int, size: int | None) -> None:
    """The same of a model, of a folder and of its name; scales are learned."""
    config = pretrained_config(llama(hidden, intermediate))
    kind = "per_channel" if size is None else "per_group"
    assert (config.weight_granularity, config.group_size) == (kind, size)
    assert (config.weight_quantizer, config.overrides) == ("lsq", {})
    folder = described(tmp_path, hidden, intermediate)
    for source in (folder, str(folder)):
        assert pretrained_config(source).to_dict() == config.to_dict()


def test_what_is_given_to_pretrained_wins(tmp_path: Path) -> None:
    folder = described(tmp_path, 128, 100)
    rest = [f"model.layers.{at}.mlp.down_proj" for at in range(2)]
    rows = {"weight_granularity": "per_channel", "group_size": None}
    config = pretrained_config(folder, head="int8", weight_quantizer="twn", latent_dtype="keep")
    assert (config.head, config.weight_quantizer, config.latent_dtype) == ("int8", "twn", "keep")
    assert (config.group_size, config.overrides) == (128, dict.fromkeys(rest, rows))
    assert pretrained_config(folder, group_size=64).group_size == 64
    skipped = pretrained_config(folder, modules_to_not_convert=["down_proj"])
    assert (skipped.group_size, skipped.overrides) == (128, {})
    # Overrides come after those that are picked, and on top of them.
    asked = {"*": {"weight_quantizer": "twn"}, rest[1]: {"activation_dtype": "float32"}}
    merged = pretrained_config(folder, overrides=asked).overrides
    assert list(merged.items()) == [
        (rest[0], rows), ("*", asked["*"]), (rest[1], {**rows, **asked[rest[1]]}),
    ]  # fmt: skip
    for kind in ("per_tensor", "per_channel"):
        plain = pretrained_config(folder, weight_granularity=kind)
        assert plain.to_dict() == BitLabConfig(weight_granularity=kind).to_dict()
    with pytest.raises(ConfigError, match="fields must be among .*, got 'groups'"):
        pretrained_config(folder, groups=64)


def test_pretrained_of_what_is_quantized(tmp_path: Path) -> None:
    message = "model must be a float one, got one that is quantized already\n.*load it without"
    folder = described(tmp_path, 128, 128)
    model: Any = replace_linear(LlamaForCausalLM(llama(128, 128).config))
    given: tuple[dict[str, Any], ...] = ({}, {"weight_granularity": "per_tensor"})
    for fields in given:
        with pytest.raises(ArgumentError, match=message):
            pretrained_config(model, **fields)
    file = folder / "config.json"
    held = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": held}))
    with pytest.raises(ArgumentError, match=message):
        pretrained_config(folder)
    with pytest.raises(ArgumentTypeError, match="folder or a hub name, got Linear"):
        pretrained_config(nn.Linear(128, 128))  # type: ignore[arg-type]


PRETRAINED = "a pretrained model loses far less with one for each 64 inputs\nLoad the float model "


@pytest.mark.parametrize(
    ("fields", "sizes", "recipe", "said"),
    [
        ({}, {}, {"calibration_samples": 4}, "scales are per tensor; " + PRETRAINED),
        ({"weight_granularity": "per_channel"}, {}, {"calibration_samples": 4},
         "scales are per channel; " + PRETRAINED),
        ({}, {}, {}, None),
        ({"weight_granularity": "per_group", "group_size": 64}, {}, {"calibration_samples": 4},
         None),
        ({}, {"hidden_size": 48, "intermediate_size": 96, "head_dim": 12},
         {"calibration_samples": 4}, None),
    ],
)  # fmt: skip
def test_a_calibrated_start_advises_groups(
    fields: dict[str, Any],
    sizes: dict[str, Any],
    recipe: dict[str, Any],
    said: str | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Once, of a model that has none though they would divide its layers."""
    path = make_float_model("llama", tmp_path, **sizes)
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=BitLabConfig(**fields))
    args = TrainingArguments(
        str(tmp_path / "run"), max_steps=1, use_cpu=True, report_to="none", save_steps=1
    )
    trainer = BitLabTrainer(
        model=model, args=args, train_dataset=training_data(), recipe=Recipe(**recipe)
    )
    with caplog.at_level(logging.WARNING, "bitlab"):
        trainer.train()
    told = [text for text in caplog.messages if "pretrained_config" in text]
    assert len(told) == (said is not None)
    assert said is None or said in told[0]
    trainer.train(resume_from_checkpoint=True)
    assert [text for text in caplog.messages if "pretrained_config" in text] == told


def test_no_advice_where_nothing_learns(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = replace_linear(LlamaForCausalLM(llama(128, 128).config))
    with caplog.at_level(logging.WARNING, "bitlab"):
        for layer in quantized_layers(model):
            layer.module.requires_grad_(False)
        advise_groups(model)
        advise_groups(deploy(model))
        assert not caplog.messages
