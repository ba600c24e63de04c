"""The two files of `TernaryStatistics` in a run's folder.

``ternary_statistics.jsonl`` has a first line with the names of the layers and facts about the run,
then one line for every log: what the Trainer logged, and one list of numbers a quantity, in the
layers' order. Lines are appended; a last line that was cut off by a crash is not read.
``ternary_histograms.json`` is written beside itself and renamed.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from bitcore.errors import CheckpointError
from bitlab_hf.checkpoint.atomic import write_atomically
from bitlab_hf.train.guard import leave_behind

STATISTICS_FILE = "ternary_statistics.jsonl"
HISTOGRAMS_FILE = "ternary_histograms.json"
VERSION = 1


class RunFiles:
    """Writes both files of a run.

    Args:
        folder: The Trainer's output folder.
        layers: Names of the layers.
        step: Where training begins: 0 starts both files anew, a later one keeps what they hold up
            to it, as long as they are of the same layers.
        facts: What the first line tells about the run beside its layers.
    """

    def __init__(
        self, folder: Path, layers: list[str], step: int, facts: dict[str, Any] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._lines, self._histograms = folder / STATISTICS_FILE, folder / HISTOGRAMS_FILE
        kept: list[dict[str, Any]] = []
        self._snapshots: list[dict[str, Any]] = []
        if step == 0:
            leave_behind(folder)
        else:
            header, entries = read_statistics(folder)
            if header.get("layers") == layers:
                kept = [entry for entry in entries if entry["step"] <= step]
                self._snapshots = [
                    one
                    for one in read_histograms(folder).get("snapshots", [])
                    if one["step"] <= step
                ]
        counted = [entry["step"] for entry in kept if "flipped" in entry]
        self._last_counted = counted[-1] if counted else None
        header = {"version": VERSION, "layers": layers, "facts": facts or {}}
        lines = [json.dumps(line) for line in (header, *kept)]
        write_atomically(self._lines, "\n".join(lines) + "\n")

    @property
    def last_counted(self) -> int | None:
        """The step of the last line with values of layers that was there when training began."""
        return self._last_counted

    def add(self, step: int, logs: dict[str, Any], values: dict[str, list[float | None]]) -> None:
        """Appends a line."""
        numbers = {
            name: rounded(value)
            for name, value in logs.items()
            if isinstance(value, int | float) and not name.startswith("ternary/")
        }
        line: dict[str, Any] = {"step": step, "logs": numbers}
        line |= {name: [rounded(value) for value in row] for name, row in values.items()}
        with self._lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def add_histograms(self, step: int, bins: dict[str, Any], counts: dict[str, Any]) -> None:
        """Adds a snapshot of all layers and writes the file anew."""
        self._snapshots = [one for one in self._snapshots if one["step"] != step]
        self._snapshots.append({"step": step, "layers": counts})
        content = {"version": VERSION, **bins, "snapshots": self._snapshots}
        write_atomically(self._histograms, json.dumps(content) + "\n")


def rounded(value: float | None) -> float | None:
    """Returns a number with six digits; None for what JSON has no number for."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")


def read_statistics(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Reads ``ternary_statistics.jsonl``; returns its header and its lines, empty without the file.

    Raises:
        CheckpointError: The file is not one of ours, or a line that is not the last is damaged.
    """
    path = folder / STATISTICS_FILE
    if not path.is_file():
        return {}, []
    lines = path.read_text(encoding="utf-8").split("\n")
    # What ends without a line's end was cut off.
    whole = lines[:-1]
    try:
        found = [json.loads(line) for line in whole]
        header, entries = (found[0], found[1:]) if found else ({}, [])
        if found and (header.get("version") != VERSION or not isinstance(header["layers"], list)):
            raise ValueError(f"version {header.get('version')}")
        for entry in entries:
            entry["step"] = int(entry["step"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path.name}: the file must hold lines of JSON of version {VERSION}, got: {error}"
        ) from error
    return header, entries


def read_histograms(folder: Path) -> dict[str, Any]:
    """Reads ``ternary_histograms.json``; empty without the file.

    Raises:
        CheckpointError: The file is not one of ours.
    """
    path = folder / HISTOGRAMS_FILE
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["version"] != VERSION or not isinstance(found["snapshots"], list):
            raise ValueError(f"version {found['version']}")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path.name}: the file must be JSON of version {VERSION}, got: {error}"
        ) from error
    return found
