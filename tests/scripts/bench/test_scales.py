"""The benchmark of scales on a tiny model: what it writes and that it resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests import processes
from tests.bitlab_hf.interop.test_gguf import DEMO
from tests.bitlab_hf.models import make_float_model

SCRIPT = Path(__file__).parents[3] / "scripts/bench/scales.py"
ROWS = ("float", "per-tensor", "groups-64-float32", "groups-64-rounded", "groups-64", "groups-128")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """What scripts/real_models.py leaves, but tiny."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    folder = tmp_path / "models"
    made = make_float_model("llama", tmp_path, vocab_size=len(tokenizer), intermediate_size=128)
    folder.mkdir()
    made.rename(folder / "smollm2-135m")
    tokenizer.save_pretrained(folder / "smollm2-135m")
    (folder / "wikipedia").mkdir()
    for part in ("fit", "test"):
        lines = [
            json.dumps({"title": str(number), "text": f"{part} {number} " + "some words " * 30})
            for number in range(100)
        ]
        (folder / "wikipedia" / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def run(models: Path, folder: Path, *arguments: str) -> dict[str, Any]:
    options = ["--models", models, "--folder", folder]
    options += ["--samples", "3", "--blocks", "2", "--threads", "1", *arguments]
    done = processes.run(SCRIPT, *options)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads((folder / "scales.json").read_text())
    return results


@pytest.mark.ci
def test_rows_are_kept_as_they_are_done(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    seeds = run(models, folder, "--rows", "groups-64", "--seeds", "0", "1")["groups-64"]
    assert [one["seed"] for one in seeds] == [0, 1]
    assert seeds[0]["nats"] != seeds[1]["nats"]
    record = folder / "groups-64" / "seed-0" / "result.json"
    # Not computed again.
    record.write_text(record.read_text().replace('"nats": ', '"nats": 1'))
    kept = json.loads(record.read_text())
    every = run(models, folder)
    assert list(every) == list(ROWS)
    assert every["groups-64"] == [kept, seeds[1]]
    results = {name: found[0] for name, found in every.items()}
    bits = [results[name]["bits"] for name in ROWS]
    # Hidden size 64: a row's own scale is half a bit a weight of a group.
    assert bits[0] == 16
    assert 2 < bits[1] < 2.05
    assert bits[2] == 2.5
    assert bits[3] == bits[4] > bits[5] > 2.125
    one, other = results["groups-64-float32"], results["groups-64-rounded"]
    assert one["nats"] != other["nats"]
    assert one["nats"] == pytest.approx(other["nats"], abs=0.1)
    for name in ROWS:
        assert results[name]["command"].startswith("python scripts/bench/scales.py --models")
        assert results[name]["machine"]["cpu"]
        assert results[name]["date"]
    timed = run(models, folder, "--report", "--rows", "groups-64", "--decode", "3", "--rounds", "1")
    assert set(timed["groups-64"][0]["decode_tok_s"]) == {"1", "2"}
    table = (folder / "scales.md").read_text()
    assert table.count("\n| ") == 2 + len(ROWS)
    change = f"{kept['nats'] - one['nats']:+.4f}"
    mean = (kept["nats"] + seeds[1]["nats"]) / 2
    assert f"| groups of 64, two levels | {mean:.4f} | {change} | " in table
