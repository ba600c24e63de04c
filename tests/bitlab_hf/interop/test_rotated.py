"""Checkpoints whose weights are rotated are refused: without the rotation they would run wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitcore.errors import CheckpointError, ConfigError
from bitlab_hf import convert_ternary, import_compressed_tensors, load_gguf
from bitlab_hf.interop.rotated import check_not_rotated
from tests.bitlab_hf.interop import test_compressed, test_gguf, test_ternary


def described(folder: Path, **fields: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


@pytest.mark.parametrize(
    "fields",
    [
        {"rotation": {"kind": "random", "seed": 0}},
        {"online_hadamard": True},
        {"extra": {"spinquant_matrices": ["R1"]}},
    ],
)
def test_a_configuration_that_says_so(fields: dict[str, Any], tmp_path: Path) -> None:
    source = described(test_ternary.build(tmp_path / "source", "per_tensor"), **fields)
    with pytest.raises(ConfigError, match="do not rotate their inputs"):
        convert_ternary(source, tmp_path / "out")
    compressed = described(test_compressed.folder_of(tmp_path), **fields)
    with pytest.raises(ConfigError, match="do not rotate their inputs"):
        import_compressed_tensors(compressed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_words_that_say_nothing() -> None:
    fields = {"rotary_dim": 64, "hadamard": False, "rotation": None, "rotation_config": {}}
    check_not_rotated("test", {**fields, "text_config": fields})


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.rotation", "model.R1", "model.layers.1.smooth.weight"]
)
def test_a_tensor_that_the_model_has_no_place_for(name: str, tmp_path: Path) -> None:
    source = test_ternary.build(tmp_path / "source", "per_tensor")
    tensors = load_file(source / "model.safetensors")
    left_over = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file({**tensors, **left_over}, source / "model.safetensors", {"format": "pt"})
    convert_ternary(source, tmp_path / "fine")
    save_file({**tensors, name: torch.eye(8)}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"got '{name}'"):
        convert_ternary(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_gguf_file(tmp_path: Path) -> None:
    import gguf
    from transformers import AutoTokenizer

    from bitlab_hf import export_gguf

    tokenizer = AutoTokenizer.from_pretrained(test_gguf.DEMO)
    add = gguf.GGUFWriter.add_vocab_size

    def with_rotation(writer: Any, size: int) -> None:
        add(writer, size)
        writer.add_string("llama.rotation.kind", "hadamard")

    with pytest.MonkeyPatch.context() as other:
        other.setattr(gguf.GGUFWriter, "add_vocab_size", with_rotation)
        export_gguf(test_gguf.build("llama"), tmp_path / "model.gguf", tokenizer=tokenizer)
    with pytest.raises(ConfigError, match=r"llama\.rotation\.kind must be empty"):
        load_gguf(tmp_path / "model.gguf")
