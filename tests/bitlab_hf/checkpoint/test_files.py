"""What a model's folder says of itself: an index that leads out of it, a scheme nobody knows."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from bitcore.errors import CheckpointError, ConfigError
from bitlab_hf import BitLabConfig, Facts, load_bitnet, save
from bitlab_hf.checkpoint.files import (
    FACTS_FILE,
    INDEX,
    companions,
    own_safetensors,
    read_config,
    scheme_of,
    shard_keys,
    weight_files,
)
from bitlab_hf.train.recipe import RECIPE_FILE
from tests.bitlab_hf.interop.stock import build
from tests.bitlab_hf.models import make_float_model


def lead_out(folder: Path, name: str) -> None:
    """Puts a folder's weights where this name leads to, and an index in their place."""
    weights = folder / "model.safetensors"
    with safe_open(weights, framework="pt") as handle:
        weight_map = dict.fromkeys(handle.keys(), name)
    (folder / name).parent.mkdir(exist_ok=True)
    weights.rename(folder / name)
    content = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


@pytest.mark.parametrize("state", ["latent", "deployed", "float", "bitnet"])
@pytest.mark.parametrize("name", ["../outside.safetensors", "ABSOLUTE", "a/../../b.safetensors"])
def test_weights_outside_of_the_folder(tmp_path: Path, state: str, name: str) -> None:
    source, load, options = tmp_path / state, AutoModelForCausalLM.from_pretrained, {}
    packing = BitLabConfig(mode="infer")
    if state == "bitnet":
        build("llama", source)
        load = load_bitnet
    elif state == "float":
        source = make_float_model("llama", tmp_path)
        options = {"quantization_config": packing}
    else:
        scheme = packing if state == "deployed" else BitLabConfig()
        model = load(make_float_model("llama", tmp_path), quantization_config=scheme)
        save(model, source)
    if name.startswith("a/"):
        (source / "a").mkdir()
    elsewhere = str(tmp_path / "c.safetensors") if name == "ABSOLUTE" else name
    lead_out(source, elsewhere)
    with pytest.raises(CheckpointError, match="must name files of its own folder, got"):
        load(source, **options)


def test_weights_inside_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source: Any = AutoModelForCausalLM.from_pretrained(
        make_float_model("llama", tmp_path), quantization_config=BitLabConfig(mode="infer")
    )
    save(source, tmp_path / "model", max_shard_size="60KB")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for folder in (tmp_path / "model", "../model", "../model/", "./../model"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert own_safetensors("me/model", ["/cache/blobs/1.safetensors"]) is not None
    assert own_safetensors("me/model", ["/cache/pytorch_model.bin"]) is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"quant_method": "bitlab"}, "latent"),
        ({"quant_method": "bitlab", "weight_format": "packed"}, "packed"),
        ({"quant_method": "bitnet"}, "packed"),
        ({"quant_method": "bitnet", "linear_class": "autobitlinear"}, "packed"),
        ({"quant_method": "bitnet", "quantization_mode": "online"}, "packed"),
        (
            {
                "quant_method": "bitnet",
                "linear_class": "autobitlinear",
                "quantization_mode": "online",
            },
            "latent",
        ),
    ],
)
def test_every_scheme_says_its_format(fields: dict[str, Any], expected: str) -> None:
    assert scheme_of(fields, "here") == {**fields, "weight_format": expected}


@pytest.mark.parametrize("held", ["bitlab", 3, [], ["bitlab"], {}, {"quant_method": []}, False])
def test_what_is_no_scheme(held: Any) -> None:
    with pytest.raises(ConfigError, match="^here: quant_method must be 'bitlab' or 'bitnet'"):
        scheme_of(held, "here")
    assert scheme_of(None, "here") is None


DEEP = "[" * 100_000


@pytest.mark.parametrize("content", [b"{", DEEP.encode(), b'{"a": "\xff"}', b"9" * 5000, b"3", b""])
def test_damaged_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="config.json: the file must hold"):
        read_config(tmp_path)
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(CheckpointError, match="must hold"):
        weight_files(tmp_path, "read")
    (tmp_path / "bitlab_facts.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="must hold"):
        Facts.load(tmp_path)


def test_a_pipe_keeps_nobody_waiting(tmp_path: Path) -> None:
    for name in ("config.json", INDEX, "bitlab_facts.json"):
        os.mkfifo(tmp_path / name)
    for read in (read_config, lambda folder: weight_files(folder, "read"), Facts.load):
        with pytest.raises(CheckpointError, match="must be a plain file, got another kind"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight_map": {"a": "optimizer.pt"}}, "must name safetensors files, got 'optimizer.pt'"),
        ({"weight_map": {"a": 3}}, "must hold a weight_map"),
        ({"weight_map": {}}, "must hold a weight_map"),
        ({"weight_map": None}, "must hold a weight_map"),
        ({"weight_map": {"a": "folder.safetensors"}}, "folder.safetensors must be in the folder"),
    ],
)
def test_what_an_index_may_not_say(tmp_path: Path, content: Any, message: str) -> None:
    (tmp_path / "optimizer.pt").write_bytes(b"")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / INDEX).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        weight_files(tmp_path, "read")


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    files = [tmp_path / f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for number, file in enumerate(files):
        save_file({"same": torch.full((2,), float(number)), f"own.{number}": torch.ones(1)}, file)
    expected = f"same must stand in one file, got it in {files[0].name} and in {files[1].name}"
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        shard_keys(files, "read")
    assert set(shard_keys(files[:1], "read")) == {"same", "own.0"}
    files[0].write_bytes(files[0].read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="the file must be a whole safetensors file"):
        shard_keys(files, "read")


def test_companions(tmp_path: Path) -> None:
    """Only what transformers and BitLab write goes with a model; no link does, wherever it ends."""
    (tmp_path / "secret").write_text("{}")
    tokenizer = {"tokenizer_class": "FSMTTokenizer"}
    wanted = {
        "config.json", "README.md", "tokenizer.json", "LICENSE", "license.txt", FACTS_FILE,
        RECIPE_FILE, "vocab-src.json", "merges.txt",
    }  # fmt: skip
    other = {
        "secrets.json",
        "notes.txt",
        "a.model",
        "b.jinja",
        "optimizer.pt",
        "trainer_state.json",
    }
    for name in (*wanted, *other):
        (tmp_path / name).write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (tmp_path / "generation_config.json").symlink_to("secret")
    (tmp_path / "chat_template.jinja").symlink_to("config.json")
    (tmp_path / "vocab.json").mkdir()
    os.mkfifo(tmp_path / "vocab.txt")
    names = {file.name for file in companions(tmp_path)}
    assert names == {*wanted, "tokenizer_config.json"}
