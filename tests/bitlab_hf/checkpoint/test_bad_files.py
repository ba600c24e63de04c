"""Damaged, incomplete and contradictory checkpoints: each a clear error that names the thing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2ForCausalLM

from bitcore.errors import CheckpointError, ConfigError, NonFiniteError
from bitlab_hf import BitLabConfig, deploy, save
from bitlab_hf.config import FORMAT_VERSION
from tests.bitlab_hf.models import logits_of, make_float_model, rewrite

LAYER = "model.layers.1.mlp.up_proj"
LAST = "model.layers.1.mlp.down_proj"


def load(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **options)


@pytest.fixture
def deployed(tmp_path: Path) -> Path:
    source = make_float_model("qwen2", tmp_path)
    save(load(source, quantization_config=BitLabConfig(mode="infer")), tmp_path / "deployed")
    return tmp_path / "deployed"


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return change


def rewrite_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(fields)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("leaf", ["qweight", "qweight_scale"])
@pytest.mark.parametrize("keep_metadata", [True, False])
def test_missing_tensor(deployed: Path, leaf: str, keep_metadata: bool) -> None:
    rewrite(deployed, drop(f"{LAYER}.{leaf}"), keep_metadata)
    with pytest.raises(
        CheckpointError, match=re.escape(f"{LAYER}.{leaf} must be in the checkpoint")
    ):
        load(deployed)


def test_missing_bias(deployed: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    rewrite(deployed, drop(name))
    with pytest.raises(CheckpointError, match=re.escape(f"{name} must be in the checkpoint")):
        load(deployed)


@pytest.mark.parametrize(
    ("leaf", "tensor"),
    [
        ("qweight", torch.zeros(47, 64, dtype=torch.uint8)),
        ("qweight", torch.zeros(48, 64, dtype=torch.int32)),
        ("qweight", torch.zeros(48 * 64, dtype=torch.uint8)),
        ("qweight_scale", torch.ones(2)),
        ("qweight_scale", torch.ones(1, dtype=torch.bfloat16)),
    ],
)
def test_another_shape_or_dtype(deployed: Path, leaf: str, tensor: Tensor) -> None:
    rewrite(deployed, lambda tensors: tensors.update({f"{LAYER}.{leaf}": tensor}))
    with pytest.raises(CheckpointError, match=re.escape(f"{LAYER}.{leaf} must be")):
        load(deployed)


def test_config_that_contradicts_the_tensors(deployed: Path) -> None:
    rewrite_config(deployed, weight_granularity="per_channel")
    with pytest.raises(
        CheckpointError, match=r"qweight_scale must be float32 \[64\] for per_channel"
    ):
        load(deployed)


def test_latent_config_over_packed_tensors(deployed: Path) -> None:
    rewrite_config(deployed, weight_format="latent")
    with pytest.raises(CheckpointError, match="must be 'packed' for these tensors, got 'latent'"):
        load(deployed)


@pytest.mark.parametrize("keep_metadata", [True, False])
def test_skip_list_that_contradicts_the_tensors(deployed: Path, keep_metadata: bool) -> None:
    rewrite(deployed, lambda tensors: None, keep_metadata)
    rewrite_config(deployed, modules_to_not_convert=["lm_head", "up_proj"])
    with pytest.raises(CheckpointError, match="up_proj must not be in modules_to_not_convert"):
        load(deployed)


def test_packed_weights_from_a_state_dict(deployed: Path) -> None:
    state = load_file(deployed / "model.safetensors")
    config = AutoConfig.from_pretrained(deployed)
    with pytest.raises(CheckpointError, match="must be read from its safetensors files"):
        Qwen2ForCausalLM.from_pretrained(None, config=config, state_dict=state)


def test_a_lost_layer_of_a_kind_that_occurs_once(tmp_path: Path) -> None:
    source = make_float_model("llama", tmp_path, num_hidden_layers=1)
    save(load(source, quantization_config=BitLabConfig()), tmp_path / "latent")
    name = "model.layers.0.mlp.up_proj"
    rewrite(tmp_path / "latent", drop(f"{name}.weight"))
    with pytest.raises(
        CheckpointError, match=re.escape(f"{name}.weight must be in the checkpoint")
    ):
        load(tmp_path / "latent")


def test_damaged_metadata(deployed: Path) -> None:
    file = deployed / "model.safetensors"
    save_file(load_file(file), file, {"format": "pt", "bitlab_layers": "{"})
    with pytest.raises(CheckpointError, match="bitlab_layers must be a JSON list"):
        load(deployed)


def test_packed_config_over_float_tensors(tmp_path: Path) -> None:
    source = make_float_model("llama", tmp_path)
    save(load(source, quantization_config=BitLabConfig()), tmp_path / "latent")
    rewrite_config(tmp_path / "latent", weight_format="packed")
    with pytest.raises(CheckpointError, match="must be 'latent' for these tensors, got 'packed'"):
        load(tmp_path / "latent")


def test_newer_format(deployed: Path) -> None:
    rewrite_config(deployed, format_version=FORMAT_VERSION + 1, something_new=True)
    with pytest.raises(ConfigError, match="newer BitLab"):
        load(deployed)


def test_unknown_field(deployed: Path) -> None:
    rewrite_config(deployed, weight_granularty="per_tensor")
    with pytest.raises(ConfigError, match="'weight_granularty'"):
        load(deployed)


@pytest.mark.parametrize("lane", range(4))
def test_invalid_code(deployed: Path, lane: int) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.qweight"][5, 6] |= 3 << (2 * lane)

    rewrite(deployed, damage)
    with pytest.raises(CheckpointError, match=re.escape(f"{LAYER}.qweight must hold the codes")):
        load(deployed)
    load(deployed, quantization_config=BitLabConfig(verify=False))


@pytest.mark.parametrize("value", [float("nan"), 0.0, -1.0])
def test_impossible_scale(deployed: Path, value: float) -> None:
    scale = torch.tensor([value])
    rewrite(deployed, lambda tensors: tensors.update({f"{LAYER}.qweight_scale": scale}))
    with pytest.raises(CheckpointError, match=re.escape(f"{LAYER}.qweight_scale must be finite")):
        load(deployed)


def test_truncated_file(deployed: Path) -> None:
    file = deployed / "model.safetensors"
    content = file.read_bytes()
    for size in (len(content) - 1, 400, 4):
        file.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match="model.safetensors: the file must be a whole"):
            load(deployed)


def test_damaged_header(deployed: Path) -> None:
    file = deployed / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[20] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="model.safetensors: the file must be a whole"):
        load(deployed)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", ["infer", "deploy"])
def test_nonfinite_weights_are_named(tmp_path: Path, value: float, mode: str) -> None:
    source = make_float_model("llama", tmp_path)

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAST}.weight"][63, 191] = value

    rewrite(source, spoil)
    if mode == "infer":
        with pytest.raises(NonFiniteError, match=re.escape(f"{LAST}.weight must be finite")):
            load(source, quantization_config=BitLabConfig(mode="infer"))
        return
    model = load(source, quantization_config=BitLabConfig())
    with pytest.raises(NonFiniteError, match=re.escape(f"{LAST}.weight must be finite")):
        deploy(model)
    assert not any(getattr(module, "is_deployed", False) for module in model.modules())
    assert not hasattr(model, "hf_quantizer")


def test_missing_weight_of_a_latent_checkpoint(tmp_path: Path) -> None:
    source = make_float_model("llama", tmp_path)
    save(load(source, quantization_config=BitLabConfig()), tmp_path / "latent")
    rewrite(tmp_path / "latent", drop(f"{LAYER}.weight"))
    with pytest.raises(
        CheckpointError, match=re.escape(f"{LAYER}.weight must be in the checkpoint")
    ):
        load(tmp_path / "latent")


def test_another_shape_in_a_float_file(tmp_path: Path) -> None:
    source = make_float_model("llama", tmp_path)
    rewrite(source, lambda tensors: tensors.update({f"{LAYER}.weight": torch.zeros(192, 63)}))
    with pytest.raises(CheckpointError, match=re.escape(f"{LAYER}.weight must be float32")):
        load(source, quantization_config=BitLabConfig(mode="infer"))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(source, quantization_config=BitLabConfig())


def test_disk_offload_while_packing(tmp_path: Path) -> None:
    source = make_float_model("llama", tmp_path)
    with pytest.raises(ConfigError, match="must not offload to disk while packing"):
        load(
            source,
            quantization_config=BitLabConfig(mode="infer"),
            device_map={"model": "disk", "lm_head": "cpu"},
            offload_folder=tmp_path / "offload",
        )


def test_automatic_offload_while_packing(tmp_path: Path) -> None:
    source = make_float_model("llama", tmp_path)
    with pytest.raises(ConfigError, match="must not offload to disk while packing"):
        load(
            source,
            quantization_config=BitLabConfig(mode="infer"),
            device_map="auto",
            max_memory={"cpu": 60_000},
            offload_folder=tmp_path / "offload",
        )


def test_the_good_file_still_loads(deployed: Path) -> None:
    expected = logits_of(load(deployed))
    rewrite(deployed, lambda tensors: None)
    assert torch.equal(logits_of(load(deployed)), expected)
