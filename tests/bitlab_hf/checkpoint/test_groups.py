"""Files of groups with scales in two levels: every way to write and to load them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitcore import use_backend
from bitcore.errors import CheckpointError, ConfigError
from bitlab_hf import BitLabConfig, deploy, quantized_layers, replace_linear, save
from bitlayers import register_layer
from bitlayers.registry import LAYER_REGISTRY
from tests.bitlab_hf.models import logits_of, make_float_model, rewrite
from tests.bitlayers.test_own_packing import OwnCodes

GROUPS: dict[str, Any] = {"weight_granularity": "per_group", "group_size": 64}
FLOATS: dict[str, Any] = {**GROUPS, "group_scale_dtype": "float32"}
# 192 inputs and 64 rows.
NAME = "model.layers.1.mlp.down_proj"


def load(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **options)


def packed(source: Path, folder: Path, **fields: Any) -> Path:
    scheme = BitLabConfig(mode="infer", **fields)
    save(load(source, quantization_config=scheme), folder)
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def scheme_in(folder: Path) -> dict[str, Any]:
    held: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return held


def rewrite_scheme(folder: Path, drop: tuple[str, ...] = (), **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    for name in drop:
        del config["quantization_config"][name]
    config["quantization_config"].update(fields)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_float_model("llama", tmp_path)


@pytest.fixture
def file(source: Path, tmp_path: Path) -> Path:
    return packed(source, tmp_path / "groups", **GROUPS)


def test_what_is_written(file: Path, source: Path) -> None:
    scheme, tensors = scheme_in(file), tensors_of(file)
    assert (scheme["format_version"], scheme["group_scale_dtype"]) == (2, "uint8")
    model = load(file)
    layers = quantized_layers(model)
    assert len(layers) == 14
    for found in layers:
        name, layer = found.names[0], found.module
        rows, columns = layer.out_features, layer.in_features
        for leaf, (dtype, shape) in {
            "qweight": (torch.uint8, (rows // 4, columns)),
            "qweight_scale": (torch.float32, (rows,)),
            "qweight_multiplier": (torch.uint8, (rows, columns // 64)),
        }.items():
            tensor = tensors[f"{name}.{leaf}"]
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape)
            assert torch.equal(tensor, getattr(layer, leaf))
    # Files of other scales are as they were.
    for fields in ({}, {"weight_granularity": "per_channel"}, FLOATS):
        other = packed(source, file.parent / "other", **fields)
        assert scheme_in(other)["format_version"] == 1
        assert "group_scale_dtype" not in scheme_in(other)
        assert not any("multiplier" in name for name in tensors_of(other))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_shards_variants_and_saving_over_itself(file: Path, tmp_path: Path, backend: str) -> None:
    with use_backend(backend):
        model = load(file)
        expected, tensors = logits_of(model), tensors_of(file)
        save(model, tmp_path / "shards", max_shard_size="20KB")
        assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
        save(model, tmp_path / "variant", variant="small")
        again = load(tmp_path / "shards")
        assert torch.equal(logits_of(again), expected)
        save(again, tmp_path / "shards")
        variant = load(tmp_path / "variant", variant="small")
        assert torch.equal(logits_of(variant), expected)
        assert torch.equal(logits_of(load(tmp_path / "shards")), expected)
    for folder in (tmp_path / "shards", tmp_path / "variant"):
        stored = tensors_of(folder)
        assert stored.keys() == tensors.keys()
        assert all(torch.equal(stored[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("name", ["qwen2", "gemma"])
def test_an_int8_head_beside_groups(name: str, tmp_path: Path) -> None:
    source = make_float_model(name, tmp_path)
    latent = load(source, quantization_config=BitLabConfig(head="int8", **GROUPS)).eval()
    deploy(latent)
    save(latent, tmp_path / "a")
    packed(source, tmp_path / "b", head="int8", **GROUPS)
    first, second = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(logits_of(load(tmp_path / "a")), logits_of(latent))
    stray = next(key for key in first if first[key].dtype == torch.int8)
    stray = stray.removesuffix("qweight") + "qweight_multiplier"
    one = torch.ones(97, 1, dtype=torch.uint8)
    rewrite(tmp_path / "a", lambda tensors: tensors.update({stray: one}))
    with pytest.raises(CheckpointError, match=re.escape(f"{stray} must not be in the checkpoint")):
        load(tmp_path / "a")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("estimator", ["absmean", "absmax", "twn", "lsq"])
def test_every_estimator_packs_what_it_trains(
    source: Path, tmp_path: Path, estimator: str, dtype: torch.dtype
) -> None:
    config = BitLabConfig(weight_quantizer=estimator, **GROUPS)
    latent = load(source, quantization_config=config, dtype=dtype)
    trained, expected = logits_of(latent.train()), logits_of(latent.eval())
    assert torch.equal(trained, expected)
    save(latent, tmp_path / "latent")
    assert scheme_in(tmp_path / "latent")["format_version"] == 2
    at_load = load(tmp_path / "latent", quantization_config=BitLabConfig(mode="infer"), dtype=dtype)
    save(deploy(latent), tmp_path / "packed")
    for model in (at_load, latent, load(tmp_path / "packed", dtype=dtype)):
        assert torch.equal(logits_of(model), expected)


def test_groups_where_an_override_says_so(source: Path, tmp_path: Path) -> None:
    overrides = {"*.down_proj": GROUPS, "*.up_proj": FLOATS}
    folder = packed(source, tmp_path / "mixed", overrides=overrides)
    assert scheme_in(folder)["format_version"] == 2
    model = load(folder)
    kinds = {found.names[0].rpartition(".")[2]: found for found in quantized_layers(model)}
    counts = {name: len(found.module.packed()) for name, found in kinds.items()}
    assert {name for name, count in counts.items() if count == 3} == {"down_proj"}
    assert kinds["up_proj"].module.qweight_scale.shape == (192, 1)
    assert kinds["q_proj"].module.qweight_scale.shape == (1,)
    latent = load(source, quantization_config=BitLabConfig(overrides=overrides))
    assert torch.equal(logits_of(latent), logits_of(model))
    # Back to one scale a matrix, out of groups.
    back = {"*.down_proj": {"weight_granularity": "per_tensor", "group_size": None}}
    folder = packed(source, tmp_path / "back", overrides=back, **GROUPS)
    assert load(folder).get_submodule(NAME).qweight_scale.shape == (1,)


def test_a_replaced_model_describes_its_groups(source: Path, tmp_path: Path) -> None:
    for fields, version in ((GROUPS, 2), (FLOATS, 1), ({}, 1)):
        model = replace_linear(load(source), BitLabConfig(**fields)).eval()
        expected = logits_of(deploy(model))
        save(model, tmp_path / "replaced")
        scheme = scheme_in(tmp_path / "replaced")
        assert scheme["format_version"] == version
        assert ("group_scale_dtype" in json.dumps(scheme)) == (version == 2)
        assert torch.equal(logits_of(load(tmp_path / "replaced")), expected)


def test_a_layer_that_packs_itself_beside_groups(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LAYER_REGISTRY, "OwnBytes", register_layer("OwnBytes")(OwnCodes))
    scheme = BitLabConfig(layer="OwnBytes", **GROUPS)
    model = deploy(load(source, quantization_config=scheme).eval())
    save(model, tmp_path / "own")
    assert not any("multiplier" in name for name in tensors_of(tmp_path / "own"))
    again = load(tmp_path / "own")
    assert all(found.module.packs_itself for found in quantized_layers(again))
    assert torch.equal(logits_of(again), logits_of(model))


def test_groups_that_do_not_divide(tmp_path: Path) -> None:
    """The same error, with the layer and its way out, wherever layers are made."""
    source = make_float_model("llama", tmp_path, intermediate_size=160)
    message = r"mlp.down_proj: .*in_features must be a multiple of group_size 64, got 160"
    for mode in ("auto", "infer"):
        with pytest.raises(ConfigError, match=message):
            load(source, quantization_config=BitLabConfig(mode=mode, **GROUPS))
    with pytest.raises(ConfigError, match=message):
        replace_linear(load(source), BitLabConfig(**GROUPS))
    channel = {"weight_granularity": "per_channel", "group_size": None}
    folder = packed(source, tmp_path / "p", overrides={"*.down_proj": channel}, **GROUPS)
    assert load(folder).get_submodule(NAME).qweight_scale.shape == (64,)
    rewrite_scheme(folder, overrides={})
    with pytest.raises(ConfigError, match=message):
        load(folder)
