"""What stays of the checkpoint that a folder held before another was saved into it."""

from __future__ import annotations

import json
import os
import socket
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from bitcore.errors import ArgumentError
from bitlab_hf import BitLabConfig, Facts, record_facts, save
from bitlab_hf.checkpoint.previous import weights_of
from tests.bitlab_hf.models import logits_of, make_float_model

MEASURED = Facts(perplexities={"held out": 9.5})


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return deployed(tmp_path, "llama")


@pytest.fixture
def target(model: Any, tmp_path: Path) -> Path:
    """A saved model with a figure that was measured on it."""
    save(model, tmp_path / "target")
    record_facts(tmp_path / "target", MEASURED)
    return tmp_path / "target"


def deployed(folder: Path, name: str) -> Any:
    source = make_float_model(name, folder)
    return AutoModelForCausalLM.from_pretrained(
        source, quantization_config=BitLabConfig(mode="infer")
    )


def changed(model: Any) -> Any:
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    return model


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text()


@pytest.mark.parametrize("what", ["weights", "configuration", "architecture", "state"])
def test_what_was_measured_goes_with_its_model(
    model: Any, target: Path, tmp_path: Path, what: str
) -> None:
    if what == "architecture":
        model = deployed(tmp_path, "qwen2")
    elif what == "configuration":
        model.config.rms_norm_eps = 0.5
    elif what == "weights":
        changed(model)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "float-llama-torch.float32", quantization_config=BitLabConfig()
        )
    save(model, target)
    assert not (target / "bitlab_facts.json").exists()
    if what == "state":
        assert not (target / "README.md").exists()
    else:
        assert "9.5" not in card_of(target)
        assert type(model).__name__ in card_of(target)


def test_the_same_model_keeps_it(model: Any, target: Path) -> None:
    save(model, target, max_shard_size="60KB")
    assert Facts.load(target) == MEASURED
    assert "| held out | 9.500 |" in card_of(target)
    save(model, target, facts=Facts(data="notes"))
    assert Facts.load(target) == Facts(data="notes")
    assert "9.5" not in card_of(target)
    assert "| data | notes |" in card_of(target)


def test_a_card_that_somebody_edited_stays_without_the_old_figures(
    model: Any, target: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edited = card_of(target).replace("## Load it", "Written by me.\n\n## Load it")
    (target / "README.md").write_text(edited)
    save(model, target)
    assert card_of(target) == edited
    save(changed(model), target, facts=Facts(perplexities={"held out": 3.0}))
    assert "Written by me." in card_of(target)
    assert "9.5" not in card_of(target)
    assert "| held out | 3.000 |" in card_of(target)
    assert "README.md was edited, so it stays" in caplog.text
    (target / "README.md").write_text("mine")
    save(model, target)
    assert card_of(target) == "mine"


def test_an_adapter_does_not_outlive_its_base(model: Any, target: Path) -> None:
    (target / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1}))
    (target / "adapter_model.safetensors").write_bytes(b"")
    save(model, target)
    assert not list(target.glob("adapter*"))
    again = AutoModelForCausalLM.from_pretrained(target)
    assert torch.equal(logits_of(again), logits_of(model))


def test_the_base_of_an_adapter_keeps_what_was_recorded(model: Any, target: Path) -> None:
    held = {entry.name: entry.read_bytes() for entry in target.iterdir()}
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    save(model, target)
    with pytest.raises(ArgumentError, match="facts must be left out of an adapter"):
        save(model, target, facts=MEASURED)
    now = {entry.name: entry.read_bytes() for entry in target.iterdir()}
    assert now.keys() - held.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert {name: now[name] for name in held} == held
    save(model, target.parent / "alone")
    assert not (target.parent / "alone" / "README.md").exists()


def test_a_new_tokenizer_takes_the_place_of_the_old_one(model: Any, target: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer_config.json").write_text("{}")

    old = ("tokenizer.json", "chat_template.jinja", "vocab.json", "merges.txt")
    for name in (*old, "notes.txt"):
        (target / name).write_text("{}")
    save(model, target)
    assert {*old, "notes.txt"} <= {entry.name for entry in target.iterdir()}
    save(model, target, tokenizer=Tokenizer())
    names = {entry.name for entry in target.iterdir()}
    assert not names.intersection(old)
    assert {"tokenizer_config.json", "notes.txt"} <= names


def test_weights_of() -> None:
    for name, expected in {
        "model.safetensors": (False, ""),
        "pytorch_model-00001-of-00002.bin": (False, ""),
        "model.safetensors.index.json": (False, ""),
        "model.fp16.safetensors": (False, "fp16"),
        "model.fp16-00001-of-00003.safetensors": (False, "fp16"),
        "model.safetensors.index.fp16.json": (False, "fp16"),
        "adapter_model.safetensors": (True, ""),
        "config.json": None,
        "model.txt": None,
        "my_model.safetensors": None,
    }.items():
        assert weights_of(name) == expected, name


def test_another_variant_stays(model: Any, target: Path) -> None:
    save(changed(model), target, variant="mine")
    names = {entry.name for entry in target.iterdir()}
    assert {"model.safetensors", "model.mine.safetensors"} <= names
    save(model, target, variant="mine", max_shard_size="60KB")
    assert "model.mine.safetensors" not in {entry.name for entry in target.iterdir()}
    save(model, target)
    assert (target / "model.safetensors.index.mine.json").exists()


def test_pipes_and_sockets_are_taken_over_and_wait_for_nobody(
    model: Any, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (target / "below").mkdir()
    os.mkfifo(target / "below" / "pipe")
    monkeypatch.chdir(target)
    with socket.socket(socket.AF_UNIX) as heard:
        heard.bind("socket")
    monkeypatch.undo()
    (target / "circle").symlink_to("circle")
    save(model, target)
    assert (target / "below" / "pipe").is_fifo()
    assert (target / "socket").is_socket()
    assert (target / "circle").is_symlink()


def test_owner_and_mode_stay(model: Any, target: Path) -> None:
    (target / "below").mkdir()
    modes = {target: 0o2700, target / "config.json": 0o640, target / "below": 0o750}
    for path, mode in modes.items():
        if os.geteuid() == 0:
            os.chown(path, 1234, 2345)
        path.chmod(mode)
    before = {path: path.stat() for path in modes}
    assert stat.S_IMODE(before[target].st_mode) == 0o2700
    save(changed(model), target)
    for path, held in before.items():
        now = path.stat()
        assert (now.st_mode, now.st_uid, now.st_gid) == (held.st_mode, held.st_uid, held.st_gid)
    assert (target / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask(target.parent)


def umask(folder: Path) -> int:
    (folder / "probe").mkdir()
    return ~(folder / "probe").stat().st_mode & 0o777
