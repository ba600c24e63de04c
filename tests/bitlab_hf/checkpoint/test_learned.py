from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from bitcore.errors import NonFiniteError
from bitlab_hf import BitLabConfig, deploy, save
from bitlab_hf.model.replace import replace_linear
from bitlab_hf.model.tree import quantized_layers
from tests.bitlab_hf.models import make_float_model

IDS = torch.arange(12).view(2, 6)


@pytest.fixture(scope="module")
def float_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_float_model("qwen2", tmp_path_factory.mktemp("learned"))


def load(path: Path, config: BitLabConfig | None = None) -> PreTrainedModel:
    # Given as None, it would make transformers drop the file's own.
    given = {} if config is None else {"quantization_config": config}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, **given)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("granularity", [{}, {"weight_granularity": "per_group", "group_size": 64}])
def test_life_of_a_learned_scale(
    float_model: Path, tmp_path: Path, granularity: dict, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    config = BitLabConfig(weight_quantizer="lsq", **granularity)
    model = load(float_model, config)
    assert "learned_scale" not in caplog.text
    for found in quantized_layers(model):
        scale = found.module.learned_scale
        mean = found.module.weight.abs().view(*scale.shape, -1).mean(-1)
        torch.testing.assert_close(scale, 2 * mean)
    at_load = load(float_model, BitLabConfig(weight_quantizer="lsq", mode="infer", **granularity))
    assert torch.equal(logits(at_load), logits(model.eval()))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    trained = logits(model.eval())
    save(model, tmp_path / "latent")
    stored = load_file(tmp_path / "latent" / "model.safetensors")
    assert sum(name.endswith(".learned_scale") for name in stored) == 14
    again = load(tmp_path / "latent")
    assert torch.equal(logits(again), trained)
    packed = load(tmp_path / "latent", BitLabConfig(mode="infer"))
    assert torch.equal(logits(packed), trained)
    deploy(model)
    assert torch.equal(logits(model), trained)
    save(model, tmp_path / "packed")
    assert not any("learned" in name for name in load_file(tmp_path / "packed/model.safetensors"))
    assert torch.equal(logits(load(tmp_path / "packed")), trained)


@pytest.mark.parametrize("name", ["absmax", "twn"])
def test_estimators_live_through_files(float_model: Path, tmp_path: Path, name: str) -> None:
    model = load(float_model, BitLabConfig(weight_quantizer=name)).eval()
    before = logits(model)
    packed = load(float_model, BitLabConfig(weight_quantizer=name, mode="infer"))
    assert torch.equal(logits(packed), before)
    save(deploy(model), tmp_path / "packed")
    assert torch.equal(logits(load(tmp_path / "packed")), before)


def test_model_with_a_scale_that_is_not_finite_is_not_deployed(float_model: Path) -> None:
    model = replace_linear(
        AutoModelForCausalLM.from_pretrained(float_model), BitLabConfig(weight_quantizer="lsq")
    )
    found = quantized_layers(model)[-1]
    with torch.no_grad():
        found.module.learned_scale[0] = torch.nan
    with pytest.raises(NonFiniteError, match=rf"{found.names[0]}\.learned_scale must be finite"):
        deploy(model)
    assert not any(layer.module.is_deployed for layer in quantized_layers(model))
