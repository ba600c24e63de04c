"""The model card: facts, and metadata that the hub reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from bitlab_hf import BitLabConfig, save
from bitlab_hf.card import model_card
from tests.bitlab_hf.models import make_float_model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_float_model("qwen2", tmp_path)


def test_card_of_a_deployed_model(source: Path, tmp_path: Path) -> None:
    config = BitLabConfig(mode="infer", weight_granularity="per_group", group_size=64)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    save(model, tmp_path / "deployed")
    card = ModelCard.load(tmp_path / "deployed/README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert {"bitlab", "ternary", "quantized"} <= set(card.data.tags)
    # A folder is no model of the hub.
    assert card.data.base_model is None
    ternary = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 192)
    assert f"| ternary weights | {ternary:,} in 14 matrices |" in card.text
    assert "| 14 layers | scales per group of 64, activations int8 per token |" in card.text
    assert "pip install bitlab-hf" in card.text
    assert 'AutoModelForCausalLM.from_pretrained("deployed")' in card.text


def test_card_counts_an_int8_head_once(source: Path) -> None:
    config = BitLabConfig(mode="infer", head="int8")
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    assert f"| output head, int8 | {97 * 64:,} |" in model_card(model, "x")
    kept = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=BitLabConfig(mode="infer")
    )
    assert "head, int8" not in model_card(kept, "x")


def test_base_model_of_the_hub(source: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=BitLabConfig(mode="infer", activation_dtype="float32")
    )
    model.config._name_or_path = "someone/a-model"
    text = model_card(model, "me/a-ternary-model")
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["base_model"] == "someone/a-model"
    assert metadata["base_model_relation"] == "quantized"
    assert "activations not quantized" in text


def test_a_card_that_is_there_stays(source: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=BitLabConfig(mode="infer")
    )
    target = tmp_path / "deployed"
    target.mkdir()
    (target / "README.md").write_text("mine")
    save(model, target)
    assert (target / "README.md").read_text() == "mine"


def test_no_card_for_latent_models(source: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=BitLabConfig())
    save(model, tmp_path / "latent")
    assert not (tmp_path / "latent/README.md").exists()
