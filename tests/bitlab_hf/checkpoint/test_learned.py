from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel, ZambaConfig

from bitcore.errors import ArgumentError, CheckpointError, NonFiniteError
from bitlab_hf import BitLabConfig, deploy, save
from bitlab_hf.model.replace import replace_linear
from bitlab_hf.model.tree import quantized_layers
from bitlayers import BitLayerBase
from tests.bitlab_hf.models import make_float_model, rewrite

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


@pytest.fixture(scope="module")
def shared_block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Zamba's layers of attention are one block, tied by name."""
    torch.manual_seed(0)
    config = ZambaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=2, n_mamba_heads=2, mamba_d_state=8,
        mamba_dt_rank=8, layers_block_type=["mamba", "hybrid"] * 2, use_mamba_kernels=False,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("tied") / "float"
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def shared(model: PreTrainedModel) -> list[BitLayerBase]:
    """Returns the two layers that have one weight."""
    names = [f"model.layers.{layer}.shared_transf.feed_forward.up_proj" for layer in (1, 3)]
    layers: list[Any] = [model.get_submodule(name) for name in names]
    return layers


def train(model: PreTrainedModel) -> torch.Tensor:
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    return logits(model.eval())


def test_layers_tied_by_name_train_no_scale_each(shared_block: Path, tmp_path: Path) -> None:
    config = BitLabConfig(weight_quantizer="lsq", weight_granularity="per_channel")
    model = load(shared_block, config)
    first, second = shared(model)
    assert first.weight is second.weight
    assert {one.quant_config.weight_quantizer for one in (first, second)} == {"absmean"}
    assert model.get_submodule("model.layers.1.linear").learned_scale is not None
    trained = train(model)
    save(model, tmp_path / "latent")
    assert torch.equal(logits(load(tmp_path / "latent")), trained)
    packed = load(tmp_path / "latent", BitLabConfig(mode="infer"))
    assert torch.equal(logits(packed), trained)
    for name, one in {"deployed": deploy(model), "packed": packed}.items():
        assert torch.equal(logits(one), trained)
        save(one, tmp_path / name)
        assert torch.equal(logits(load(tmp_path / name)), trained)


def test_files_with_a_scale_for_each_of_tied_layers(shared_block: Path, tmp_path: Path) -> None:
    """As earlier releases wrote them: `deploy` took one scale for all."""
    save(load(shared_block, BitLabConfig(weight_quantizer="lsq")), tmp_path / "latent")
    name = "model.layers.3.shared_transf.feed_forward.up_proj.learned_scale"
    rewrite(tmp_path / "latent", lambda tensors: tensors.update({name: torch.ones(1)}))
    for given in (None, BitLabConfig(mode="infer")):
        with pytest.raises(CheckpointError, match=rf"^{name} must not be in the checkpoint"):
            load(tmp_path / "latent", given)


def test_a_weight_that_is_shared_has_one_scale(shared_block: Path) -> None:
    model = replace_linear(
        AutoModelForCausalLM.from_pretrained(shared_block), BitLabConfig(weight_quantizer="lsq")
    )
    first, second = shared(model)
    assert first.learned_scale is second.learned_scale
    trained = train(model)
    second.learned_scale = torch.nn.Parameter(2 * first.learned_scale)
    with pytest.raises(ArgumentError, match="must have one learned scale, got different ones"):
        deploy(model)
    second.learned_scale = first.learned_scale
    assert torch.equal(logits(deploy(model)), trained)


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
