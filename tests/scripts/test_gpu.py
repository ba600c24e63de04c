"""One visit to a GPU, without one: its time, what it keeps, how it goes on; all of it, quick."""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "scripts/bench")]

import gpu  # noqa: E402
import gpu_parts  # noqa: E402
import gpu_visit  # noqa: E402
import page  # noqa: E402
from gpu_visit import Part, Visit  # noqa: E402


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def part(*codes: str, result: Any = None, weight: float = 1.0, least: float = 0.0) -> Part:
    def commands(visit: Visit) -> Iterator[list[str]]:
        yield from map(python, codes)

    return Part(weight, least, commands, result or (lambda visit: {"codes": len(codes)}))


@pytest.fixture
def visit(tmp_path: Path) -> Visit:
    (tmp_path / "work").mkdir()
    return Visit(tmp_path / "work", False, True, None)


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[gpu.Runner]:
    before = signal.getsignal(signal.SIGTERM)
    yield gpu.Runner(tmp_path / "out/gpu.log")
    signal.signal(signal.SIGTERM, before)


def options(tmp_path: Path, **given: Any) -> argparse.Namespace:
    values = {"minutes": 1.0, "only": None, "out": tmp_path / "out", "quick": True}
    return argparse.Namespace(**{**values, **given})


def test_a_part_that_takes_too_long_keeps_what_it_wrote(visit: Visit, runner: gpu.Runner) -> None:
    """Its own children are ended with it."""
    child = "import time; time.sleep(60)"
    code = (
        f"import json, subprocess, sys, time; from pathlib import Path\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"Path({str(visit.results / 'some.json')!r}).write_text(json.dumps({{'pid': child.pid}}))\n"
        f"time.sleep(60)"
    )
    slow = part(
        code, "raise SystemExit('not reached')", result=lambda visit: visit.read("some.json")
    )
    started = time.monotonic()
    found = gpu.run_part("slow", slow, visit, runner, 4)
    assert time.monotonic() - started < 30
    assert found["status"] == "cut off"
    assert len(found["commands"]) == 1
    pid = found["result"]["pid"]
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.is_file() or state.read_text().split(") ")[1].startswith("Z"):
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child of the part still runs")


def test_what_an_earlier_part_wrote_is_not_taken_for_this_ones(
    visit: Visit, runner: gpu.Runner
) -> None:
    visit.results.mkdir()
    (visit.results / "some.json").write_text('{"of": "before"}')
    (visit.work / "notes.txt").write_text("somebody's")
    bad = part("raise SystemExit(1)", result=lambda visit: visit.read("some.json"))
    assert gpu.run_part("bad", bad, visit, runner, 60)["result"] is None
    assert (visit.work / "notes.txt").read_text() == "somebody's"


def test_a_part_that_fails_says_why(visit: Visit, runner: gpu.Runner) -> None:
    found = gpu.run_part(
        "bad", part("raise SystemExit('the reason')", "print(1)"), visit, runner, 60
    )
    assert found["status"] == "failed"
    assert "the reason" in found["output"]
    # What comes after in the same part runs all the same.
    assert len(found["commands"]) == 2


def test_every_part_is_written_before_the_next_begins(
    tmp_path: Path, visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out/gpu.json"
    looks = (
        f"import json; assert json.load(open({str(path)!r}))['parts']['build']['status'] == 'done'"
    )
    parts = {
        "build": part("print('built')"),
        "second": part(looks),
        "long": part("print('never')", least=3600),
        "barred": Part(1, 0, lambda visit: iter(()), lambda visit: None, lambda visit: "no key"),
        "last": part("print('last')"),
    }
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "has_library", lambda visit: True)
    result: dict[str, Any] = {"parts": {}}
    assert not gpu.visit_all(options(tmp_path), visit, result)
    written = json.loads(path.read_text())["parts"]
    statuses = {name: one["status"] for name, one in written.items()}
    assert statuses == {
        "build": "done",
        "second": "done",
        "long": "not begun",
        "barred": "not begun",
        "last": "done",
    }
    assert "it takes 3600" in written["long"]["why"]
    assert written["barred"]["why"] == "no key"
    assert set((tmp_path / "out").iterdir()) == {path, tmp_path / "out/gpu.log"}


def test_time_is_shared_by_weight_and_what_is_left_over_goes_on(
    tmp_path: Path, visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    barred = Part(9, 0, lambda visit: iter(()), lambda visit: None, lambda visit: "no key")
    parts = {"build": part(weight=3.0), "one": part(), "barred": barred, "two": part()}
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "has_library", lambda visit: True)
    result: dict[str, Any] = {"parts": {}}
    assert not gpu.visit_all(options(tmp_path, minutes=1.0), visit, result)
    assert result["parts"].pop("barred")["status"] == "not begun"
    limits = [one["limit"] for one in result["parts"].values()]
    assert limits == pytest.approx([36, 30, 60], abs=2)


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PARTS", {name: part() for name in ("build", "one", "two", "three")})
    result = {"parts": {"build": {"status": "done"}, "one": {"status": "done"},
                        "two": {"status": "cut off"}}}  # fmt: skip
    assert gpu.plan(options(tmp_path), result) == ["build", "two", "three"]
    assert gpu.plan(options(tmp_path, only=["one"]), result) == ["build", "one"]


@pytest.mark.parametrize(
    ("rows", "code", "kept"),
    [
        (12, "raise SystemExit(1)", 12),
        (1, "raise SystemExit(1)", 2),
        (2, "pass", 2),
        (12, "pass", 2),
    ],
)
def test_a_later_visit_that_comes_less_far_takes_nothing_away(
    rows: int, code: str, kept: int, tmp_path: Path, visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is done counts, however few its rows are."""
    again = part(code, result=lambda visit: {"rows": [1, 2]})
    monkeypatch.setattr(gpu, "PARTS", {"build": part("pass"), "train": again})
    monkeypatch.setattr(gpu, "has_library", lambda visit: True)
    before = {"status": "cut off", "result": {"rows": [*range(rows)]}}
    result: dict[str, Any] = {"parts": {"train": before}}
    assert gpu.visit_all(options(tmp_path), visit, result) == (code == "pass")
    found = json.loads((tmp_path / "out/gpu.json").read_text())["parts"]["train"]
    assert len(found["result"]["rows"]) == kept
    assert ("later" in found) == (kept == 12)


@pytest.mark.parametrize("status", ["done", "cut off", "failed"])
def test_a_part_that_is_not_begun_takes_nothing_away(
    status: str, tmp_path: Path, visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"build": part("pass"), "tests": part("pass", least=3600)}
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "has_library", lambda visit: True)
    before = {"status": status, "result": {"passed": 1, "tests": 2, "failed": ["a::b"]}}
    result: dict[str, Any] = {"parts": {"tests": before}}
    assert not gpu.visit_all(options(tmp_path, only=["tests"]), visit, result)
    found = json.loads((tmp_path / "out/gpu.json").read_text())["parts"]["tests"]
    assert "it takes 3600" in found.pop("later")["why"]
    assert found == before


def test_the_amount_of_what_a_part_found() -> None:
    tests = {"passed": 3, "tests": 9, "failed": ["a", "b"], "groups": {"ops": {"passed": 3}}}
    assert gpu.amount({"result": tests}) == 5
    assert gpu.amount({"result": {"memcheck": {"passed": 4}, "racecheck": {"problems": 0}}}) == 4
    assert gpu.amount({"result": {"rows": [1, 2], "quantizers": [3], "date": "2026-12-01"}}) == 3
    assert gpu.amount({"result": None}) == gpu.amount({}) == 0


def test_nothing_is_measured_of_other_sources(
    tmp_path: Path, visit: Visit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where a build fails nor where there is none."""
    visit.on_gpu, visit.sources = True, "new"
    visit.libraries.mkdir()
    library = visit.libraries / "libbitkernels_cuda.so"

    def visited(code: str, sources: str, build: Part) -> dict[str, Any]:
        library.write_text("of the old")
        visit.sources = "old"
        visit.end_build(True)
        visit.sources = sources
        monkeypatch.setattr(gpu, "PARTS", {"build": build, "kernels": part(code)})
        result: dict[str, Any] = {"parts": {}}
        done = gpu.visit_all(options(tmp_path), visit, result)
        statuses = {name: one["status"] for name, one in result["parts"].items()}
        assert done == (statuses["kernels"] == "done")
        return statuses

    def building(code: str) -> Part:
        def commands(visit: Visit) -> Iterator[list[str]]:
            visit.begin_build()
            yield python(code)

        return Part(1, 0, commands, lambda visit: None)

    never = "raise SystemExit('not reached')"
    failing = visited(never, "new", building("raise SystemExit('nvcc: error')"))
    assert failing == {"build": "failed", "kernels": "not begun"}
    late = f"open({str(library)!r}, 'w').close(); raise SystemExit('the other library: error')"
    assert visited(never, "new", building(late)) == failing
    assert visited(never, "old", part("exit(1)")) == failing
    barred = Part(1, 0, lambda visit: iter(()), lambda visit: None, lambda visit: "no nvcc")
    assert visited(never, "new", barred) == {"build": "not begun", "kernels": "not begun"}
    # For the same sources an earlier build is as good as one of today.
    assert visited("pass", "old", barred) == {"build": "not begun", "kernels": "done"}
    write = f"open({str(library)!r}, 'w').close()"
    assert visited("pass", "new", building(write)) == {"build": "done", "kernels": "done"}


def test_results_of_other_sources_are_kept_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = options(tmp_path)
    fresh = gpu.begin(chosen, False)
    assert fresh["parts"] == {}
    fresh["parts"]["build"] = {"status": "done"}
    gpu.write_json(tmp_path / "out/gpu.json", fresh)
    assert gpu.begin(chosen, False)["parts"] == {"build": {"status": "done"}}
    monkeypatch.setattr(gpu, "digest", lambda: "another")
    assert gpu.begin(chosen, False)["parts"] == {}
    (aside,) = (tmp_path / "out").glob("*.json")
    assert json.loads(aside.read_text()) == fresh


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_file_of_something_else_stays(tmp_path: Path, text: str) -> None:
    path = tmp_path / "out/gpu.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(SystemExit, match=r"gpu.json must be a result of gpu.sh"):
        gpu.begin(options(tmp_path), False)
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--minutes", "0"], "--minutes must be more than 0, got 0"),
        (["--models", "no-such-folder"], "--models must be a folder of scripts/real_models.py"),
        (["--out", "x/../a", "--work", "a"], "--out must be another folder than --work"),
        (["--out", "a/results/b", "--work", "a"], "--out must be another folder than --work"),
    ],
)
def test_options_that_cannot_be(
    given: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *given])
    with pytest.raises(SystemExit):
        gpu.parse_arguments()
    assert message in capsys.readouterr().err


def test_sources_are_what_is_digested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "bitcore").mkdir()
    (tmp_path / "bitcore/a.py").write_text("1")
    before = gpu.digest()
    (tmp_path / "bitcore/notes.md").write_text("no source")
    assert gpu.digest() == before
    (tmp_path / "bitcore/a.py").write_text("2")
    assert gpu.digest() != before


def test_a_visit_that_is_ended_ends_what_runs(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from gpu import Runner\n"
        f"runner = Runner(Path({str(tmp_path / 'gpu.log')!r}))\n"
        "runner.run([sys.executable, '-c', 'import os, time; print(os.getpid(), flush=True);"
        " time.sleep(60)'], 60, dict(__import__('os').environ))"
    )
    paths = os.pathsep.join([str(ROOT / "scripts"), str(ROOT)])
    process = subprocess.Popen(python(code), env={**os.environ, "PYTHONPATH": paths},
                               stderr=subprocess.PIPE)  # fmt: skip
    log, lines = tmp_path / "gpu.log", []
    for _ in range(600):
        lines = log.read_text().split("\n") if log.is_file() else []
        if lines and lines[-1] == "" and lines[-2].isdigit():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"what is done is written" in error
    assert not Path(f"/proc/{lines[-2]}").exists()


def test_packages_that_do_not_serve_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"torch": "2.11.0+cu130", "transformers": "5.17.0", "numpy": "2.5.2"}

    def version(name: str) -> str:
        if name not in there:
            raise importlib.metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    lines = {line.split()[0]: line for line in gpu.packages()}
    assert "serves" in lines["torch"]
    assert "serves" in lines["numpy"]
    assert "BRING transformers==" in lines["transformers"]
    assert "not there" in lines["safetensors"]


@pytest.mark.ci
def test_all_of_it_without_a_gpu(tmp_path: Path, host_library: ctypes.CDLL) -> None:
    command = [str(ROOT / "scripts/gpu.sh"), "--quick", "--minutes", "60"]
    command += ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    environment = {
        **os.environ, "PYTHON": sys.executable, gpu_visit.HOST_LIBRARY_VARIABLE: host_library._name,
    }  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    log = (tmp_path / "out/gpu.log").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log[-3000:]
    result = json.loads((tmp_path / "out/gpu.json").read_text())
    assert list(result["parts"]) == list(gpu_parts.PARTS)
    assert {one["status"] for one in result["parts"].values()} == {"done"}
    assert all(one["result"] for one in result["parts"].values())
    assert result["parts"]["tests"]["result"]["passed"] > 5
    assert result["quick"]
    assert "no GPU: no time here is a measurement" in result["gpu"]
    # The tiny layers are none of the page's, and a CPU's memory is measured elsewhere.
    assert done.stdout.count("Not measured.") == 3, done.stdout
    with pytest.raises(SystemExit, match=r"--quick"):
        page.take(tmp_path / "out/gpu.json", None, tmp_path)
    again = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert again.returncode == 0
    assert "train ..." not in again.stdout
