"""int8_layers: linear layers in int8 beside ternary ones, from the latent model to the file."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
)

from bitcore.errors import ConfigError, LifecycleError
from bitcore.quantize import quantize_rows_int8
from bitlab_hf import BitLabConfig, deploy, replace_linear, save
from bitlab_hf.checkpoint.card import model_card
from bitlab_hf.model.count import bits_per_weight
from bitlab_hf.model.groups import group_fields
from bitlab_hf.model.tree import quantized_layers
from bitlab_hf.train import calibrate
from bitlayers import Int8Linear
from tests.bitlab_hf.fresh import fresh_outputs, outputs_of
from tests.bitlab_hf.int8 import assert_int8, load
from tests.bitlab_hf.models import auto_class, logits_of, make_float_model, token_ids

# A pattern, and what it matches, by architecture: without and with biases.
MLP = [f"model.layers.1.mlp.{leaf}_proj" for leaf in ("down", "gate", "up")]
NAMED: dict[str, tuple[str, list[str]]] = {
    "llama": ("model.layers.1.mlp", MLP),
    "qwen2": (r".*\.1\.self_attn\.[qk]_proj", [f"model.layers.1.self_attn.{x}_proj" for x in "kq"]),
    "bert": ("layer.1.output.dense", ["bert.encoder.layer.1.output.dense"]),
}
GROUPS = {"weight_granularity": "per_group", "group_size": 64}


def config(name: str = "llama", **fields: Any) -> BitLabConfig:
    return BitLabConfig(int8_layers=[NAMED[name][0]], **fields)


def loaded(path: Path, name: str = "llama", asked: Any = None, **options: Any) -> Any:
    return load(path, asked, auto=auto_class(name), **options)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_float_model("llama", tmp_path)


@pytest.mark.parametrize("name", sorted(NAMED))
def test_whole_path(name: str, tmp_path: Path) -> None:
    """Latent and trained, deployed, saved, a fresh process: native and reference."""
    source = make_float_model(name, tmp_path)
    model = loaded(source, name, config(name))
    names = NAMED[name][1]
    assert model.config.quantization_config.int8_layers == names
    layers = {one: model.get_submodule(one) for one in names}
    assert {type(layer) for layer in layers.values()} == {nn.Linear}
    ternary = quantized_layers(model)
    assert len(ternary) + len(names) == len(quantized_layers(loaded(source, name, BitLabConfig())))
    before = layers[names[0]].weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(input_ids=token_ids(), labels=token_ids()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    weights = {one: layer.weight.clone() for one, layer in layers.items()}
    assert not torch.equal(weights[names[0]], before)
    latent = logits_of(model.eval())
    deploy(model)
    outputs = outputs_of(model)
    first = outputs["logits 1 cpu"]
    torch.testing.assert_close(first, latent, rtol=0, atol=0.02)
    for key, value in outputs.items():
        assert torch.equal(value, outputs[f"{key.split()[0]} 1 cpu"]), key
    for one, weight in weights.items():
        layer = model.get_submodule(one)
        assert type(layer) is Int8Linear
        assert (layer.bias is None) == (layers[one].bias is None)
        assert not any(parameter.requires_grad for parameter in layer.parameters())
        codes, scale = quantize_rows_int8(weight)
        assert torch.equal(layer.qweight, codes)
        assert torch.equal(layer.qweight_scale, scale)

    save(model, tmp_path / "deployed")
    written = json.loads((tmp_path / "deployed" / "config.json").read_text())
    assert written["quantization_config"]["int8_layers"] == names
    assert written["quantization_config"]["format_version"] == 4
    stored = load_file(tmp_path / "deployed" / "model.safetensors")
    assert {key for key, value in stored.items() if value.dtype == torch.int8} == {
        f"{one}.qweight" for one in names
    }
    for key, value in fresh_outputs(tmp_path / "deployed", name).items():
        assert torch.equal(value, outputs[key]), key
    # And saved again, the same file.
    again, info = loaded(tmp_path / "deployed", name, output_loading_info=True)
    assert not any(info.values())
    save(again, tmp_path / "again")
    twice = load_file(tmp_path / "again" / "model.safetensors")
    assert twice.keys() == stored.keys()
    assert all(torch.equal(twice[key], stored[key]) for key in stored)


@pytest.mark.parametrize("name", sorted(NAMED))
def test_packing_at_load_equals_deploy(name: str, tmp_path: Path) -> None:
    source = make_float_model(name, tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        packed = loaded(source, name, config(name, mode="infer"), dtype=dtype)
        latent = deploy(loaded(source, name, config(name), dtype=dtype))
        assert torch.equal(logits_of(packed), logits_of(latent))
        states = [model.state_dict() for model in (packed, latent)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        for model in (packed, latent):
            assert model.config.quantization_config.int8_layers == NAMED[name][1]
            layer = model.get_submodule(NAMED[name][1][0])
            assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_a_latent_file_has_the_float_keys(source: Path, tmp_path: Path) -> None:
    model = loaded(source, asked=config())
    expected = logits_of(model)
    save(model, tmp_path / "latent")
    tensors = load_file(tmp_path / "latent" / "model.safetensors")
    assert tensors.keys() == load_file(source / "model.safetensors").keys()
    again = loaded(tmp_path / "latent")
    assert torch.equal(logits_of(again), expected)
    assert again.config.quantization_config.int8_layers == MLP
    packed = loaded(tmp_path / "latent", asked=BitLabConfig(mode="infer"))
    assert torch.equal(logits_of(packed), logits_of(deploy(again)))
    assert type(packed.get_submodule(MLP[0])) is Int8Linear


@pytest.mark.parametrize(
    "fields",
    [
        {"head": "int8"},
        {"head": "ternary", **GROUPS},
        {**GROUPS, "weight_quantizer": "lsq", "sub_norm": ["o_proj", "down_proj"]},
        {"overrides": {"*.down_proj": {"weight_granularity": "per_channel"}}},
        {"modules_to_not_convert": ["v_proj"], "activation_dtype": "float32"},
    ],
    ids=["int8 head", "ternary head", "norms", "overrides", "left"],
)
def test_beside_other_fields(source: Path, fields: dict[str, Any], tmp_path: Path) -> None:
    latent = loaded(source, asked=config(**fields))
    trained = logits_of(latent)
    deploy(latent)
    expected = logits_of(latent)
    torch.testing.assert_close(expected, trained, rtol=0, atol=0.02)
    assert {type(latent.get_submodule(name)) for name in MLP} == {Int8Linear}
    if fields.get("head") == "int8":
        assert_int8(latent, is_tied=False)
    save(latent, tmp_path / "deployed")
    again = loaded(tmp_path / "deployed")
    assert torch.equal(logits_of(again), expected)
    held = again.config.quantization_config
    assert held.int8_layers == MLP
    assert held.head == fields.get("head", "keep")
    assert not set(MLP) & set(held.modules_to_not_convert)


def test_beside_a_tied_int8_head(tmp_path: Path) -> None:
    source = make_float_model("qwen2", tmp_path)
    model = deploy(loaded(source, asked=config("qwen2", head="int8")))
    assert_int8(model, is_tied=True)
    expected = logits_of(model)
    save(model, tmp_path / "deployed")
    again = loaded(tmp_path / "deployed")
    assert_int8(again, is_tied=True)
    assert torch.equal(logits_of(again), expected)
    assert f"| output head, int8 | {97 * 64:,} |" in model_card(again, "x")
    assert f"| 2 linear layers, int8 | {64 * 64 + 32 * 64:,} |" in model_card(again, "x")


def test_calibration_leaves_them_alone(source: Path) -> None:
    model = loaded(source, asked=config(**GROUPS))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    samples = torch.randint(0, 97, (8, 32), generator=torch.Generator().manual_seed(5))
    report = calibrate(model, samples, rounds=1)
    fitted = {layer.name for layer in report.layers}
    assert fitted == {found.names[0] for found in quantized_layers(model)}
    assert not fitted.intersection(MLP)
    for name, tensor in model.state_dict().items():
        changes = name.removesuffix(".weight") in fitted or name == "model.norm.weight"
        assert torch.equal(tensor, before[name]) is not changes, name


def test_float_again(source: Path, tmp_path: Path) -> None:
    model = loaded(source, asked=config(mode="infer"))
    weights = {name: model.get_submodule(name).dequantized_weight() for name in MLP}
    model = model.dequantize()
    for name, weight in weights.items():
        assert type(model.get_submodule(name)) is nn.Linear
        assert torch.equal(model.get_submodule(name).weight, weight)
    model.save_pretrained(tmp_path / "float")
    assert torch.equal(logits_of(loaded(tmp_path / "float")), logits_of(model))


def test_the_base_model_and_other_heads(source: Path, tmp_path: Path) -> None:
    full = deploy(loaded(source, asked=config()))
    save(full, tmp_path / "deployed")
    expected = full.model(input_ids=token_ids()).last_hidden_state
    base = load(tmp_path / "deployed", auto=AutoModel)
    labels = load(tmp_path / "deployed", auto=AutoModelForSequenceClassification, num_labels=3)
    for model in (base, labels.model):
        assert torch.equal(model(input_ids=token_ids()).last_hidden_state, expected)
    assert type(labels.score) is nn.Linear
    save(base, tmp_path / "base")
    again, info = loaded(tmp_path / "base", output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"}
    assert again.config.quantization_config.int8_layers == MLP
    assert torch.equal(again.model(input_ids=token_ids()).last_hidden_state, expected)


def test_copies_casts_and_device_maps(source: Path, tmp_path: Path) -> None:
    model = deploy(loaded(source, asked=config()))
    expected = logits_of(model)
    save(model, tmp_path / "deployed")
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half.get_submodule(MLP[0]).qweight_scale.dtype == torch.float32
    assert logits_of(half).dtype == torch.bfloat16
    assert torch.equal(logits_of(loaded(tmp_path / "deployed", device_map="auto")), expected)


def test_replace_linear_and_deploy(source: Path, tmp_path: Path) -> None:
    model = replace_linear(loaded(source), config())
    assert type(model.get_submodule(MLP[0])) is nn.Linear
    deploy(model)
    held = model.config.quantization_config
    assert (held.int8_layers, held.head) == (MLP, "keep")
    assert not set(MLP) & set(held.modules_to_not_convert)
    save(model, tmp_path / "replaced")
    assert torch.equal(logits_of(loaded(tmp_path / "replaced")), logits_of(model))
    assert torch.equal(logits_of(model), logits_of(deploy(loaded(source, asked=config()))))
    with pytest.raises(ConfigError, match="int8_layers must be asked of a transformers model"):
        replace_linear(nn.Sequential(nn.Linear(64, 64)), BitLabConfig(int8_layers=["0"]))


def test_they_do_not_decide_the_size_of_groups(tmp_path: Path) -> None:
    source = make_float_model("llama", tmp_path, intermediate_size=160)
    model = loaded(source)
    assert group_fields(model, BitLabConfig())["overrides"]
    asked = BitLabConfig(int8_layers=["down_proj"])
    assert group_fields(model, asked) == {**GROUPS, "overrides": {}}


def test_counts(source: Path) -> None:
    model = loaded(source, asked=config(mode="infer"))
    plain = loaded(source)
    assert model.num_parameters() == plain.num_parameters()
    assert bits_per_weight(model) == pytest.approx(2, abs=0.05)
    card = model_card(model, "x")
    assert f"| 3 linear layers, int8 | {3 * 64 * 192:,} |" in card
    assert "output head, int8" not in card
    assert f"| ternary weights | {2 * 12288 + 3 * 64 * 192:,} in 11 matrices |" in card


def test_adapters_around_them_train(source: Path) -> None:
    model = loaded(source, asked=config(mode="infer"))
    adapted = get_peft_model(model, LoraConfig(target_modules=["down_proj"], r=4))
    assert isinstance(model.model.layers[1].mlp.down_proj.base_layer, Int8Linear)
    adapted(input_ids=token_ids(), labels=token_ids()).loss.backward()
    gradients = [p.grad for name, p in adapted.named_parameters() if "layers.1.mlp" in name
                 and "lora_B" in name]  # fmt: skip
    assert len(gradients) == 1
    assert gradients[0] is not None
    assert bool(gradients[0].abs().sum() > 0)
    with pytest.raises(LifecycleError, match="must have no adapters"):
        deploy(model)
