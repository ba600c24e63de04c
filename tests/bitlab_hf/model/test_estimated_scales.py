"""Scales of an estimator that no file may have are refused before any layer is packed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitcore import register_estimator
from bitcore.errors import ArgumentError
from bitcore.estimators import ESTIMATORS
from bitlab_hf import BitLabConfig, deploy
from tests.bitlab_hf.experts import make_moe
from tests.bitlab_hf.models import make_float_model


@pytest.fixture(autouse=True)
def _estimator() -> Iterator[None]:
    @register_estimator("unclamped")
    def unclamped(groups: Tensor) -> tuple[Tensor, Tensor]:
        mean = groups.abs().mean(1)
        return mean, mean

    yield
    del ESTIMATORS["unclamped"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [("llama", "model.layers.1.mlp.up_proj"), ("qwen3_moe", "model.layers.1.mlp.experts")],
)
def test_deploy_and_a_load_that_packs(kind: str, name: str, tmp_path: Path) -> None:
    make: Any = make_float_model if kind == "llama" else make_moe
    source = make(kind, tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(source)
    leaf = "weight" if kind == "llama" else "gate_up_proj"
    with torch.no_grad():
        model.get_parameter(f"{name}.{leaf}")[1 if kind == "llama" else (1, 3)] = 0
    model.save_pretrained(tmp_path / "pruned")

    def config(mode: str) -> BitLabConfig:
        return BitLabConfig(
            weight_quantizer="unclamped", weight_granularity="per_channel", mode=mode
        )

    said = rf"estimator 'unclamped': scales must be .*, got 0\.0 at \[.*\] of {name}"
    latent = AutoModelForCausalLM.from_pretrained(
        tmp_path / "pruned", quantization_config=config("train")
    )
    with pytest.raises(ArgumentError, match=said):
        deploy(latent)
    assert latent.config.quantization_config.weight_format == "latent"
    with pytest.raises(ArgumentError, match=said):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "pruned", quantization_config=config("infer")
        )
    whole = AutoModelForCausalLM.from_pretrained(source, quantization_config=config("infer"))
    assert whole.config.quantization_config.weight_format != "latent"
