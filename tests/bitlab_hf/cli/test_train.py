"""``bitlab train``: from text to a latent model that ``deploy`` packs; resuming; bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from bitcore.errors import ArgumentError, CheckpointError, ConfigError
from bitlab_hf import BitLabConfig
from bitlab_hf.train import RECIPES, BitLabTrainer, Recipe

Cli = Callable[..., Any]


def config_dtype(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text())["dtype"])


def embedding(folder: Path) -> torch.Tensor:
    return load_file(folder / "model.safetensors")["model.embed_tokens.weight"]


def test_train_resume_deploy(cli: Cli, states: dict[str, Path], tmp_path: Path) -> None:
    book, recipe = tmp_path / "book.txt", tmp_path / "recipe.json"
    book.write_text("def main():\n    for item in range(10):\n        print(item)\n" * 20)
    recipe.write_text(json.dumps({"logits_weight": 1.0, "quant_warmup": 2}))
    options = ["--text", book, "--recipe", recipe, "--length", 16, "--batch", 2, "--threads", 1,
               "--save-every", 2, "--json"]  # fmt: skip
    out = tmp_path / "latent"
    done = cli("train", states["float"], out, *options, "--steps", 3)
    assert done.code == 0, done.error
    assert done.json["steps"] == 3
    assert 0 < done.json["loss"] < 10
    # Nobody has asked for it; it is said before and after.
    assert done.json["scales"] == "per group of 128 (7-bit multipliers of a row's)"
    does = "learns from labels and the teacher's next tokens, rates 0.0002, scales 0.0002, norms"
    assert f"scales of the weights: {done.json['scales']}; {does}" in " ".join(done.err.split())
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["weight_granularity"], config["group_size"]) == ("per_group", 128)
    assert (config["group_scale_dtype"], config["format_version"]) == ("uint8", 2)
    # Small updates vanish in bfloat16, in which the float model is, and is written.
    assert config_dtype(states["float"]) == config_dtype(out) == "bfloat16"
    assert (embedding(out).dtype, embedding(out / "run" / "checkpoint-2").dtype) == (
        torch.bfloat16,
        torch.float32,
    )
    optimizer = torch.load(out / "run" / "checkpoint-2" / "optimizer.pt")
    assert {one["betas"] for one in optimizer["param_groups"]} == {(0.9, 0.95)}
    assert Recipe.load(out / "run" / "checkpoint-2") == Recipe(logits_weight=1.0, quant_warmup=2)
    done = cli("train", states["float"], out, *options, "--steps", 4, "--resume")
    assert done.code == 0, done.error
    assert done.json["steps"] == 4
    done = cli("deploy", out, tmp_path / "deployed", "--json")
    assert done.code == 0, done.error
    assert done.json["bytes_after"] < done.json["bytes_before"]
    card = (tmp_path / "deployed" / "README.md").read_text()
    assert "| recipe | recipe.json |" in card
    assert "| data | book.txt |" in card
    with pytest.raises(CheckpointError, match="recipe must be the one of"):
        raise cli("train", states["float"], out, *options[:2], *options[4:], "--resume").error
    other = tmp_path / "other.txt"
    other.write_text(book.read_text() + "pass\n" * 20)
    for more, names in (
        (("--learning-rate", 1e-6), "learning_rate 0.0002, got learning_rate 1e-06"),
        (("--text", other), "text '\\(.*got text '\\("),
        (("--teacher", "none"), "teacher 'model', got teacher 'none'"),
    ):
        with pytest.raises(ArgumentError, match=f"train: a run that goes on must .*{names}"):
            raise cli("train", states["float"], out, *options, "--resume", *more).error


def test_a_teacher_that_learns_first(cli: Cli, states: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "latent"
    options = ("--text", __file__, "--length", 16, "--batch", 2, "--steps", 3, "--threads", 1)
    done = cli("train", states["float"], out, *options, "--recipe", "teach", "--json")
    assert done.code == 0, done.error
    assert done.json["steps"] == 3
    assert "the teacher learns first, for 1 times the steps" in " ".join(done.err.split())
    assert (out / "run" / "teacher" / "model" / "config.json").is_file()
    assert Recipe.load(out / "run" / "checkpoint-3") == RECIPES["teach"]


def test_a_resume_of_nothing_leaves_nothing(
    cli: Cli, states: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "old").mkdir()
    for out in (tmp_path / "new/latent", tmp_path / "old"):
        done = cli("train", states["float"], out, "--text", __file__, "--length", 16, "--resume")
        assert isinstance(done.error, CheckpointError)
        assert "must hold a checkpoint to resume" in str(done.error)
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")] == ["old"]


def test_bad_input(cli: Cli, states: dict[str, Path], tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("too short")
    given = ["train", states["float"], tmp_path / "out"]
    assert cli(*given).code == 2
    for more, kind, message in (
        (("--text", book), ArgumentError, "smaller --length"),
        (("--text", book, "--recipe", "nonsense"), ArgumentError, "recipe must be"),
        (("--text", book, "--recipe", tmp_path / "none.json"), ArgumentError, "--recipe must be"),
    ):
        done = cli(*given, *more)
        assert done.code == 1
        assert isinstance(done.error, kind)
        assert message in str(done.error)
    (tmp_path / "bad.json").write_text('{"temperature": 0}')
    with pytest.raises(ConfigError, match="temperature"):
        raise cli(*given, "--text", book, "--recipe", tmp_path / "bad.json").error
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def other_words(states: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float model with a vocabulary of the same size, of which two tokens are exchanged."""
    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(states["float"], folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    # Of one letter, so that all merges stay possible.
    words["a"], words["b"] = words["b"], words["a"]
    file.write_text(json.dumps(content))
    return folder


def test_a_teacher_of_another_vocabulary(
    cli: Cli, states: dict[str, Path], other_words: Path, tmp_path: Path
) -> None:
    given = ["train", states["float"], tmp_path / "out", "--text", __file__, "--length", 16]
    done = cli(*given, "--steps", 1, "--teacher", other_words, "--recipe", "distill")
    assert isinstance(done.error, ArgumentError)
    assert "train: --teacher must have the model's vocabulary, where token" in str(done.error)
    assert "is 'a', got 'b'" in str(done.error) or "is 'b', got 'a'" in str(done.error)
    assert not (tmp_path / "out").exists()
    # Without a term from it nothing is compared.
    assert cli(*given, "--steps", 1, "--teacher", other_words, "--recipe", "plain").code == 0


@pytest.mark.parametrize("teacher", ["whole", "without", "damaged", "made up", "special"])
def test_a_trainer_s_tokenizer_is_compared(
    states: dict[str, Path], other_words: Path, tmp_path: Path, teacher: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """With that of the teacher's folder, where it can be read as it is; else it says so."""
    tokenizer = AutoTokenizer.from_pretrained(states["float"])
    model = AutoModelForCausalLM.from_pretrained(
        states["float"], quantization_config=BitLabConfig()
    )
    options: dict[str, Any] = {
        "model": model, "args": TrainingArguments(str(tmp_path / "run"), report_to="none"),
        "recipe": "distill", "processing_class": tokenizer,
    }  # fmt: skip
    BitLabTrainer(**options, teacher=states["float"])
    if teacher == "whole":
        with pytest.raises(ArgumentError, match="teacher must have the model's vocabulary, where"):
            BitLabTrainer(**options, teacher=other_words)
        return
    folder = tmp_path / "other"
    shutil.copytree(other_words, folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    if teacher == "special":
        # The first reserved token has another name there, and the words are the model's.
        words = content["model"]["vocab"]
        words["a"], words["b"] = words["b"], words["a"]
        (first, *_) = content["added_tokens"]
        words[f"{first['content']}2"] = words.pop(first["content"])
        first["content"] += "2"
        (folder / "special_tokens_map.json").unlink(missing_ok=True)
        (folder / "tokenizer_config.json").write_text(
            '{"tokenizer_class": "PreTrainedTokenizerFast"}'
        )
        file.write_text(json.dumps(content))
    elif teacher == "damaged":
        file.write_text("{}")
    else:
        for one in folder.glob("tokenizer*"):
            one.unlink()
    if teacher == "made up":
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    BitLabTrainer(**options, teacher=folder)
