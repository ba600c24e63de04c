"""How a benchmark's result comes onto the page."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts/bench"))

import page
from page_runs import compact, kind_of, load_runs, take
from page_tables import figure

MACHINE = {"cpu": "a CPU", "cores": 2, "memory_bytes": 2**34, "versions": {"torch": "2.13.0"}}


def write(folder: Path, script: str, **result: Any) -> Path:
    path = folder / "result.json"
    command = f"python scripts/bench/{script} --threads 2 --json {path} --work /somewhere/models"
    common = {"machine": MACHINE, "date": "2026-12-01", "command": command, "quick": False}
    busy = {"disturbance": {"other_processes": 0.0123, "host": 0.0}}
    path.write_text(json.dumps({**common, **busy, **result}))
    return path


def test_a_result_becomes_a_run(tmp_path: Path) -> None:
    engine = {"load_seconds": 0.123456789, "file_bytes": 850_000_000, "peak_bytes": 1_730_000_000}
    engine |= {"above_bytes": 140_000_000, "decode_tok_s": 18.7, "prompt_tok_s": 133.6}
    engines = [{**engine, "engine": "bitlab int8", "runs": [1, 2]},
               {**engine, "engine": "dense bf16", "decode_tok_s": 4.25}]  # fmt: skip
    target = {"name": "decode: 20 tok/s", "measured": 18.7, "unit": " tok/s", "met": False}
    targets = [target, {**target, "name": "prompt: 120 tok/s", "measured": None, "met": None}]
    path = write(tmp_path, "generate.py", device="cpu", engines=engines, targets=targets)
    folder = tmp_path / "runs"
    folder.mkdir()
    (written,) = take(path, "Zen 5, 2 cores", folder)
    assert written.name == "generate-zen-5-2-cores.json"
    (run,) = load_runs(folder)
    assert run.command == "python scripts/bench/generate.py --threads 2"
    assert str(tmp_path) not in written.read_text()
    assert run.conditions == "other processes took 1.2 % of the CPU time"
    assert run.machine == "2 cores of a CPU, 16 GiB; torch 2.13.0"
    assert run.result["engines"][0]["load_seconds"] == 0.12346
    assert "runs" not in run.result["engines"][0]
    end = "| Zen 5, 2 cores | 2026-12-01 | [generate-zen-5-2-cores](#generate-zen-5-2-cores) |"
    lines = page.render("memory", [run]).splitlines()
    assert lines[2] == f"| bitlab int8 | 0.12 | 0.85 | 1.73 | 0.14 {end}"
    (line,) = page.render("whole", [run]).splitlines()[2:]
    assert line == f"| bitlab int8 | dense bf16 | 18.7 | 4.25 | 4.40 | 134 | 134 | 1.00 {end}"
    (line,) = page.render("targets", [run]).splitlines()[2:]
    assert line == f"| decode: 20 tok/s | 18.7 tok/s | **no** {end}"
    assert page.render("gpu-whole", [run]) == "Not measured."
    assert "### generate-zen-5-2-cores\n" in page.render(page.RUNS, [run])


def test_another_geometry_is_a_run_of_its_own() -> None:
    of = {"generate": ("2b", "smollm2"), "load": ("smollm2", "2b")}
    for script, (usual, other) in of.items():
        command = f"python scripts/bench/{script}.py"
        assert kind_of(command) == kind_of(f"{command} --geometry {usual}") == script
        assert kind_of(f"{command} --geometry {other} --threads 1") == f"{script}-{other}"


def test_compiled_decoding_is_compared_with_the_same_run(tmp_path: Path) -> None:
    speeds = {"bitlab g64": 50.0, "bitlab g64 exact": 100.0, "bitlab g64 fused": 120.0}
    engines = [{"engine": name, "decode_tok_s": speed} for name, speed in speeds.items()]
    path = write(tmp_path, "generate.py --geometry smollm2", engines=engines, threads=1)
    take(path, "Zen 5", tmp_path)
    path.unlink()
    (run,) = load_runs(tmp_path)
    exact, fused = page.render("compiled", [run]).splitlines()[2:]
    name = "generate-smollm2-zen-5"
    end = f"Zen 5 | 2026-12-01 | [{name}](#{name}) |"
    assert exact == f"| smollm2 | bitlab g64 | exact | 1 | 100 | 50.0 | 2.00 | {end}"
    assert fused == f"| smollm2 | bitlab g64 | fused | 1 | 120 | 50.0 | 2.40 | {end}"
    # Under the questions that are of BitNet-2B-4T's geometry there is nothing of it.
    assert page.render("memory", [run]) == page.render("whole", [run]) == "Not measured."


def test_what_fitting_a_layer_costs(tmp_path: Path) -> None:
    layer = {
        "title": "BitNet b1.58 2B4T", "layers": 30, "seconds": 720.0, "cpu_seconds": 600.0,
        "parts": {"q_proj": 540.0, "down_proj": 180.0},
        "model_bytes": 1_000_000_000, "peak_bytes": 4_500_000_000,
    }  # fmt: skip
    given = {"layers": {"2b": layer}, "samples": 128, "length": 256, "threads": 1}
    path = write(tmp_path, "calibration.py", **given)
    take(path, "Zen 5", tmp_path)
    path.unlink()
    (run,) = load_runs(tmp_path)
    (line,) = page.render("fitting", [run]).splitlines()[2:]
    end = "Zen 5 | 2026-12-01 | [calibration-zen-5](#calibration-zen-5) |"
    assert line == (f"| BitNet b1.58 2B4T | 1 | 720 | 600 | 180 | 4.50 | 3.50 | 30 | 5.00 | {end}")


def test_loads_are_compared_with_as_many_tensors(tmp_path: Path) -> None:
    engines = [
        {"engine": name, "load_seconds": seconds, "load_seconds_least": 0.3, "tensors": tensors}
        for name, seconds, tensors in (
            ("bitlab g64, known", 0.42, 692), ("dense bf16, as many tensors", 0.4, 696),
        )
    ]  # fmt: skip
    path = write(tmp_path, "load.py", engines=engines, targets=[], geometry="smollm2")
    take(path, "Zen 5", tmp_path)
    path.unlink()
    (run,) = load_runs(tmp_path)
    (line,) = page.render("load", [run]).splitlines()[2:]
    end = "692 | 696 | 0.42 | 0.40 | 1.05 | Zen 5 | 2026-12-01 | [load-zen-5](#load-zen-5) |"
    assert line == f"| smollm2 | bitlab g64, known | dense bf16, as many tensors | {end}"
    assert page.render("loads", [run]) == "Not measured."


def test_servers_become_a_run_without_their_texts(tmp_path: Path) -> None:
    row = {
        "server": "vLLM, ternary", "clients": 8, "tokens_per_s": 122.8312, "first_p50": 0.4715,
        "first_p95": 0.53, "between_p50": 0.0474, "between_p95": 0.0688,
        "memory_bytes": 3_110_000_000, "errors": 0, "texts": 32, "as_one_by_one": 29,
        "as_transformers": None,
    }  # fmt: skip
    settings = {"threads": 2, "tokens": 24, "geometry": "1b", "prompts": ["one"]}
    command = f"python scripts/bench/serve.py --vllm {tmp_path} --geometry 1b --output {tmp_path}/a"
    path = write(tmp_path, "serve.py", rows=[row], settings=settings, servers={}, command=command)
    folder = tmp_path / "runs"
    folder.mkdir()
    (written,) = take(path, "Zen 5", folder)
    assert written.name == "serve-1b-zen-5.json"
    (run,) = load_runs(folder)
    assert run.command == f"python scripts/bench/serve.py --vllm {tmp_path.name} --geometry 1b"
    assert run.conditions.startswith("other processes took 1.2 % of the CPU time, the servers'")
    assert "prompts" not in written.read_text()
    (line,) = page.render("serve-1b", [run], "benchmarks.md").splitlines()[2:]
    assert line == (
        "| vLLM, ternary | 8 | 122.8 | 0.471 | 0.530 | 0.047 | 0.069 | 3.11 | 0 | 29 of 32 | - "
        "| Zen 5 | 2026-12-01 | [serve-1b-zen-5](benchmarks.md#serve-1b-zen-5) |"
    )
    assert page.render("serve", [run]) == "Not measured."


def test_what_is_no_measurement_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"must be a measurement, got one of --quick"):
        take(write(tmp_path, "linear.py", quick=True), "Zen 5", tmp_path)
    with pytest.raises(SystemExit, match=r"--label must name the machine"):
        take(write(tmp_path, "linear.py"), None, tmp_path)
    with pytest.raises(SystemExit, match=r"benchmark's command, got 'cat'"):
        take(write(tmp_path, "linear.py", command="cat"), "Zen 5", tmp_path)
    (tmp_path / "result.json").write_text('{"label": "Zen 5"}')
    with pytest.raises(SystemExit, match=r"result.json: must have \['command'"):
        load_runs(tmp_path)


def test_marks_of_no_table_are_refused() -> None:
    with pytest.raises(SystemExit, match=r"got no-such-table"):
        page.fill("<!-- no-such-table -->\n<!-- /no-such-table -->", [])


def test_what_stands_around_tables_stays() -> None:
    text = "before\n<!-- packing -->\nold\n<!-- /packing -->\nafter <!-- remark -->\n"
    assert page.fill(text, []) == (
        "before\n<!-- packing -->\nNot measured.\n<!-- /packing -->\nafter <!-- remark -->\n"
    )


def test_figures() -> None:
    shown = [figure(value) for value in (None, 512, 1234.5, 33.333, 2.0, 0.0119, 0.5)]
    assert shown == ["-", "512", "1234", "33.3", "2.00", "0.012", "0.50"]


def test_files_have_a_record_a_line() -> None:
    rows = [{"m": m, "us": {"p50": 1.5}, "name": "x" * 40} for m in range(3)]
    value = {"label": "Zen 5", "result": {"rows": rows, "few": [1, 2]}}
    text = compact(value)
    assert json.loads(text) == value
    assert text.count("\n") == 10
    assert max(map(len, text.splitlines())) < 100
