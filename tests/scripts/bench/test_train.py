"""The benchmark of a training step where memory is short, without a GPU."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from weakref import WeakSet

import pytest
import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts/bench"))

import train
import train_memory
import train_time
from train_block import Seconds

CELL = ("bfloat16", "8B", 4096)
OPTIONS = argparse.Namespace(
    device="cpu", compile=None, limit=20.0, cell_seconds=float("inf"), rounds=4, threads=1
)
# What is kept of the error below.
SHORT = "OutOfMemoryError: CUDA out of memory. Tried to allocate 1 GiB."


def too_much() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nAnd so on.")


class Block:
    """A block of `train_block`: "large" has room alone, "never" has none, "bad" fails late."""

    alive: ClassVar[WeakSet[Block]] = WeakSet()
    when = 0

    def __init__(self, name: str, *_: Any) -> None:
        self.name, self.steps = name, 0
        Block.alive.add(self)
        self._check()

    def _check(self) -> None:
        if self.steps >= Block.when and (
            self.name == "never" or (self.name == "large" and len(Block.alive) > 1)
        ):
            raise too_much()
        if self.name == "bad" and self.steps == 3:
            raise ValueError("late")

    def step(self) -> Seconds:
        self.steps += 1
        self._check()
        return Seconds(0.25, 0.5, 0.25)


@pytest.mark.parametrize("when", [0, 1, 2, 4], ids=["made", "first step", "warm-up", "timed"])
def test_a_block_without_room_is_timed_alone(when: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_time, "Block", Block)
    monkeypatch.setattr(Block, "when", when)
    engines = ["plain", "large", "never", "bad"]
    found, failed = train_time.measure_time(engines, CELL, OPTIONS)
    assert sorted(found) == ["large", "plain"]
    assert found["plain"] == {
        "forward_ms": 250, "backward_ms": 500, "optimizer_ms": 250, "step_ms": 750,
        "step_p10": 750, "step_p90": 750, "with_optimizer_ms": 1000, "tokens_per_second": 4096,
        "repeats": 4,
    }  # fmt: skip
    assert found["large"] == {**found["plain"], "alone": True}
    assert failed == {
        "never": SHORT,
        "bad": "ValueError: late",
    }


def test_memory_that_cannot_be_measured_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: Any) -> None:
        raise too_much()

    monkeypatch.setattr(train, "measure_gpu", short)
    on_gpu = argparse.Namespace(**{**vars(OPTIONS), "device": "cuda"})
    found, problem = train.measure_memory("plain", CELL, on_gpu)
    assert found is None
    assert problem == SHORT
    done = SimpleNamespace(returncode=-9, stdout="", stderr="")
    monkeypatch.setattr(train_memory.subprocess, "run", lambda *_, **__: done)
    assert train.measure_memory("plain", CELL, OPTIONS) == (
        None, "RuntimeError: exit status -9: nothing printed",
    )  # fmt: skip


def test_rows_of_what_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of the others there is all; a block of our own that fails ends the run as failed."""
    monkeypatch.setattr(train_time, "Block", Block)
    monkeypatch.setattr(Block, "when", 0)

    def memory(engine: str, *_: Any) -> dict[str, int]:
        if engine == "plain":
            raise too_much()
        return {"peak": 1}

    monkeypatch.setattr(train, "measure_process", memory)
    options = argparse.Namespace(
        **vars(OPTIONS), precisions=CELL[:1], geometries=CELL[1:2], tokens=CELL[2:],
        no_time=False, no_memory=False, json=tmp_path / "train.json",
    )  # fmt: skip
    rows = train.measure(options, ["plain", "large", "never"], {}, Console(quiet=True))
    plain, large, never = rows
    assert plain["time"]["repeats"] == 4
    assert large["time"]["alone"]
    assert never["time"] is None
    assert [row["bytes"] for row in rows] == [None, {"peak": 1}, None]
    assert [row["failed"] for row in rows] == [SHORT, None, SHORT]
    assert json.loads(options.json.read_text())["rows"] == rows
    with pytest.raises(SystemExit, match="plain, bfloat16, 8B, 4096: OutOfMemoryError"):
        train.check_own(rows)
