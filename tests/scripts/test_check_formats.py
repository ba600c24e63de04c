"""The script that shows the formats' round trips."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoTokenizer

from bitlab_hf import BitLabConfig, save
from bitlab_hf.model.tree import quantized_layers
from tests.bitlab_hf.interop.test_gguf import DEMO, build

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("check_formats")


def test_both_formats(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = build("llama", BitLabConfig(weight_granularity="per_group", group_size=64))
    save(model, tmp_path / "model", tokenizer=AutoTokenizer.from_pretrained(DEMO))
    monkeypatch.setattr(sys, "argv", ["check_formats.py", str(tmp_path / "model")])
    script.main()
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| GGUF", "| compressed-tensors"]
    for row in rows:
        assert "14 matrices: codes equal, scales within 0.0" in row
        assert "not asked" in row


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
