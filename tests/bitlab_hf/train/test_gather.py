"""FSDP2 that gathers packed weights, against FSDP2 that gathers floats: the same bits, on gloo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.bitlab_hf.train.gathered import CASES, CONFIGS
from tests.processes import run_once

pytestmark = pytest.mark.ci


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_once("tests.bitlab_hf.train.gathered", tmp_path_factory)


def read(runs: Path, name: str) -> Any:
    return json.loads((runs / f"{name}.json").read_text())


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("case", [*CASES, "copies", "four"])
def test_trains_to_the_bits_of_gathered_floats(runs: Path, case: str) -> None:
    """Losses, gradients and weights of three steps, and an evaluation."""
    found = load_file(runs / f"{case}-packed.safetensors")
    assert_equal(found, load_file(runs / f"{case}-float.safetensors"))
    moved = [name for name in found if name.startswith("2.last.")]
    assert moved
    assert not any(torch.equal(found[name], found["0" + name[1:]]) for name in moved)


def test_what_is_gathered_packed(runs: Path) -> None:
    """Not learned scales, other estimators, rows that do not divide, weights held twice."""
    names = read(runs, "names")
    assert names.pop("mixed") == ["2.up", "2.narrow"]
    # Its first forward pass was quantized in part.
    assert names.pop("annealed") == []
    assert all(found == ["0.up", "0.narrow", "1.up", "1.narrow"] for found in names.values())


def test_arrives_as_one_process_packs_float32(runs: Path) -> None:
    """Also where FSDP2 rounds parameters to bfloat16 for the forward pass."""
    found = load_file(runs / "gathered.safetensors")
    arrived = {name: tensor for name, tensor in found.items() if name.endswith(" arrived")}
    # Codes and scales, multipliers of one, and what a loss that reads the weight sees.
    assert len(arrived) == 3 * len(CONFIGS) + 1
    for name, tensor in arrived.items():
        assert torch.equal(tensor, found[name.removesuffix(" arrived")]), name


def test_bytes_on_the_wire(runs: Path) -> None:
    """Two bits a weight and the scales, of the half of the rows that a process has."""
    sent, rows, columns = read(runs, "sent"), 512, 256
    codes = rows * columns // 4
    scales = {"tensor": 4, "channel": 4 * rows, "group": 4 * rows + 4 * rows}
    scales["group_float32"] = 4 * 4 * rows
    for config, expected in scales.items():
        assert sent[f"{config} float"] == 2 * rows * columns
        assert sent[f"{config} packed"] == codes + expected
    assert sent["tensor float"] / sent["tensor packed"] == pytest.approx(8, rel=1e-3)


def test_what_is_refused(runs: Path) -> None:
    for rank in range(2):
        said = read(runs, f"messages-{rank}")
        assert "ArgumentError: pack_all_gather: model must be sharded by FSDP2" in said["unsharded"]
        assert "LifecycleError: pack_all_gather: model must not have run" in said["late"]
        assert "right after fully_shard" in said["late"]
        for what in ("annealed", "read"):
            assert "LifecycleError: weight: its values must be whole to be read" in said[what]
            assert "Leave pack_all_gather out" in said[what]


def test_weights_that_are_not_finite_are_found(runs: Path) -> None:
    """In every process, since scales arrive in all of them."""
    for rank in range(2):
        found = read(runs, f"messages-{rank}")["finite"]
        assert "the weights (and so the scale) of 1.up" in found


def test_a_trainer_s_run(runs: Path) -> None:
    """With one word more, with statistics, an evaluation, a checkpoint and a stop there."""
    names = "float", "packed", "resumed", "native"
    found = {name: runs / f"trainer-{name}" for name in names}
    last = {name: load_file(run / "last.safetensors") for name, run in found.items()}
    for name in names[1:]:
        assert_equal(last[name], last["float"])
        assert len(read(found[name], "packed")) == 14
    assert read(found["float"], "packed") == []
    history = {name: read(run, "history") for name, run in found.items()}
    for what in ("loss", "eval_loss", "grad_norm", "ternary/flipped"):
        values = {
            name: [entry[what] for entry in entries if what in entry]
            for name, entries in history.items()
        }
        assert values["packed"] == values["float"] == values["native"]
        assert len(values["packed"]) == (2 if what == "eval_loss" else 4)
