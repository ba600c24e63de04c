"""What a run's folder holds, read and checked."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitcore.errors import ArgumentError, CheckpointError
from bitlab_hf.train.baseline import read_baseline
from bitlab_hf.train.guard import is_earlier, last_checkpoint
from bitlab_hf.train.recipe import RECIPE_FILE
from bitlab_hf.train.statistics import QUANTITIES
from bitlab_hf.train.statistics_files import (
    HISTOGRAMS_FILE,
    STATISTICS_FILE,
    read_histograms,
    read_statistics,
)

STATE_FILE = "trainer_state.json"
_BEGIN = (
    "Train with `TernaryStatistics().attach(trainer)`, and name the Trainer's output_dir, the "
    "folder with its checkpoints."
)


@dataclass(frozen=True)
class Snapshot:
    """The weights of all layers at one step.

    Attributes:
        step: When.
        counts: For each layer three lists, of the codes -1, 0 and +1: weights in each bin.
    """

    step: int
    counts: dict[str, list[list[int]]]


@dataclass
class Run:
    """A run of a Trainer with `TernaryStatistics`.

    Attributes:
        folder: Where it lies.
        layers: Names of the converted layers.
        logs: Step and numbers of every log, steps ascending; one entry a step.
        values: For each of `QUANTITIES`: step and one number a layer (None where not measured).
        snapshots: Histograms, steps ascending.
        edge: Largest weight of a histogram, in scales; its bins are equal parts of -edge to edge.
        facts: What the statistics' first line tells, see `bitlab_hf.train.run_facts`.
        recipe: Fields of the recipe; None without one.
        steps: Steps done.
        max_steps: Steps that the run was to take; None where not recorded.
        tokens: Tokens seen; None where not counted.
        baseline: The full-precision model's nats a token, and its name; None without it.
    """

    folder: Path
    layers: list[str]
    logs: list[tuple[int, dict[str, float]]]
    values: dict[str, list[tuple[int, list[float | None]]]]
    snapshots: list[Snapshot] = field(default_factory=list)
    edge: float = 3.0
    facts: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] | None = None
    steps: int = 0
    max_steps: int | None = None
    tokens: int | None = None
    baseline: tuple[float, str] | None = None

    def logged(self, name: str) -> tuple[list[int], list[float]]:
        """Returns the steps at which a number was logged, and the number at each."""
        found = [(step, logs[name]) for step, logs in self.logs if name in logs]
        return [step for step, _ in found], [value for _, value in found]


def read_run(folder: Path) -> Run:
    """Reads a run: its statistics, and its newest whole state, recipe and baseline if there are.

    Args:
        folder: The Trainer's output folder.

    Raises:
        ArgumentError: It is no run's folder, or the run logged no statistics.
        CheckpointError: One of its files is damaged.
    """
    if not folder.is_dir():
        raise ArgumentError(f"report: run must be a folder, got {folder}\n{_BEGIN}")
    header, entries = read_statistics(folder)
    state, place = _state(folder)
    if not header:
        what = "no statistics" if state else "no run of a Trainer"
        nearby = [path.parent for path in sorted(folder.glob(f"*/{STATISTICS_FILE}"))]
        advice = f"There is one in {nearby[0]}." if nearby else _BEGIN
        raise ArgumentError(
            f"report: run must hold {STATISTICS_FILE}, got {what} in {folder}\n{advice}"
        )
    layers = [str(name) for name in header["layers"]]
    values = _values(entries, layers)
    if not any(values.values()):
        raise ArgumentError(
            f"report: run must have logged at least once, got no log in {folder}\n"
            "Lower the Trainer's logging_steps, or wait for the first log."
        )
    facts = header.get("facts") or {}
    if not isinstance(facts, dict):
        raise _damaged(STATISTICS_FILE, f"facts {facts!r}")
    logs = _logs(state, entries)
    seen = int(state.get("num_input_tokens_seen") or 0)
    edge, snapshots = _snapshots(folder)
    max_steps = state.get("max_steps") or facts.get("max_steps")
    counted = [step for series in values.values() for step, _ in series]
    return Run(
        folder,
        layers,
        logs,
        values,
        snapshots,
        edge,
        facts,
        _recipe(place, folder),
        max(int(state.get("global_step") or 0), *counted),
        int(max_steps) if max_steps else None,
        # TRL's trainers count under another name.
        seen or int(max((one["num_tokens"] for _, one in logs if "num_tokens" in one), default=0))
        or None,
        read_baseline(folder),
    )  # fmt: skip


def _state(folder: Path) -> tuple[dict[str, Any], Path]:
    """Returns the state that reaches furthest, of the run or of its newest checkpoint, and where
    it lies; none that an earlier run has left.
    """
    whole = (folder / STATE_FILE).is_file() and not is_earlier(folder, folder)
    places = [folder] if whole else []
    newest = last_checkpoint(folder)
    places += [Path(newest)] if newest else []
    found: list[tuple[int, dict[str, Any], Path]] = []
    for place in places:
        state = _object(place / STATE_FILE)
        try:
            history = state["log_history"]
            if not all(isinstance(one["step"], int) for one in history):
                raise TypeError("a step is no whole number")
            found.append((int(state["global_step"]), state, place))
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(STATE_FILE, repr(error)) from error
    if not found:
        return {}, folder
    _, state, place = max(found, key=lambda one: one[0])
    return state, place


def _object(path: Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path.name, str(error)) from error
    if not isinstance(found, dict):
        raise _damaged(path.name, type(found).__name__)
    return found


def _damaged(name: str, what: str) -> CheckpointError:
    return CheckpointError(f"report: {name} must be whole and as it was written, got: {what}")


def _recipe(place: Path, folder: Path) -> dict[str, Any] | None:
    for one in (place, folder):
        if (one / RECIPE_FILE).is_file():
            return _object(one / RECIPE_FILE)
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _logs(
    state: dict[str, Any], entries: list[dict[str, Any]]
) -> list[tuple[int, dict[str, float]]]:
    """Returns the numbers of all logs; the statistics may reach further than a checkpoint."""
    steps: dict[int, dict[str, float]] = {}
    try:
        lines = [(one["step"], one) for one in state.get("log_history", [])]
        lines += [(one["step"], one["logs"]) for one in entries]
        for step, logs in lines:
            numbers = {
                name: float(value)
                for name, value in logs.items()
                if _is_number(value) and name != "step"
            }
            steps.setdefault(step, {}).update(numbers)
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(STATISTICS_FILE, repr(error)) from error
    return sorted(steps.items())


def _values(
    entries: list[dict[str, Any]], layers: list[str]
) -> dict[str, list[tuple[int, list[float | None]]]]:
    values: dict[str, list[tuple[int, list[float | None]]]] = {name: [] for name in QUANTITIES}
    for entry in entries:
        for name in QUANTITIES:
            row = entry.get(name)
            if row is None:
                continue
            if (
                not isinstance(row, list)
                or len(row) != len(layers)
                or not all(value is None or _is_number(value) for value in row)
            ):
                raise _damaged(STATISTICS_FILE, f"{name} of step {entry['step']}: {row!r:.80}")
            values[name].append((entry["step"], row))
    return values


def _snapshots(folder: Path) -> tuple[float, list[Snapshot]]:
    found = read_histograms(folder)
    if not found:
        return 3.0, []
    try:
        edge, bins = float(found["edge"]), int(found["bins"])
        snapshots = [Snapshot(int(one["step"]), dict(one["layers"])) for one in found["snapshots"]]
        for snapshot in snapshots:
            for name, rows in snapshot.counts.items():
                shape = [len(row) for row in rows]
                if shape != [bins] * 3 or not all(_is_number(n) for row in rows for n in row):
                    raise ValueError(f"{name}: {shape} counts, not 3 times {bins}")
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(HISTOGRAMS_FILE, repr(error)) from error
    return edge, sorted(snapshots, key=lambda one: one.step)
