"""The benchmark of whole models, without any: which checkpoints it takes, what a cut-off leaves."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[3] / "scripts/bench"
MEASURED = {
    "load_seconds": 1.0, "warm_seconds": 1.0, "imported_bytes": 1e8, "peak_bytes": 2e8,
    "prompt_seconds": [0.5, 0.25], "token_seconds": [0.1, 0.2], "bits_per_weight": 2.0,
    "layer": "BitLinear", "head": "Linear", "compiled": False,
}  # fmt: skip


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("generate")


def options_of(generate: ModuleType, monkeypatch: pytest.MonkeyPatch, *given: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["generate.py", *given])
    return generate.parse_arguments()


def test_what_is_measured_before_a_cut_off_is_written(
    generate: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engines = ("bitlab int8", "dense bf16", "bitnet packed")
    seen = []

    def run_worker(request: dict[str, Any], threads: int) -> dict[str, Any]:
        model = Path(request["model"])
        if request["do"] == "build":
            model.mkdir()
            (model / "model.safetensors").write_bytes(b"1234")
            return {}
        path = tmp_path / "generate.json"
        found = json.loads(path.read_text())["engines"] if path.is_file() else []
        seen.append([one["engine"] for one in found])
        if request["kind"] == "bitnet":
            raise SystemExit("cut off")
        return MEASURED

    monkeypatch.setattr(generate, "run_worker", run_worker)
    arguments = ["--quick", "--no-png", "--threads", "1", "--work", str(tmp_path / "work")]
    arguments += ["--json", str(tmp_path / "generate.json"), "--engines", *engines]
    monkeypatch.setattr(sys, "argv", ["generate.py", *arguments])
    with pytest.raises(SystemExit, match="cut off"):
        generate.main()
    assert seen == [[], ["bitlab int8"], ["bitlab int8", "dense bf16"]]
    result = json.loads((tmp_path / "generate.json").read_text())
    assert [one["decode_tok_s"] for one in result["engines"]] == [7.5, 7.5]
    # All that a page says of a run is there, too.
    assert {"command", "date", "machine", "device", "prompt", "threads"} <= set(result)


def test_each_geometry_has_checkpoints_of_its_own(
    generate: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the default lie in the folder that is named."""
    cases = {(): "models", ("--quick",): "models/quick"}
    cases |= {("--geometry", "smollm2"): "models/smollm2", ("--geometry", "2b"): "models"}
    for given, expected in cases.items():
        options = options_of(generate, monkeypatch, "--work", "models", *given)
        assert options.work == Path(expected)
    assert options_of(generate, monkeypatch, "--quick").work is None


def test_drafts_of_killed_processes_are_removed(generate: ModuleType, tmp_path: Path) -> None:
    """Not those that are being written, nor what is nobody's draft."""
    gone = int(Path("/proc/sys/kernel/pid_max").read_text()) + 1
    drafts = {f"dense.{gone}", f".bitlab-int8.{gone}.bitlab-staged-0123456789abcdef"}
    kept = {"dense", f"dense.{os.getpid()}", f"notes.{gone}", "bitlab-int8.old"}
    for name in drafts | kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    generate.remove_drafts(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept
