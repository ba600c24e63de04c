"""Damaged files of experts that are kept in a way of their own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitcore.errors import CheckpointError, NonFiniteError
from bitlab_hf import BitLabConfig, deploy, save
from tests.bitlab_hf.sweep.experts import build
from tests.bitlab_hf.sweep.models import model_class

# A tensor of experts of each, as the model calls it.
TENSORS = {
    "dbrx": "transformer.blocks.1.ffn.experts.mlp.w2",
    "jetmoe": "model.layers.1.self_attention.experts.input_linear.weight",
    "inkling_text": "model.layers.1.mlp.shared_experts.up_proj",
    "llama4_text": "model.layers.1.feed_forward.experts.gate_up_proj",
    "longcat_flash": "model.layers.1.mlp.experts.gate_up_proj",
}
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forms")
    for name in TENSORS:
        build(name).save_pretrained(folder / name / "float")
        latent = load(name, folder / name / "float", quantization_config=BitLabConfig())
        save(deploy(latent), folder / name / "packed")
    return folder


def load(name: str, folder: Path, **fields: Any) -> Any:
    return model_class(name).from_pretrained(folder, **fields)


def damaged(source: Path, target: Path, change: Callable[[Tensors], Any]) -> Path:
    shutil.copytree(source, target)
    file = target / "model.safetensors"
    with safe_open(file, framework="pt") as held:
        metadata = held.metadata()
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata)
    return target


def _invalid_code(key: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors[f"{key}_qweight"][0, 1, 2].fill_(3)


def _missing(key: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(f"{key}_qweight")


def _fewer_experts(key: str) -> Callable[[Tensors], Any]:
    name = f"{key}_qweight_scale"
    return lambda tensors: tensors.update({name: tensors[name][:, 1:].contiguous()})


def _bad_scale(key: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors[f"{key}_qweight_scale"][0, 1].fill_(float("nan"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_invalid_code, r"_qweight of expert 0 must hold the codes 0, 1 and 2"),
        (_missing, r"_qweight must be in the checkpoint, got none"),
        (_fewer_experts, r"_qweight_scale must be float32 \[\d+, \d+\]"),
        (_bad_scale, r"_qweight_scale of expert 0 must be finite and positive"),
    ],
    ids=["code", "missing", "shape", "scale"],
)
@pytest.mark.parametrize("name", TENSORS)
def test_packed_files(sources: Path, name: str, change: Any, message: str, tmp_path: Path) -> None:
    key = TENSORS[name]
    folder = damaged(sources / name / "packed", tmp_path / "bad", change(key))
    with pytest.raises(CheckpointError, match=key.replace(".", r"\.") + message):
        load(name, folder)


@pytest.mark.parametrize("name", ["dbrx", "jetmoe", "inkling_text", "llama4_text"])
def test_float_files(sources: Path, name: str, tmp_path: Path) -> None:
    key, infer = TENSORS[name], BitLabConfig(mode="infer")
    source = sources / name / "float"
    if key not in load_file(source / "model.safetensors"):
        pytest.fail(f"{key} must be a tensor of the file")
    bad = damaged(
        source, tmp_path / "infinite", lambda held: held[key].flatten()[-1:].fill_(torch.inf)
    )
    with pytest.raises(NonFiniteError, match=rf"{key} of expert \d+ must be finite"):
        load(name, bad, quantization_config=infer)
    bad = damaged(source, tmp_path / "missing", lambda held: held.pop(key))
    with pytest.raises(CheckpointError, match=rf"{key} must be in the checkpoint, got none"):
        load(name, bad, quantization_config=infer)
