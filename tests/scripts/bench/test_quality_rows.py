"""How the quality benchmark makes its rows, and what it says that they cost: the demo's model."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts/bench"))

from quality import read_row, results_of
from quality_rows import LEARNED, LENGTH, RECIPE, ROWS, Costs, Row, make

SOURCE = Path(str(files("bitlab_hf.demo") / "model"))
SHORT = replace(RECIPE, calibration_samples=2)


def row(steps: int) -> Row:
    return Row("", LEARNED, recipe=SHORT, tokens=(2 + 2 * steps) * LENGTH, rate=2e-4)


@pytest.fixture(scope="module")
def fit() -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(SOURCE)
    text = (Path(__file__).parents[3] / "docs/architecture.md").read_text()
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    return ids[: 16 * LENGTH].view(16, LENGTH)


def weights(one: Row, fit: Tensor, folder: Path, start: Path) -> tuple[dict[str, Tensor], Any]:
    costs = Costs(folder / "checkpoints", start)
    lines: list[str] = []
    model = make(one, SOURCE, fit, 1, False, costs, lines.append)
    return model.state_dict(), costs.now()


@pytest.mark.ci
def test_rows_share_a_start(fit: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second row takes over what the first has found, and its price; the bits are the same."""
    shared = tmp_path / "starts" / row(1).start(1, False)
    assert shared.name == row(2).start(1, False) != row(2).start(2, False)
    weights(row(1), fit, tmp_path / "one", shared)
    held = json.loads((shared / "costs.json").read_text())
    assert held["seconds"] > 0
    (shared / "costs.json").write_text(json.dumps({**held, "seconds": 1e6, "peak_bytes": 1 << 50}))
    solved = []
    module: Any = sys.modules["bitlab_hf.fit.calibrate"]
    solve = module.solve
    monkeypatch.setattr(module, "solve", lambda *given: (solved.append(given), solve(*given))[1])
    second, costs = weights(row(2), fit, tmp_path / "two", shared)
    assert not solved
    assert costs["seconds"] > 1e6
    assert costs["peak_bytes"] == 1 << 50
    alone, _ = weights(row(2), fit, tmp_path / "alone", tmp_path / "nothing")
    assert solved
    assert all(torch.equal(second[name], alone[name]) for name in alone)


def test_costs_of_a_killed_row(tmp_path: Path) -> None:
    costs = Costs(tmp_path, tmp_path / "start")
    costs.on_save()
    kept = json.loads((tmp_path / "costs.json").read_text())
    (tmp_path / "costs.json").write_text(json.dumps({**kept, "seconds": 50.0, "cpu_seconds": 40.0}))
    later = Costs(tmp_path, tmp_path / "start").now()
    assert later["seconds"] >= 50.0
    assert later["cpu_seconds"] >= 40.0


def test_blocks() -> None:
    """What is read for the start and by the teacher counts as trained on."""
    assert ROWS["default-64k"].blocks == 65_536 // LENGTH - 128
    assert ROWS["stock-64k"].blocks == 65_536 // LENGTH
    assert ROWS["teach-96k"].blocks == (98_304 // LENGTH - 128) // 2


def test_rows_of_other_settings(tmp_path: Path) -> None:
    """Neither counted as done, nor averaged with those of this run."""
    options = Namespace(folder=tmp_path, models=tmp_path, model="one", text="wikipedia")
    held = {"blocks": 96, "bf16": True}
    for seed, settings in ((1, held), (2, held), (3, {})):
        folder = tmp_path / f"one/budget/seed-{seed}"
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps({"nats": seed, "settings": settings}))
    record = tmp_path / "one/budget/seed-1/result.json"
    assert read_row(record, held)["nats"] == 1
    with pytest.raises(
        SystemExit, match=r"--blocks must be 96, with which .*seed-1 was made, got 8"
    ):
        read_row(record, {**held, "blocks": 8})
    # Of before settings were written down.
    assert [row["nats"] for row in results_of(options)["budget"]] == [1, 2, 3]
    (tmp_path / "one/original").mkdir()
    other = {"nats": 0, "settings": {**held, "bf16": False}}
    (tmp_path / "one/original/result.json").write_text(json.dumps(other))
    with pytest.raises(SystemExit, match="--bf16 must be True.*got False"):
        results_of(options)
    (tmp_path / "one/original/result.json").write_text(json.dumps({"nats": 0, "device": "cuda"}))
    with pytest.raises(SystemExit, match="--device must be cuda.*got cpu"):
        read_row(tmp_path / "one/original/result.json", {**held, "device": "cpu"})
