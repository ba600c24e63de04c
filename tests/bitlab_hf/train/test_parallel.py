"""Several processes against one: DDP, and FSDP2 with its weights in shards, on gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitlab_hf import deploy, save
from bitlab_hf.train.statistics_files import STATISTICS_FILE, read_histograms, read_statistics
from tests.bitlab_hf.models import logits_of
from tests.bitlab_hf.test_trainer import assert_equal_states

pytestmark = pytest.mark.ci
ROOT = Path(__file__).parents[3]
# Sums over a batch are added up in another order. A code that lies within this of its threshold
# would come out differently; none does in these runs.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    done = subprocess.run(
        [sys.executable, "-m", "tests.bitlab_hf.train.parallel", str(folder)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def curve(folder: Path, name: str = "loss") -> list[float]:
    return [entry[name] for entry in result(folder)["history"] if name in entry]


def tensors(folder: Path, kind: str) -> dict[str, Tensor]:
    found = load_file(folder / "result.safetensors")
    return {name.removeprefix(kind): found[name] for name in found if name.startswith(kind)}


def assert_near(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first
    assert set(first) == set(second)
    for name, tensor in second.items():
        assert (first[name] - tensor).norm() <= TOLERANCE * tensor.norm(), name


@pytest.mark.parametrize("teacher", ["", "-teacher"], ids=["Trainer", "BitLabTrainer"])
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "eight"])
def test_several_processes_are_one(runs: Path, name: str, teacher: str) -> None:
    """Gradients of the first step, the loss of every step, the trained weights."""
    one, several = runs / f"one{teacher}", runs / f"{name}{teacher}"
    assert result(several)["kind"] == ("DTensor" if name == "fsdp2" else "Parameter")
    assert_near(tensors(several, "grad."), tensors(one, "grad."))
    assert_near(tensors(several, "last."), tensors(one, "last."))
    for what in ("loss", "eval_loss"):
        expected = curve(one, what)
        assert len(expected) == (6 if what == "loss" else 3)
        assert curve(several, what) == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_a_resumed_run_is_the_run_without_a_stop(runs: Path, name: str) -> None:
    straight, resumed = runs / name, runs / f"{name}-resumed"
    assert_equal_states(tensors(straight, "last."), tensors(resumed, "last."))
    for what in ("loss", "eval_loss"):
        assert curve(resumed, what) == curve(straight, what)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_a_checkpoint_is_the_whole_model(runs: Path, tmp_path: Path, name: str) -> None:
    """Also where no process held it: it loads in one, and is deployed there."""
    checkpoint = runs / name / "checkpoint-6"
    stored = load_file(checkpoint / "model.safetensors")
    assert_equal_states(stored, tensors(runs / name, "last."))
    source = next(runs.glob("float-*"))
    shapes = {key: value.shape for key, value in load_file(source / "model.safetensors").items()}
    assert {key: value.shape for key, value in stored.items()} == shapes
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    expected = logits_of(model)
    save(deploy(model), tmp_path / "deployed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "deployed")
    assert torch.equal(logits_of(again), expected)


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_statistics_count_the_whole_weights(runs: Path, name: str) -> None:
    (header, one), (other, several) = (read_statistics(runs / run) for run in ("one", name))
    assert other == header
    assert len(several) == len(one)
    for found, expected in zip(several, one, strict=True):
        for what in ("negative", "zero", "positive", "flipped", "scale"):
            assert (what in found) == (what in expected)
            assert found.get(what, []) == pytest.approx(expected.get(what, []), rel=TOLERANCE)
    assert sum("flipped" in entry for entry in several) == 6
    assert [one["step"] for one in read_histograms(runs / name)["snapshots"]] == [0, 2, 3, 5, 6]
    # One line a log: a second process that wrote, too, would double them.
    lines = (runs / name / STATISTICS_FILE).read_text().splitlines()
    assert len(lines) == 1 + len(several)
