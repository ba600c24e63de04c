"""The quality benchmark on a tiny model: what it writes and that it resumes."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[3] / "scripts/bench"
sys.path.insert(0, str(SCRIPTS))

from quality_methods import POST_TRAINING  # noqa: E402
from quality_report import compare, summarize  # noqa: E402
from quality_text import python_files, strip_markup  # noqa: E402

from tests import processes  # noqa: E402

# One of each kind: full precision, transformers' layer, labels alone, a teacher's terms.
QUICK = ["float", "auto", "plain", "kl", "kl-hidden"]


def run_of(method: str, seed: int, nats: float, rate: float = 1e-3, tokens: int = 10) -> Any:
    part = "validation" if seed == 0 else "test"
    return {
        "method": method,
        "seed": seed,
        "nats": nats,
        "rate": rate,
        "tokens": tokens,
        "part": part,
        "cpu_seconds_per_token": 0.5,
    }


def test_share_of_the_gap() -> None:
    """From the better of full precision as it is and fine-tuned, seed by seed, equal tokens."""
    runs = [run_of(m, 0, 3.0) for m in ("float", "auto", "kl")]
    runs += [run_of("kl", 0, 2.9, rate=3e-3), run_of("auto", 0, 4.0, rate=3e-3)]
    runs += [run_of("float", 1, 2.5), run_of("float", 2, 1.8)]
    runs += [run_of("auto", 1, 4.0), run_of("auto", 2, 3.8), run_of("auto", 1, 3.5, tokens=20)]
    runs += [run_of("kl", 1, 3.0), run_of("kl", 2, 2.8)]
    rows = summarize(runs)
    compare(rows, {"float": 2.0})
    assert rows["kl"]["rate"] == 3e-3
    assert rows["auto"]["rate"] == 1e-3
    assert rows["kl"]["closed"] == pytest.approx({1: 0.5, 2: 0.5})
    assert rows["auto"]["seeds"] == {1: 4.0, 2: 3.8}
    assert rows["auto"]["closed_longer"] == pytest.approx({1: 0.25})


def test_no_file_is_in_two_parts() -> None:
    parts = {part: {file.path for file in files} for part, files in python_files().items()}
    assert all(parts.values())
    assert len(set().union(*parts.values())) == sum(map(len, parts.values()))


def test_markup_is_stripped() -> None:
    text = (
        "Title\n=====\n\n.. code-block:: python\n\n    x = 1\n\nSee :ref:`the guide <guide>`::\n\n"
    )
    assert strip_markup(text + "    y = 2\n\n.. note::\n\n    Kept.\n") == (
        "Title\n\nSee the guide:\n\n    Kept.\n"
    )


@pytest.mark.ci
def test_quick(tmp_path: Path) -> None:
    output = tmp_path / "quality.json"
    command = [SCRIPTS / "quality_small.py", "--quick", "--domains", "python"]
    command += ["--folder", tmp_path, "--json", output, "--methods", *QUICK]
    done = processes.run(*command)
    assert done.returncode == 0, done.stderr
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "| distillation, T = 2 | not run |" in output.with_suffix(".md").read_text()
    entry = json.loads(output.read_text())["domains"]["python"]
    assert set(entry["rows"]) == set(QUICK)
    untrained = [entry["start"][name] for name in ("float", *POST_TRAINING)]
    assert all(map(math.isfinite, untrained))
    for method, row in entry["rows"].items():
        assert row["grid"].keys() == {"0.001"}
        assert row["seeds"].keys() == row["closed"].keys() == {"1"}
        figures = [*row["grid"].values(), *row["seeds"].values(), *row["closed"].values()]
        assert all(map(math.isfinite, figures)), method
        assert row["seconds_per_token"] > 0

    # A lost run is made again, bit for bit; the finished ones are read.
    runs = tmp_path / "quick/python/runs"
    (lost,) = runs.glob("kl-hidden-20-*-1.json")
    before, kept = json.loads(lost.read_text()), {p: p.stat().st_mtime_ns for p in runs.iterdir()}
    lost.unlink()
    processes.run(*command).check_returncode()
    assert json.loads(lost.read_text())["nats"] == before["nats"]
    assert all(p.stat().st_mtime_ns == time for p, time in kept.items() if p != lost)
