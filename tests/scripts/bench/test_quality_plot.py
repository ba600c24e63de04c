"""What is drawn of SmolLM2's runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts/bench"))

from page import FOLDER
from page_runs import Run, load_runs
from quality_plot import Line, draw, lines_of


def run(kind: str, command: str, **result: Any) -> Run:
    return Run("name", "Zen 5", kind, "a machine", "2026-12-01", command, "", "written", result)


def test_rows_with_seeds_are_points_above_the_original() -> None:
    made = [{"title": "default", "tokens": 512, "nats": nats} for nats in (3.5, 4.0)]
    for row, seconds in zip(made, (10, 20), strict=True):
        row["making"] = {"seconds": seconds}
    original = {"title": "original", "tokens": 0, "nats": 3.0, "making": None}
    results = {"original": [original], "budget": made}
    command = "python scripts/bench/quality.py --rows original budget"
    (line,) = lines_of(run("quality", command, results=results))
    assert line == Line("default, Zen 5", [512], [15.0], [[0.5, 1.0]])
    # Of tables that were transcribed.
    flat = {"title": "default", "tokens": 512, "nats": 3.5, "seconds": 10}
    (line,) = lines_of(run("quality", command, results={"original": [original], "budget": [flat]}))
    assert line == Line("default, Zen 5", [512], [10.0], [[0.5]])


@pytest.mark.parametrize("more", ["--model gemma3-270m", "--text wikipedia-fr"])
def test_other_models_and_texts_are_left_out(more: str) -> None:
    flat = {"title": "default", "tokens": 512, "nats": 3.5, "seconds": 10}
    results = {"original": [flat], "budget": [flat]}
    assert not [*lines_of(run("quality", f"python quality.py {more}", results=results))]


def test_the_demo_is_a_line() -> None:
    curve = [{"tokens_distilled": 100, "nats_above": 2.0}]
    curve.append({"tokens_distilled": 200, "nats_above": 1.0})
    found = {"seconds_of_fine_tuning": 45, "seconds_of_steps": 40, "tokens_calibrated": 50}
    (line,) = lines_of(run("demo", "scripts/demo.sh --real", curve=curve, **found))
    assert (line.tokens, line.seconds) == ([150, 250], [25.0, 45.0])
    assert line.above == [[2.0], [1.0]]


def test_what_the_documents_show_can_be_drawn(tmp_path: Path) -> None:
    lines = [line for one in load_runs(FOLDER) for line in lines_of(one)]
    assert len(lines) > 3
    draw(lines, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
