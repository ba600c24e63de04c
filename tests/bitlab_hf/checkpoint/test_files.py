"""What a model's folder says of itself: an index that leads out of it, a scheme nobody knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from bitcore.errors import CheckpointError
from bitlab_hf import BitLabConfig, load_bitnet, save
from bitlab_hf.checkpoint.files import own_safetensors
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
