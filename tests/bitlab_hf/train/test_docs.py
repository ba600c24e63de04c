"""Runs the code of docs/recipes.md and docs/training.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from bitcore import BitQuantConfig
from bitcore.estimators import ESTIMATORS
from bitlab_hf import BitLabConfig
from bitlab_hf.model.tree import quantized_layers
from bitlayers import BitLinear
from tests.bitlab_hf.models import VOCABULARY, make_float_model, training_data
from tests.bitlab_hf.train.test_trainer import arguments

DOCS = Path(__file__).parents[3] / "docs"


def blocks(name: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text(), re.MULTILINE | re.DOTALL)


def test_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_float_model("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=BitLabConfig())
    names = {"model": model, "path": path, "data": training_data(), "args": arguments(tmp_path)}
    trainer, stored, estimator, warmup, calibration = blocks("recipes.md")
    exec(compile(trainer, "docs/recipes.md, trainer", "exec"), names)
    assert names["trainer"].state.global_step == 4  # type: ignore[attr-defined]
    monkeypatch.chdir(tmp_path)
    exec(compile(stored, "docs/recipes.md, stored logits", "exec"), names)
    assert names["trainer"].state.global_step == 4  # type: ignore[attr-defined]
    exec(compile(warmup, "docs/recipes.md, warm-up", "exec"), names)
    assert names["trainer"].state.global_step == 4  # type: ignore[attr-defined]
    names["samples"] = training_data()
    exec(compile(calibration, "docs/recipes.md, calibration", "exec"), names)
    assert names["report"].samples == 32  # type: ignore[attr-defined]
    assert model.model.layers[0].mlp.up_proj.is_deployed
    try:
        exec(compile(estimator, "docs/recipes.md, estimator", "exec"), names)
        layer = BitLinear(64, 8, quant_config=BitQuantConfig(weight_quantizer="median"))
        median = layer.weight.detach().abs().flatten().median().view(1)
        assert torch.equal(layer.eval().qweight_scale, median)
    finally:
        ESTIMATORS.pop("median", None)


def test_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="w1", pad_token="w2", unk_token="w0"
    )
    rows = [{"text": " ".join(f"w{7 * i % 90 + j}" for j in range(9))} for i in range(16)]
    names: dict[str, Any] = {
        "path": make_float_model("llama", tmp_path), "data": training_data(),
        "texts": Dataset.from_list(rows), "tokenizer": tokenizer,
    }  # fmt: skip
    plain, sft, lora, sharded = blocks("training.md")
    exec(compile(plain, "docs/training.md, Trainer", "exec"), names)
    assert (tmp_path / "packed" / "model.safetensors").is_file()
    names["model"] = AutoModelForCausalLM.from_pretrained(
        names["path"], quantization_config=BitLabConfig()
    )
    exec(compile(sft, "docs/training.md, TRL", "exec"), names)
    assert names["trainer"].state.global_step == 2
    exec(compile(lora, "docs/training.md, PEFT", "exec"), names)
    assert all(found.module.is_deployed for found in quantized_layers(names["packed"]))
    assert names["merge_and_requantize"](names["adapted"])
    exec(compile(sharded, "docs/training.md, FSDP2", "exec"), names)
    assert names["args"].fsdp_config["version"] == 2
