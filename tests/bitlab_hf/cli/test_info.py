"""``bitlab info``: this machine, and what a checkpoint holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copyfile
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitcore import unpack_ternary
from bitcore.errors import CheckpointError
from bitlab_hf import BitLabConfig, save
from bitlab_hf.model.count import bits_per_weight
from bitlab_hf.model.tree import quantized_layers
from tests.bitlab_hf.models import make_float_model
from tests.bitlab_hf.ternary import make_packed

Cli = Callable[..., Any]
LAYER = "model.layers.1.mlp.up_proj"


def test_machine(cli: Cli) -> None:
    found = cli("info", "--json").json
    chosen = {item["device"]: item["name"] for item in found["backends"] if item["chosen"]}
    assert chosen["cpu"] == "cpu"
    why = {item["device"]: item["reason"] for item in found["backends"] if item["name"] == "cuda"}
    assert chosen["cuda"] == "cuda" or "no CUDA device" in why["cuda"]
    assert found["torch"] == torch.__version__
    assert "this CPU has" in str(found["backends"])
    shown = cli("info").out
    assert "reference" in shown
    assert "transformers" in shown


def test_deployed(cli: Cli, states: dict[str, Path]) -> None:
    found = cli("info", states["deployed"], "--json").json
    model = AutoModelForCausalLM.from_pretrained(states["deployed"])
    layers = {found.names[0]: found.module for found in quantized_layers(model)}
    assert {layer["name"] for layer in found["layers"]} == set(layers)
    counts = torch.zeros(3, dtype=torch.int64)
    for layer in found["layers"]:
        module = layers[layer["name"]]
        assert (layer["outputs"], layer["inputs"]) == (module.out_features, module.in_features)
        codes = unpack_ternary(module.qweight, module.out_features).long() + 1
        own = codes.flatten().bincount(minlength=3)
        counts += own
        shares = (own / own.sum()).tolist()
        assert list(layer["codes"].values()) == pytest.approx(shares)
    assert list(found["codes"].values()) == pytest.approx((counts / counts.sum()).tolist())
    assert sum(found["codes"].values()) == pytest.approx(1)
    ternary = found["parts"]["ternary layers"]
    assert ternary["weights"] == counts.sum() == 4 * ternary["bytes"]
    assert found["bytes"] == (states["deployed"] / "model.safetensors").stat().st_size
    assert found["scheme"]["quant_method"] == "bitlab"
    shown = cli("info", states["deployed"])
    assert "42 packed layers, scales per tensor" in shown.out
    assert shown.code == 0
    assert "model.layers.0.mlp.up_proj" in cli("info", states["deployed"], "--layers").out


def test_padding_is_not_counted(cli: Cli, tmp_path: Path) -> None:
    """A head of 97 rows: three of the last byte's four rows are nobody's."""
    source = make_float_model("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        quantization_config=BitLabConfig(
            mode="infer", head="ternary", weight_granularity="per_group", group_size=64
        ),
    )
    save(model, tmp_path / "deployed")
    found = cli("info", tmp_path / "deployed", "--json").json
    (head,) = [layer for layer in found["layers"] if layer["name"] == "lm_head"]
    codes = unpack_ternary(model.lm_head.qweight, 97)
    assert head["outputs"] == 97
    assert head["scheme"] == "per group of 64"
    assert head["codes"]["0"] == pytest.approx((codes == 0).double().mean().item())


@pytest.mark.parametrize(
    ("scheme", "words", "least", "most"),
    [
        ({}, "per tensor", 2.0, 2.001),
        ({"weight_granularity": "per_group", "group_size": 64}, "per group of 64", 2.13, 2.26),
        (
            {"weight_granularity": "per_group", "group_size": 64, "group_scale_dtype": "float32"},
            "per group of 64 in float32", 2.5, 2.5,
        ),
    ],
)  # fmt: skip
def test_bits_a_weight(
    cli: Cli, states: dict[str, Path], tmp_path: Path,
    scheme: dict[str, Any], words: str, least: float, most: float,
) -> None:  # fmt: skip
    """Counted in the file as the model counts it, and as the card says it."""
    config = BitLabConfig(mode="infer", **scheme)
    model = AutoModelForCausalLM.from_pretrained(states["float"], quantization_config=config)
    save(model, tmp_path)
    found = cli("info", tmp_path, "--json").json
    assert least <= found["bits_per_weight"] <= most
    assert found["bits_per_weight"] == pytest.approx(bits_per_weight(model), rel=1e-12)
    layers = found["layers"]
    weights = sum(layer["outputs"] * layer["inputs"] for layer in layers)
    parts = found["parts"]
    stored = parts["ternary layers"]["bytes"] + parts["their scales"]["bytes"]
    assert found["bits_per_weight"] == pytest.approx(8 * stored / weights)
    assert {layer["scheme"] for layer in layers} == {words}
    said = f"{found['bits_per_weight']:.2f}"
    assert f"{said} bits a weight, scales included" in cli("info", tmp_path).out
    assert f"| bits a weight, scales included | {said} |" in (tmp_path / "README.md").read_text()
    one = f"{layers[0]['scheme']}, {layers[0]['bits_per_weight']:.2f} bits a weight"
    assert one in cli("info", tmp_path, "--layers").out


@pytest.mark.parametrize("scheme", [{}, {"weight_granularity": "per_group", "group_size": 64}])
def test_shards(cli: Cli, states: dict[str, Path], tmp_path: Path, scheme: dict[str, Any]) -> None:
    """A shard may end between a layer's codes and its scales."""
    config = BitLabConfig(mode="infer", **scheme)
    model = AutoModelForCausalLM.from_pretrained(states["float"], quantization_config=config)
    save(model, tmp_path / "whole")
    expected = cli("info", tmp_path / "whole", "--json").json
    folder = tmp_path / "cut"
    folder.mkdir()
    copyfile(tmp_path / "whole/config.json", folder / "config.json")
    tensors = load_file(tmp_path / "whole/model.safetensors")
    weight_map = {key: f"{key.rpartition('_')[2]}.safetensors" for key in tensors}
    for name in {*weight_map.values()}:
        held = {key: tensors[key] for key, file in weight_map.items() if file == name}
        save_file(held, folder / name, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert weight_map[f"{LAYER}.qweight"] != weight_map[f"{LAYER}.qweight_scale"]
    found = cli("info", folder, "--json").json
    assert {**found, "bytes": 0} == {**expected, "bytes": 0}
    # Without its scale nothing is known of a layer.
    del tensors[f"{LAYER}.qweight_scale"]
    save_file(tensors, tmp_path / "whole/model.safetensors", {"format": "pt"})
    error = cli("info", tmp_path / "whole").error
    assert isinstance(error, CheckpointError)
    assert f"{LAYER}.qweight_scale must be in the checkpoint, got none" in str(error)


def test_float_and_latent(cli: Cli, states: dict[str, Path]) -> None:
    for name, scheme in (("float", None), ("latent", "latent")):
        found = cli("info", states[name], "--json").json
        assert found["layers"] == []
        assert found["codes"] is None
        assert found["bits_per_weight"] is None
        assert (found["scheme"] or {}).get("weight_format") == scheme
        assert cli("info", states[name]).code == 0


def test_errors(cli: Cli, states: dict[str, Path], tmp_path: Path) -> None:
    done = cli("info", tmp_path)
    assert done.code == 1
    assert isinstance(done.error, CheckpointError)
    save_file(load_file(states["float"] / "model.safetensors"), tmp_path / "model.safetensors")
    assert "must hold config.json" in str(cli("info", tmp_path).error)
    (tmp_path / "config.json").write_text("{}")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:1000])
    assert "must be a whole safetensors file" in str(cli("info", tmp_path).error)
    assert cli("info", tmp_path, "--nonsense").code == 2


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_a_ternary_embedding(cli: Cli, name: str, tmp_path: Path) -> None:
    folder = make_packed(name, tmp_path)
    found = cli("info", folder, "--json").json
    part = found["parts"]["ternary embeddings"]
    # 97 rows and three of padding, four to a byte.
    assert part == {"tensors": 1, "weights": 97 * 128, "bytes": 25 * 128}
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert found["bits_per_weight"] == pytest.approx(bits_per_weight(model))
    shown = cli("info", folder).out
    assert "1 packed embeddings, scales per group of 64 in float32" in shown
    assert "embedding ternary" in shown
