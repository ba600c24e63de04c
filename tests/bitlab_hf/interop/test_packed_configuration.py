"""What is said of embeddings, and of heads that are tied to them, in ternary float checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from bitcore.errors import CheckpointError
from bitlab_hf import convert_ternary
from bitlayers import BitLinear
from tests.bitlab_hf.interop.stock import SIZES
from tests.bitlab_hf.interop.test_ternary import assert_same_model, build, change, ternary

EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_that_is_not_ternary_stays(tied: bool, tmp_path: Path) -> None:
    source = build(tmp_path / "source", "per_tensor", tied=tied)
    change(source, EMBEDDING, 3, 5, 0.5)
    report = convert_ternary(source, tmp_path / "out")
    assert len(report.packed) == 14
    assert "neither 0 nor" in report.kept[EMBEDDING]
    packed = assert_same_model(source, tmp_path / "out")
    assert not isinstance(packed.lm_head, BitLinear)
    scheme = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert (scheme["format_version"], scheme["head"]) == (1, "keep")
    assert "embedding" not in scheme


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_of_another_scheme(tied: bool, tmp_path: Path) -> None:
    """A head that is tied to it has its scheme, too."""
    source = build(tmp_path / "source", "per_tensor", tied=tied)
    tensors = load_file(source / "model.safetensors")
    tensors[EMBEDDING] = ternary((97, 64), "per_channel")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    report = convert_ternary(source, tmp_path / "out")
    assert report.packed["model.embed_tokens"] == "per channel"
    scheme = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert scheme["weight_granularity"] == "per_tensor"
    own = {"weight_granularity": "per_channel", "group_size": None}
    names = ["lm_head", "model.embed_tokens"] if tied else ["model.embed_tokens"]
    assert scheme["overrides"] == dict.fromkeys(names, own)
    assert_same_model(source, tmp_path / "out")


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_embedding_that_is_stored_twice(same: bool, tmp_path: Path) -> None:
    source = build(tmp_path / "source", "per_tensor", tied=True)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors[EMBEDDING] if same else -tensors[EMBEDDING]
    shards = {
        "a.safetensors": ["lm_head.weight"],
        "b.safetensors": [*tensors.keys() - {"lm_head.weight"}],
    }
    for file, keys in shards.items():
        save_file({key: tensors[key].clone() for key in keys}, source / file, {"format": "pt"})
    (source / "model.safetensors").unlink()
    weight_map = {key: file for file, keys in shards.items() for key in keys}
    index = {"metadata": {}, "weight_map": weight_map}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    report = convert_ternary(source, tmp_path / "out")
    assert ("model.embed_tokens" in report.packed) == same
    if same:
        assert not report.kept
        packed = assert_same_model(source, tmp_path / "out")
        assert packed.lm_head.qweight is packed.model.embed_tokens.qweight
    else:
        held = "no linear layer or input embedding that can be packed"
        assert held in report.kept[EMBEDDING]
        assert held in report.kept["lm_head.weight"]


def test_an_embedding_alone_makes_no_ternary_model(tmp_path: Path) -> None:
    source = tmp_path / "source"
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.model.embed_tokens.weight.data = ternary((97, 64), "per_tensor", torch.float32)
    model.save_pretrained(source)
    with pytest.raises(CheckpointError, match="at least one linear layer"):
        convert_ternary(source, tmp_path / "out", keep_inexact=True)
