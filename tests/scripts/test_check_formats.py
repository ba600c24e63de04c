"""The script that shows the formats' round trips."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from bitlab_hf import BitLabConfig, save
from bitlab_hf.model.tree import quantized_layers
from tests.bitlab_hf.interop.test_gguf import DEMO, build
from tests.bitlab_hf.interop.test_gguf_architectures import build as build_mixture

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("check_formats")


GROUPS: dict[str, Any] = {"weight_granularity": "per_group", "group_size": 64}


@pytest.mark.parametrize(
    ("make", "matrices"),
    [
        (lambda: build("llama", BitLabConfig(**GROUPS)), 14),
        # Of a matrix of one scale a row, and of experts.
        (lambda: build("llama", BitLabConfig(weight_granularity="per_channel")), 14),
        (lambda: build_mixture("MixtralForCausalLM"), 48),
    ],
    ids=["groups", "rows", "experts"],
)
def test_both_formats(
    make: Callable[[], PreTrainedModel],
    matrices: int,
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save(make(), tmp_path / "model", tokenizer=AutoTokenizer.from_pretrained(DEMO))
    monkeypatch.setattr(sys, "argv", ["check_formats.py", str(tmp_path / "model")])
    script.main()
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| GGUF", "| compressed-tensors"]
    for row in rows:
        assert f"{matrices} matrices: codes equal, scales within 0.0" in row
        assert "not asked" in row


@pytest.mark.parametrize(("ours", "theirs"), [(128, 64), (64, 128), (None, 64)])
def test_scales_of_other_groups(script: ModuleType, ours: int | None, theirs: int) -> None:
    """A file may cut rows otherwise: each scale is compared with all those that it is beside."""
    model, other = (
        build(
            "llama",
            BitLabConfig(
                weight_granularity="per_group" if size else "per_channel",
                group_size=size,
                group_scale_dtype="float32",
            ),
        )
        for size in (ours, theirs)
    )
    for place, (one, two) in enumerate(zip(*map(quantized_layers, (model, other)), strict=True)):
        two.module.qweight = one.module.qweight
        for found in (one, two):
            found.module.qweight_scale.fill_(0.5)
        if place == 3:
            two.module.qweight_scale[5, -1] = 0.51
    assert script.come_back(model, other).endswith("codes equal, scales within 2.000%")


def test_what_differs_is_said(script: ModuleType) -> None:
    model, other = build("llama"), build("llama")
    assert script.come_back(model, other).endswith("codes equal, scales within 0.000%")
    layer = quantized_layers(other)[3].module
    layer.qweight_scale = layer.qweight_scale * 1.01
    assert script.come_back(model, other).endswith("scales within 1.000%")
    qweight = layer.qweight.clone()
    # Another code in the first lane.
    qweight[0, 0] ^= 1 if qweight[0, 0] & 3 != 2 else 3
    layer.qweight = torch.nn.Parameter(qweight, requires_grad=False)
    assert (
        script.come_back(model, other)
        == f"other codes in {quantized_layers(other)[3].names[0]}.weight"
    )
