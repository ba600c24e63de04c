"""Mixtures as compressed-tensors folders: there and back, and read by stock transformers in CI."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitcore.errors import ArgumentError, CheckpointError
from bitlab_hf import (
    BitLabConfig,
    deploy,
    export_compressed_tensors,
    import_compressed_tensors,
    load_compressed_tensors,
    replace_linear,
)
from bitlab_hf.interop.compressed import unpack_words
from bitlab_hf.interop.matrices import expert_matrices
from bitlab_hf.model.experts import expert_modules
from tests.bitlab_hf.experts import MOE
from tests.bitlab_hf.interop.stock import outputs, stock_outputs
from tests.bitlab_hf.interop.test_gguf_architectures import same_experts
from tests.processes import Elsewhere

GROUPS = {"weight_granularity": "per_group", "group_size": 64}
ROWS = {"weight_granularity": "per_channel"}
APART = ["qwen3_moe", "mixtral", "olmoe", "qwen2_moe", "deepseek_v3"]
UP = "model.layers.1.mlp.experts.2.up_proj"


def latent(name: str) -> Any:
    """Two groups of 64 in a row, which are another scheme than a row."""
    config = copy.deepcopy(MOE[name])
    config.update({"hidden_size": 128, "intermediate_size": 256})
    for field in ("moe_intermediate_size", "shared_expert_intermediate_size"):
        if hasattr(config, field):
            setattr(config, field, 128)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def build(name: str, **scheme: Any) -> Any:
    model = latent(name)
    replace_linear(model, BitLabConfig(**scheme))
    return deploy(model)


def folder_of(tmp_path: Path) -> Path:
    export_compressed_tensors(build("qwen3_moe", **GROUPS), tmp_path / "ct")
    return tmp_path / "ct"


@pytest.mark.parametrize("name", APART)
def test_round_trip(name: str, tmp_path: Path) -> None:
    """Each expert apart, under the names of the architecture's files; the way back is exact."""
    # One of deepseek's layers has rows that groups do not divide.
    scheme = ROWS if name == "deepseek_v3" else {**GROUPS, "group_scale_dtype": "float32"}
    model = build(name, **scheme)
    assert export_compressed_tensors(model, tmp_path / "ct") == 0
    stored = load_file(tmp_path / "ct/model.safetensors")
    leaf = {"mixtral": ("w1", "w3", "w2")}.get(name, ("gate_proj", "up_proj", "down_proj"))
    for place, matrices in enumerate(expert_matrices(model)):
        base = f"{matrices.tensor.rpartition('.')[0]}.{{}}.{leaf[place % 3]}"
        for expert, (codes, scale) in enumerate(matrices):
            words = stored[f"{base.format(expert)}.weight_packed"]
            assert torch.equal(unpack_words(words, matrices.in_features), codes)
            found = stored[f"{base.format(expert)}.weight_scale"]
            assert torch.equal(found, scale.view(len(codes), -1))
    again = load_compressed_tensors(tmp_path / "ct", activation_dtype="int8")
    assert expert_modules(again)
    same_experts(model, again)
    close(again, model)


def close(again: Any, model: Any) -> None:
    """What stays float lies elsewhere in a mapped file, and is summed in another order."""
    found, expected = outputs(again)["logits"], outputs(model)["logits"]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_two_levels_and_latent(tmp_path: Path) -> None:
    model = latent("olmoe")
    replace_linear(model, BitLabConfig(**GROUPS))
    export_compressed_tensors(model, tmp_path / "ct")
    deploy(model)
    again = load_compressed_tensors(
        tmp_path / "ct", activation_dtype="int8", group_scale_dtype="uint8"
    )
    same_experts(model, again)


def test_the_names_that_others_write(tmp_path: Path) -> None:
    """Mixtral's files say ``block_sparse_moe`` for what the model calls ``mlp``."""
    model = build("mixtral", **ROWS)
    export_compressed_tensors(model, tmp_path / "ct")
    file = tmp_path / "ct/model.safetensors"
    renamed = {
        key.replace(".mlp.", ".block_sparse_moe."): tensor
        for key, tensor in load_file(file).items()
    }
    save_file(renamed, file, {"format": "pt"})
    same_experts(model, load_compressed_tensors(tmp_path / "ct", activation_dtype="int8"))


def test_float_experts(tmp_path: Path) -> None:
    model = build("qwen3_moe", **GROUPS, experts="keep")
    export_compressed_tensors(model, tmp_path / "ct")
    again = load_compressed_tensors(
        tmp_path / "ct", activation_dtype="int8", group_scale_dtype="uint8"
    )
    assert not expert_modules(again)
    close(again, model)
    for leaf in ("gate_up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.{leaf}"
        assert torch.equal(again.get_parameter(name), model.get_parameter(name))


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("weight_packed", lambda words: words & ~3, r"experts\.2\.up_proj.* must hold codes of -1"),
        ("weight_packed", None, r"experts\.2\.up_proj\.weight must be in the checkpoint, got none"),
        ("weight_scale", None, r"experts\.2\.up_proj\.weight_scale must be in the checkpoint"),
        ("weight_scale", lambda scale: scale[1:], r"must be \[1\], or one row of scales"),
        ("weight_shape", lambda shape: shape.flip(0) * 2, "must be I32 "),
    ],
)
def test_damaged(key: str, change: Any, message: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    held = tensors.pop(f"{UP}.{key}")
    if change is not None:
        tensors[f"{UP}.{key}"] = change(held).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        import_compressed_tensors(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("granitemoe", {}, "of an architecture whose files hold each expert apart, got Granite"),
        ("gpt_oss", {}, "of an architecture whose files hold each expert apart, got GptOss"),
        (
            "olmoe", {"overrides": {"*.down_proj": {"group_size": None, **ROWS}}},
            r"down_proj must have the scales of .*gate_proj, .* got groups of None beside 64",
        ),
    ],
)  # fmt: skip
def test_refused(name: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        export_compressed_tensors(build(name, **GROUPS, **changes), tmp_path / "ct")
    assert not (tmp_path / "ct").exists()


@pytest.mark.ci
@pytest.mark.parametrize("name", APART)
def test_stock_transformers(name: str, stock: Elsewhere, tmp_path: Path) -> None:
    """The real reader, without BitLab: the same float32 weights, and logits bit for bit."""
    model = build(name, **(ROWS if name == "deepseek_v3" else GROUPS))
    export_compressed_tensors(model, tmp_path / "ct")
    groups = json.loads((tmp_path / "ct/config.json").read_text())["quantization_config"]
    assert len(groups["config_groups"]) == 2
    expected = stock_outputs(stock, tmp_path / "ct", tmp_path)
    ours = outputs(model.dequantize())
    assert torch.equal(expected["logits"], ours["logits"])
    assert torch.equal(expected["tokens"], ours["tokens"])
