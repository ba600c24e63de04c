"""The benchmark of what fitting a layer costs, on a toy."""

from __future__ import annotations

import json
from pathlib import Path

from tests import processes

SCRIPT = Path(__file__).parents[3] / "scripts/bench/calibration.py"


def test_a_toy_s_layer(tmp_path: Path) -> None:
    output = tmp_path / "out" / "calibration.json"
    done = processes.run(
        SCRIPT, "--geometries", "tiny", "--samples", "4", "--length", "16", "--threads", "1",
        "--output", output,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    layer = found["layers"]["tiny"]
    assert set(layer["parts"]) == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert 0 < sum(layer["parts"].values()) <= layer["seconds"]
    assert layer["peak_bytes"] >= layer["model_bytes"] > 1e8
    assert (found["samples"], found["length"], found["threads"]) == (4, 16, 1)
    assert "a toy" in done.stdout
