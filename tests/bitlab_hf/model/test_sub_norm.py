"""SubLN: an RMS norm before chosen layers, from a float checkpoint to a deployed one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bitcore.errors import ArgumentError, CheckpointError, ConfigError, LifecycleError
from bitlab_hf import BitLabConfig, deploy, export_bitnet, replace_linear, save
from bitlab_hf.model.tree import quantized_layers
from bitlab_hf.train import calibrate
from bitlayers import BitLinear, RMSNormBitLinear
from tests.bitlab_hf.models import logits_of, make_float_model, rewrite, token_ids

PATTERNS = ["o_proj", "*.mlp.down_proj"]


def load(path: Path, **fields: Any) -> Any:
    # Given as None, it would make transformers drop the file's own.
    given = {"quantization_config": BitLabConfig(**fields)} if fields else {}
    return AutoModelForCausalLM.from_pretrained(path, **given)


def check_norms(model: Any) -> list[Any]:
    """Checks which layers have a norm; returns the norms' weights."""
    weights = []
    for found in quantized_layers(model):
        normed = found.names[0].endswith(("o_proj", "down_proj"))
        assert type(found.module) is (RMSNormBitLinear if normed else BitLinear)
        if normed:
            weights.append(found.module.rms_norm.weight)
    assert len(weights) == 4
    return weights


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_whole_path(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = make_float_model(name, tmp_path)
    caplog.set_level(logging.WARNING)
    model = load(source, sub_norm=PATTERNS)
    assert "rms_norm" not in caplog.text
    assert all(torch.equal(weight, torch.ones_like(weight)) for weight in check_norms(model))
    at_load = load(source, sub_norm=PATTERNS, mode="infer")
    assert torch.equal(logits_of(at_load), logits_of(model.eval()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()(input_ids=token_ids(), labels=token_ids()).loss.backward()
    optimizer.step()
    assert not any(torch.equal(weight, torch.ones_like(weight)) for weight in check_norms(model))
    calibrate(model, token_ids())
    expected = logits_of(model.eval())
    save(model, tmp_path / "latent")
    latent = load(tmp_path / "latent")
    check_norms(latent)
    assert torch.equal(logits_of(latent), expected)
    deploy(model)
    assert torch.equal(logits_of(model), expected)
    save(model, tmp_path / "deployed")
    again = load(tmp_path / "deployed")
    assert check_norms(again)[0].dtype == torch.float32
    assert torch.equal(logits_of(again), expected)
    with pytest.raises(LifecycleError, match="o_proj must be a linear layer alone"):
        again.dequantize()
    with pytest.raises(ArgumentError, match="must hold one class of layers"):
        export_bitnet(model, tmp_path / "bitnet")
    for folder in ("latent", "deployed"):
        rewrite(
            tmp_path / folder,
            lambda tensors: tensors.pop("model.layers.1.self_attn.o_proj.rms_norm.weight"),
        )
        with pytest.raises(CheckpointError, match=r"1\.self_attn\.o_proj\.rms_norm\.weight must"):
            load(tmp_path / folder)


def test_without_a_configuration_of_its_own(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_float_model("llama", tmp_path))
    replace_linear(model, BitLabConfig(sub_norm=PATTERNS))
    check_norms(deploy(model))
    expected = logits_of(model)
    save(model, tmp_path / "deployed")
    stored = load_file(tmp_path / "deployed" / "model.safetensors")
    assert sum(name.endswith("rms_norm.weight") for name in stored) == 4
    assert torch.equal(logits_of(load(tmp_path / "deployed")), expected)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sub_norm must be a list of names, got 'o_proj'"):
        BitLabConfig(sub_norm="o_proj")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="layer must be 'BitLinear' with sub_norm"):
        BitLabConfig(sub_norm=["o_proj"], layer="Other")
    with pytest.raises(ConfigError, match="sub_norm must match converted layers, got"):
        load(make_float_model("llama", tmp_path), sub_norm=["out_proj"])
