"""``bitlab info``: this machine, and what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitcore import unpack_ternary
from bitcore.errors import CheckpointError
from bitlab_hf import BitLabConfig, save
from bitlab_hf.model.tree import quantized_layers
from tests.bitlab_hf.models import make_float_model

Cli = Callable[..., Any]


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


def test_float_and_latent(cli: Cli, states: dict[str, Path]) -> None:
    for name, scheme in (("float", None), ("latent", "latent")):
        found = cli("info", states[name], "--json").json
        assert found["layers"] == []
        assert found["codes"] is None
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
