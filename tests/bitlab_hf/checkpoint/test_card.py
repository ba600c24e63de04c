"""The model card: facts, and metadata that the hub reads."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from bitcore.errors import ArgumentError, CheckpointError
from bitlab_hf import BitLabConfig, Facts, record_facts, save
from bitlab_hf.checkpoint.card import is_untouched, model_card, renamed
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
    # Two bits a code, a byte for 64 inputs, and four for each row: of 64 inputs, or of 192.
    bits = 2 + 8 / 64 + 32 * (2 * (64 + 32 + 192) + 64) / (ternary / 2)
    assert f"| bits a weight, scales included | {bits:.2f} |" in card.text
    assert "pip install ." in card.text
    assert "`bitlab-hf`" in card.text
    assert 'AutoModelForCausalLM.from_pretrained("deployed")' in card.text


def test_bits_a_weight_of_each_scheme(source: Path) -> None:
    groups = {"weight_granularity": "per_group", "group_size": 64}
    for scheme, bits, words in (
        ({}, "2.00", "scales per tensor"),
        ({**groups, "group_scale_dtype": "float32"}, "2.50", "scales per group of 64 in float32"),
    ):
        config = BitLabConfig(mode="infer", **scheme)
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
        card = model_card(model, "x")
        assert f"| bits a weight, scales included | {bits} |" in card
        assert f"| 14 layers | {words}, activations" in card


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


def test_facts_are_written_and_added_to(source: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=BitLabConfig(mode="infer")
    )
    target = tmp_path / "deployed"
    save(model, target, facts=Facts(base_model="a/b", recipe="default", data="my | notes"))
    record_facts(target, Facts(perplexities={"held out": 9.8765}))
    record_facts(target, Facts(perplexities={"other": 3.0}, speeds={"2 threads": 41.26}))
    card = ModelCard.load(target / "README.md")
    assert card.data.base_model == "a/b"
    assert "| data | my \\| notes |" in card.text
    for row in ("| recipe | default |", "| held out | 9.877 |", "| 2 threads | 41.3 tokens/s |"):
        assert card.text.count(row) == 1
    record_facts(target, Facts(base_model="c/d", perplexities={"held out": 8.0}))
    card = ModelCard.load(target / "README.md")
    assert card.data.base_model == "c/d"
    assert "| held out | 8.000 |" in card.text
    assert "9.877" not in card.text
    assert Facts.load(target).perplexities == {"held out": 8.0, "other": 3.0}


def test_facts_leave_the_authors_card_alone(source: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=BitLabConfig(mode="infer")
    )
    save(model, tmp_path / "deployed")
    (tmp_path / "deployed/README.md").write_text("mine")
    record_facts(tmp_path / "deployed", Facts(data="notes"))
    assert (tmp_path / "deployed/README.md").read_text() == "mine"
    assert Facts.load(tmp_path / "deployed").data == "notes"


def test_bad_facts(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="perplexities must hold finite numbers above 0"):
        Facts(perplexities={"x": float("nan")})
    with pytest.raises(ArgumentError, match="data must be a text"):
        Facts(data=3)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="must hold a model"):
        record_facts(tmp_path, Facts())
    (tmp_path / "bitlab_facts.json").write_text('{"wrong": 1}')
    with pytest.raises(CheckpointError, match="must hold what"):
        Facts.load(tmp_path)


def test_size_of_the_file(source: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=BitLabConfig(mode="infer")
    )
    save(model, tmp_path / "deployed")
    written = (tmp_path / "deployed/model.safetensors").stat().st_size
    said = ModelCard.load(tmp_path / "deployed/README.md").text.split("| size | ")[1].split()[0]
    # The file has a header besides.
    assert float(said) == pytest.approx(written / 1e6, abs=0.06)


@pytest.mark.parametrize(
    "named",
    [
        ["X\nimport os; os.system('echo')"],
        ["`](http://evil) <script>"],
        ["import"],
        ["\u0430rchitecture"],
        [["nested"]],
        [None],
        "text",
        [],
        None,
    ],
)
def test_names_from_a_file_never_become_code(source: Path, named: Any, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=BitLabConfig(mode="infer")
    )
    model.config.__dict__["architectures"] = named
    card = model_card(model, 'x"); <b>\n```evil')
    assert "A ternary (1.58-bit) Qwen2ForCausalLM, packed" in card
    (code,) = re.findall(r"```python\n(.*?)\n```\n", card, re.DOTALL)
    assert ast.parse(code).body[1].value.args[0].value == 'x"); <b>\n```evil'
    assert "<b>" not in card.replace(code, "")
    assert "\n```evil" not in card


def test_what_is_recorded_is_no_html(source: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=BitLabConfig(mode="infer")
    )
    card = model_card(model, "x", Facts(data="<!-- end of bitlab facts --> <script>|"))
    assert "<script>" not in card
    assert card.count("<!-- end of bitlab facts -->") == 1
    assert is_untouched(card)
    assert is_untouched(renamed(card, "x", "me/x"))
    assert 'from_pretrained("me/x")' in renamed(card, "x", "me/x")
    assert not is_untouched(card.replace("Load it", "Load"))
    assert not is_untouched(card + "mine")
