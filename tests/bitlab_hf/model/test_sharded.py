"""FSDP2 beside tensor and expert parallel, and Trainers of models in parts, against one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.bitlab_hf.model.sharded import CASES, TRAINERS
from tests.processes import run_once

pytestmark = pytest.mark.ci
ROUNDING = 1e-6


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_once("tests.bitlab_hf.model.sharded", tmp_path_factory)


def processes(name: str) -> int:
    sizes = CASES[name][2]
    return sizes.get("tp_size", 1) * sizes["fsdp_size"]


@pytest.mark.parametrize("name", CASES)
def test_shards_of_parts_train_as_one_process(runs: Path, name: str) -> None:
    one, several = (
        load_file(runs / f"{name}-{count}.safetensors") for count in (1, processes(name))
    )
    assert one.keys() == several.keys()
    torch.testing.assert_close(several["losses"], one["losses"], rtol=ROUNDING, atol=0)
    assert one["losses"][1] < one["losses"][0]
    gradients = {key for key in one if key.startswith("grad.")}
    largest = max(float(one[key].norm()) for key in gradients)
    for key in gradients:
        allowed = ROUNDING * max(float(one[key].norm()), 1e-2 * largest)
        assert (several[key] - one[key]).norm() <= allowed, key


@pytest.mark.parametrize("name", CASES)
def test_they_are_saved_whole(runs: Path, name: str) -> None:
    one, several = (
        load_file(runs / f"{name}-latent-{count}" / "model.safetensors")
        for count in (1, processes(name))
    )
    assert one.keys() == several.keys()
    for key, tensor in one.items():
        assert several[key].shape == tensor.shape
        torch.testing.assert_close(several[key], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_packed_parts_are_not_sharded(runs: Path, name: str) -> None:
    said = (runs / f"{name}.txt").read_text()
    split = "ep_size=2" if name == "experts" else "tp_size=2"
    assert f"fsdp_size must be 1 beside {split} to run a model, got 2" in said


def history(runs: Path, name: str, count: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((runs / f"{name}-{count}.json").read_text())
    return found


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_of_a_model_in_parts(runs: Path, name: str) -> None:
    """Losses and gradients of one process; without the calibrated start, which wants it whole."""
    one, two = (history(runs, name, count) for count in (1, 2))
    for what in ("loss", "eval_loss", "grad_norm"):
        expected = [entry[what] for entry in one if what in entry]
        found = [entry[what] for entry in two if what in entry]
        assert len(found) == len(expected) == (2 if what == "eval_loss" else 3)
        if name != "default":
            assert found == pytest.approx(expected, rel=1e-4)
    checkpoint = load_file(runs / f"{name}-2" / "checkpoint-2" / "model.safetensors")
    shapes = load_file(runs / f"{name}-1" / "checkpoint-2" / "model.safetensors")
    assert {key: one.shape for key, one in checkpoint.items()} == {
        key: one.shape for key, one in shapes.items()
    }


def test_what_trainers_cannot_do_is_refused(runs: Path) -> None:
    said = json.loads((runs / "messages.json").read_text())
    assert "Pass `save_only_model=True`" in said["resume"]
    assert (
        "recipe must have teacher_share 0 under FSDP, DeepSpeed and distributed_config"
        in (said["teach"])
    )
