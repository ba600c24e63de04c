"""Swapping the layers of any model, also outside transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from bitcore.errors import ConfigError, LifecycleError
from bitlab_hf import BitLabConfig, deploy, replace_linear, save
from bitlayers import BitLayerBase, BitLinear, RMSNormBitLinear
from tests.bitlab_hf.models import logits_of, make_float_model


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path)


class Plain(nn.Module):
    """A model outside transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64, dtype=torch.bfloat16)
        )
        self.twin = self.body[0]
        self.head = nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body[2](self.twin(x)))


def test_replace_linear_outside_transformers() -> None:
    model = Plain()
    weight = model.body[0].weight
    assert replace_linear(model, BitLabConfig(modules_to_not_convert=["head"])) is model
    assert isinstance(model.twin, BitLinear)
    assert model.twin is model.body[0]
    assert model.twin.weight is weight
    assert model.body[2].weight.dtype == torch.float32
    assert type(model.head) is nn.Linear
    x = torch.randn(2, 64)
    expected = model.eval()(x)
    assert torch.equal(deploy(model)(x), expected)
    with pytest.raises(LifecycleError, match="deployed already"):
        deploy(model)


def test_replace_linear_in_torchs_own_encoder() -> None:
    """Its fast path in eval mode reads the weights past the layers' forward; it is turned off."""
    encoder = nn.TransformerEncoderLayer(64, 2, 128, dropout=0.0, batch_first=True)
    replace_linear(encoder)
    assert isinstance(encoder.linear1, BitLinear)
    x = torch.randn(2, 5, 64)
    trained = encoder.train()(x)
    with torch.no_grad():
        evaluated = encoder.eval()(x)
        # Attention has a fast path of its own, which rounds differently.
        torch.testing.assert_close(evaluated, trained, rtol=1e-4, atol=1e-4)
        assert torch.equal(deploy(encoder)(x), evaluated)


def test_replace_linear_keeps_a_tied_head(tmp_path: Path) -> None:
    model = load(make_float_model("qwen2", tmp_path, torch.bfloat16))
    replace_linear(model)
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_replace_linear_refuses_a_bare_linear() -> None:
    with pytest.raises(ConfigError, match="BitLinear.from_linear"):
        replace_linear(nn.Linear(4, 4))


def test_settings_for_a_later_name_of_a_layer_are_refused() -> None:
    """They would do nothing: the first name decides."""
    given: tuple[dict[str, Any], ...] = (
        {"overrides": {"twin": {"activation_dtype": "float32"}}},
        {"overrides": {"t*": {"activation_dtype": "float32"}}},
        {"sub_norm": ["twin"]},
    )
    for fields in given:
        model = Plain()
        with pytest.raises(ConfigError, match=r"by its first name, got 'twin' for 'body\.0'"):
            replace_linear(model, BitLabConfig(**fields))
        assert type(model.twin) is nn.Linear
    # What says the same of both, or of the first, means something.
    overrides = {"body.0": {"group_size": None}, "twin": {"activation_granularity": "per_token"}}
    model = replace_linear(Plain(), BitLabConfig(sub_norm=["body.0", "twin"], overrides=overrides))
    assert isinstance(model.twin, RMSNormBitLinear)


def test_replace_linear_changes_nothing_when_it_fails() -> None:
    model = nn.Sequential(nn.Linear(128, 8), nn.Linear(100, 8))
    config = BitLabConfig(weight_granularity="per_group", group_size=64)
    with pytest.raises(ConfigError, match="1: .*multiple of group_size 64"):
        replace_linear(model, config)
    assert not any(isinstance(module, BitLayerBase) for module in model)
    with pytest.raises(ConfigError, match="got none among"):
        replace_linear(nn.Sequential(nn.ReLU()))


def test_replace_linear_on_a_transformers_model_deploys_and_reloads(tmp_path: Path) -> None:
    source = make_float_model("llama", tmp_path)
    model = load(source)
    replace_linear(
        model, BitLabConfig(modules_to_not_convert=["lm_head"], weight_granularity="per_channel")
    )
    expected = logits_of(model)
    save(deploy(model), tmp_path / "deployed")
    assert torch.equal(logits_of(load(tmp_path / "deployed")), expected)
