"""Runs the code of docs/recipes.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitcore import BitQuantConfig
from bitcore.estimators import ESTIMATORS
from bitlab_hf import BitLabConfig
from bitlayers import BitLinear
from tests.bitlab_hf.models import make_float_model, training_data
from tests.bitlab_hf.train.test_trainer import arguments

TEXT = (Path(__file__).parents[3] / "docs" / "recipes.md").read_text()


def test_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_float_model("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=BitLabConfig())
    names = {"model": model, "path": path, "data": training_data(), "args": arguments(tmp_path)}
    trainer, stored, estimator, warmup, calibration = re.findall(
        r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL
    )
    exec(compile(trainer, "docs/recipes.md, trainer", "exec"), names)
    assert names["trainer"].state.global_step == 4  # type: ignore[attr-defined]
    monkeypatch.chdir(tmp_path)
    exec(compile(stored, "docs/recipes.md, stored logits", "exec"), names)
    assert names["trainer"].state.global_step == 4  # type: ignore[attr-defined]
    exec(compile(warmup, "docs/recipes.md, warm-up", "exec"), names)
    assert names["trainer"].state.global_step == 4  # type: ignore[attr-defined]
    names["samples"] = training_data()
    exec(compile(calibration, "docs/recipes.md, calibration", "exec"), names)
    assert names["report"].samples == 32  # type: ignore[attr-defined]
    assert model.model.layers[0].mlp.up_proj.is_deployed
    try:
        exec(compile(estimator, "docs/recipes.md, estimator", "exec"), names)
        layer = BitLinear(64, 8, quant_config=BitQuantConfig(weight_quantizer="median"))
        median = layer.weight.detach().abs().flatten().median().view(1)
        assert torch.equal(layer.eval().qweight_scale, median)
    finally:
        ESTIMATORS.pop("median", None)
