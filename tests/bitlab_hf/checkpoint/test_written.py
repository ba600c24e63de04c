"""What `save` does with what it has written, before it takes another checkpoint's place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitcore.errors import CheckpointError
from bitlab_hf import BitLabConfig, deploy, save
from bitlab_hf.checkpoint.aligned import ALIGNMENT, align_file, realign
from tests.bitlab_hf.models import logits_of, make_float_model


def starts(file: Path) -> dict[str, int]:
    with file.open("rb") as source:
        length = int.from_bytes(source.read(8), "little")
        header = json.loads(source.read(length))
    return {
        name: 8 + length + entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    }


@pytest.fixture
def model(tmp_path: Path) -> Any:
    source = make_float_model("llama", tmp_path)
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=BitLabConfig()).eval()


@pytest.mark.parametrize("shard", ["5GB", "40KB"])
def test_tensors_of_a_saved_model_are_aligned(model: Any, shard: str, tmp_path: Path) -> None:
    save(deploy(model), tmp_path / "packed", max_shard_size=shard)
    files = list((tmp_path / "packed").glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "40KB")
    state = model.state_dict()
    checked = 0
    for file in files:
        for name, start in starts(file).items():
            if name in state and state[name].nbytes % ALIGNMENT == 0:
                assert start % ALIGNMENT == 0, name
                checked += 1
    assert checked > 15
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits_of(again), logits_of(model))
    for name, tensor in again.state_dict().items():
        if tensor.is_floating_point() and not name.endswith("qweight_scale"):
            assert tensor.data_ptr() % ALIGNMENT == 0, name


def test_a_file_is_the_same_but_for_its_order(tmp_path: Path) -> None:
    torch.manual_seed(3)
    tensors = {
        "a.scale": torch.randn(1),
        "b": torch.randn(33, 64),
        "c": torch.randn(5).to(torch.bfloat16),
        "d": torch.randn(64, 16).to(torch.bfloat16),
        "e": torch.arange(7, dtype=torch.uint8),
        "f": torch.empty(0, dtype=torch.uint8),
        "g": torch.randn(3, dtype=torch.float64),
        "h": torch.tensor(2.5),
    }
    file = tmp_path / "x.safetensors"
    save_file(tensors, file, {"format": "pt", "note": "ünïcode"})
    file.chmod(0o640)
    align_file(file)
    found = load_file(file)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    places = starts(file)
    assert all(places[name] % ALIGNMENT == 0 for name in ("b", "d"))
    for name, tensor in tensors.items():
        assert places[name] % tensor.element_size() == 0
    assert file.stat().st_mode & 0o777 == 0o640
    before = file.stat().st_mtime_ns
    align_file(file)
    assert file.stat().st_mtime_ns == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_mapped_tensor_that_is_not_aligned_is_copied() -> None:
    memory = torch.zeros(4 * 65 + 64, dtype=torch.uint8)
    shift = -memory.data_ptr() % ALIGNMENT + 4
    module = torch.nn.Linear(8, 8)
    held = memory[shift : shift + 4 * 64].view(torch.float32).view(8, 8)
    held.copy_(torch.randn(8, 8))
    expected = held.clone()
    module.weight.data = held
    realign(module)
    assert module.weight.data_ptr() % ALIGNMENT == 0
    assert torch.equal(module.weight, expected)


# Fused and renamed tensors have other shapes in the files of float models: there a loss counts.
@pytest.mark.parametrize(
    ("deployed", "damage"),
    [(True, "lost"), (True, "misshapen"), (True, "cast"), (False, "lost")],
)
def test_a_checkpoint_that_could_not_be_loaded_replaces_nothing(
    model: Any, deployed: bool, damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    save(model, folder)
    good = (folder / "model.safetensors").read_bytes()
    if deployed:
        deploy(model)
    name = "model.layers.1.mlp.down_proj." + ("qweight" if deployed else "weight")
    write = model.save_pretrained

    def damaged(path: Path, **kwargs: Any) -> None:
        write(path, **kwargs)
        file = Path(path) / "model.safetensors"
        tensors = load_file(file)
        with_metadata = _metadata(file)
        if damage == "lost":
            del tensors[name]
        elif damage == "misshapen":
            tensors[name] = torch.cat([tensors[name]] * 3)
        else:
            tensors[name] = tensors[name].to(torch.int16)
        save_file(tensors, file, with_metadata)

    monkeypatch.setattr(model, "save_pretrained", damaged)
    with pytest.raises(CheckpointError, match=r"save: model\.layers\.1\.mlp\.down_proj"):
        save(model, folder)
    assert (folder / "model.safetensors").read_bytes() == good
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def _metadata(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as handle:
        return dict(handle.metadata())


def test_a_variant(model: Any, tmp_path: Path) -> None:
    expected = logits_of(model)
    save(deploy(model), tmp_path / "packed", variant="ternary")
    assert (tmp_path / "packed" / "model.ternary.safetensors").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", variant="ternary")
    assert torch.equal(logits_of(again), expected)
