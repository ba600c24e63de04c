"""What is not ternary trains in float32, and is written in the file's own dtype."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitlab_hf import BitLabConfig, deploy, pretrained_config, save
from bitlab_hf.model.tree import quantized_layers
from bitlab_hf.train import BitLabTrainer
from bitlab_hf.train.floats import computes_in_bf16, round_floats, teacher_dtype, training_dtype
from tests.bitlab_hf.models import make_float_model, training_data
from tests.bitlab_hf.train.test_trainer import arguments


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose file is in bfloat16, as those of real ones are."""
    folder = tmp_path_factory.mktemp("floats")
    model = AutoModelForCausalLM.from_pretrained(make_float_model("llama", folder / "float32"))
    model.to(torch.bfloat16).save_pretrained(folder / "bfloat16")
    return folder / "bfloat16"


def test_dtypes_to_train_in(monkeypatch: pytest.MonkeyPatch) -> None:
    assert training_dtype() == training_dtype(BitLabConfig()) == torch.float32
    assert training_dtype(BitLabConfig(latent_dtype="keep")) == "auto"
    assert teacher_dtype("cpu") == torch.float32
    assert teacher_dtype("cuda") == "auto"
    for has in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, has=has, **__: has)
        assert computes_in_bf16("cuda", None) is has
        assert not computes_in_bf16("cpu", None)
        for device in ("cuda", "cpu"):
            assert computes_in_bf16(device, True)
            assert not computes_in_bf16(device, False)


@pytest.mark.parametrize("deployed", [False, True])
def test_floats_are_rounded_and_ternary_weights_are_not(source: Path, deployed: bool) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=pretrained_config(source), dtype=torch.float32
    )
    model = deploy(model) if deployed else model
    held = {name: value.clone() for name, value in model.state_dict().items()}
    round_floats(model, None)
    assert all(value.dtype == held[name].dtype for name, value in model.state_dict().items())
    round_floats(model, torch.bfloat16)
    own = tuple(name for one in quantized_layers(model) for name in one.names)
    for name, value in model.state_dict().items():
        if name.startswith(own):
            assert torch.equal(value, held[name])
        else:
            assert value.dtype == torch.bfloat16


@pytest.mark.parametrize("head", ["int8", "ternary", "keep"])
def test_it_computes_as_it_will_from_its_file(source: Path, tmp_path: Path, head: str) -> None:
    """An embedding of codes knows the dtype of the floats that it gives."""
    config = pretrained_config(source)
    config.head = head
    model: Any = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, dtype=torch.float32
    )
    round_floats(deploy(model), torch.bfloat16)
    save(model, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = training_data()[0]["input_ids"][None]
    with torch.no_grad():
        found, wanted = (one.eval()(input_ids=ids).logits for one in (model, again))
    assert found.dtype == wanted.dtype == torch.bfloat16
    assert torch.equal(found, wanted)
    assert [one.module.float_dtype for one in quantized_layers(model)] == [
        one.module.float_dtype for one in quantized_layers(again)
    ]


def test_what_an_architecture_keeps_in_float32_is_not_rounded(source: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model._keep_in_fp32_modules, model._keep_in_fp32_modules_strict = (
        {"lm_head"},
        {"layers.*layernorm"},
    )
    for dtype, kept in ((torch.bfloat16, "layernorm"), (torch.float16, "lm_head|layernorm")):
        model.float()
        round_floats(model, dtype)
        for name, value in model.state_dict().items():
            assert (value.dtype == torch.float32) == bool(re.search(kept, name)), name


def test_a_teacher_by_its_path_is_loaded_in_float32(source: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(source, quantization_config=BitLabConfig())
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    trainer = BitLabTrainer(
        model=model, args=arguments(tmp_path), train_dataset=training_data(), recipe="distill",
        teacher=source,
    )  # fmt: skip
    assert {one.dtype for one in trainer._teacher.parameters()} == {torch.float32}
