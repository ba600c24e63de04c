"""int8_layers: ties, what patterns may name, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaPreTrainedModel

from bitcore.errors import ConfigError, NonFiniteError
from bitlab_hf import BitLabConfig, deploy, replace_linear, save
from bitlayers import BitLinear, Int8Linear
from tests.bitlab_hf.checkpoint.test_loading import TwoNames, Undeclared
from tests.bitlab_hf.experts import make_moe
from tests.bitlab_hf.int8 import load
from tests.bitlab_hf.models import logits_of, make_float_model, rewrite

MLP = "model.layers.1.mlp"
GROUPS = {"weight_granularity": "per_group", "group_size": 64}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_float_model("llama", tmp_path)


def test_tied_layers_become_one(tmp_path: Path) -> None:
    """Two layers that are tied, and one under two names."""
    model = TwoNames(LlamaConfig(hidden_size=64))
    del model.again
    model.save_pretrained(tmp_path / "float")
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    for patterns in (["first", "second"], ["once", "again"]):
        asked = BitLabConfig(int8_layers=patterns)
        latent = TwoNames.from_pretrained(tmp_path / "float", quantization_config=asked)
        deploy(latent)
        held = [getattr(latent, name) for name in patterns]
        assert type(held[0]) is Int8Linear
        assert held[0].qweight is held[1].qweight
        expected = latent(x)
        save(latent, tmp_path / "deployed")
        again = TwoNames.from_pretrained(tmp_path / "deployed")
        assert getattr(again, patterns[0]).qweight is getattr(again, patterns[1]).qweight
        assert torch.equal(again(x), expected)
        packed = TwoNames.from_pretrained(
            tmp_path / "float",
            quantization_config=BitLabConfig(int8_layers=patterns, mode="infer"),
        )
        assert torch.equal(packed(x), expected)
    with pytest.raises(ConfigError, match="must match second too, which is tied to first"):
        TwoNames.from_pretrained(
            tmp_path / "float", quantization_config=BitLabConfig(int8_layers=["first"])
        )


class TwoPairs(LlamaPreTrainedModel):
    _tied_weights_keys = {  # noqa: RUF012
        "second.weight": "first.weight",
        "fourth.weight": "third.weight",
    }

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for name in ("first", "second", "third", "fourth", "fifth"):
            self.add_module(name, nn.Linear(64, 64, bias=False))
        self.norm = nn.LayerNorm(64)
        self.post_init()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        return dict(self._tied_weights_keys)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.first, self.second, self.third, self.fourth, self.fifth):
            x = layer(x)
        normed: torch.Tensor = self.norm(x)
        return normed


def test_several_pairs_of_tied_layers(tmp_path: Path) -> None:
    model = TwoPairs(LlamaConfig(hidden_size=64))
    names = ["first", "second", "third", "fourth"]
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    deploy(replace_linear(model, BitLabConfig(int8_layers=names)))
    expected = model(x)
    save(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(value.dtype == torch.int8 for value in stored.values()) == 2
    again = TwoPairs.from_pretrained(tmp_path)
    for result in (model, again):
        result.tie_weights()
        assert result.first.qweight is result.second.qweight
        assert result.third.qweight is result.fourth.qweight
        assert result.first.qweight is not result.third.qweight
        assert torch.equal(result(x), expected)
    save(again, tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == stored.keys()


def test_a_shared_weight_that_no_name_ties_is_refused() -> None:
    class Third(Undeclared):
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.c = nn.Linear(64, 64)

    model = Third(LlamaConfig(hidden_size=64))
    with pytest.raises(ConfigError, match="got a, which shares its weight with b"):
        replace_linear(model, BitLabConfig(int8_layers=["a", "b"]))
    assert type(model.c) is nn.Linear


@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"int8_layers": ["layers.7"]}, "got 'layers.7', which matches none\n.*'model.layers.0"),
        ({"int8_layers": ["down_proj", "fc3"]}, "got 'fc3', which matches none"),
        # Not "layers.1" of "layers.10": a name ends at a dot.
        ({"int8_layers": ["model.layers.1.mlp.down"]}, "which matches none"),
        ({"int8_layers": ["lm_head"]}, 'must match no output head.*\nUse head="int8"'),
        ({"int8_layers": ["lm_head"], "head": "ternary"}, "must match no output head"),
        (
            {"int8_layers": ["down_proj"], "modules_to_not_convert": ["model.layers.1"]},
            "no layer of modules_to_not_convert.*'down_proj', which matches model.layers.1.mlp",
        ),
        (
            {"int8_layers": ["down_proj"], "overrides": {"*.down_proj": GROUPS}},
            "overrides must match converted layers",
        ),
        ({"int8_layers": [".*_proj"]}, "must hold nn.Linear layers that are not skipped, got none"),
        ({"int8_layers": "down_proj"}, "int8_layers must be a list of names"),
        ({"int8_layers": ["("]}, "int8_layers must hold names or regular expressions"),
    ],
)
def test_patterns_that_are_refused(
    source: Path, mode: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        load(source, BitLabConfig(mode=mode, **fields))


@pytest.mark.parametrize("experts", ["keep", None])
def test_experts_are_refused_by_name(tmp_path: Path, experts: str | None) -> None:
    source = make_moe("qwen2_moe", tmp_path)
    for pattern in ("model.layers.1.mlp", "model.layers.1.mlp.experts", "gate_up_proj"):
        layer = "0" if pattern == "gate_up_proj" else "1"
        named = re.escape(f"matches the experts model.layers.{layer}.mlp.experts")
        with pytest.raises(ConfigError, match=named):
            load(source, BitLabConfig(int8_layers=[pattern], experts=experts))
    # A router stays float, as ever.
    with pytest.raises(ConfigError, match="'mlp.gate', which matches none"):
        load(source, BitLabConfig(int8_layers=["mlp.gate"]))
    shared = BitLabConfig(int8_layers=["model.layers.1.mlp.shared_expert"])
    model = load(source, shared)
    trained = logits_of(model)
    expected = logits_of(deploy(model))
    torch.testing.assert_close(expected, trained, rtol=0, atol=0.02)
    assert type(model.model.layers[1].mlp.shared_expert.up_proj) is Int8Linear
    assert type(model.model.layers[1].mlp.gate).__name__ != "Int8Linear"
    save(model, tmp_path / "deployed")
    assert torch.equal(logits_of(load(tmp_path / "deployed")), expected)


def test_a_nonfinite_weight_is_named_and_nothing_changes(source: Path) -> None:
    key = f"{MLP}.down_proj.weight"
    rewrite(source, lambda tensors: tensors[key][-1].fill_(float("nan")))
    with pytest.raises(NonFiniteError, match=re.escape(f"{key} must be finite")):
        load(source, BitLabConfig(int8_layers=[MLP], mode="infer"))
    model = load(source, BitLabConfig(int8_layers=[MLP]))
    with pytest.raises(NonFiniteError, match=re.escape(f"{key} must be finite")):
        deploy(model)
    assert type(model.get_submodule(f"{MLP}.down_proj")) is nn.Linear
    assert not any(one.is_deployed for one in model.modules() if isinstance(one, BitLinear))


def test_a_new_layer_cannot_be_named(source: Path) -> None:
    asked = BitLabConfig(int8_layers=["score"])
    with pytest.raises(ConfigError, match="'score', which matches none"):
        load(source, asked, auto=AutoModelForSequenceClassification)
