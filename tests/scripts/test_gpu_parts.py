"""The parts of a visit to a GPU, without one: their commands, what is read of them, libraries."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "scripts/bench")]

import gpu  # noqa: E402
import gpu_parts  # noqa: E402
import gpu_pytest  # noqa: E402
import gpu_tests  # noqa: E402
import native_build  # noqa: E402
import page  # noqa: E402
import page_runs  # noqa: E402
from gpu_visit import Visit  # noqa: E402

SOURCES = "0123456789abcdef"
MACHINE = {"cpu": "a CPU", "cores": 2, "memory_bytes": 2**30, "versions": {"torch": "2.13.0"}}


@pytest.fixture
def visit(tmp_path: Path) -> Visit:
    found = Visit(tmp_path / "work", True, False, None, SOURCES)
    found.clear()
    return found


def write_report(path: Path, *lines: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def passed(name: str) -> list[dict[str, Any]]:
    return [{"begun": name}, {"test": name, "outcome": "passed"}]


def test_the_sanitizers_summaries(visit: Visit) -> None:
    part = gpu_parts.PARTS["sanitizer"]
    assert part.result(visit) is None
    (visit.results / "memcheck.txt").write_text(
        "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
    )
    (visit.results / "racecheck.txt").write_text(
        "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n"
    )
    failed = {"test": "b", "outcome": "failed"}
    write_report(visit.results / "memcheck.jsonl", {"tests": 3}, *passed("a"), failed)
    found = part.result(visit)
    assert found is not None
    assert found["memcheck"] == {
        "problems": 0, "tests": 3, "passed": 1, "skipped": 0, "failed": ["b"], "ended_in": None
    }  # fmt: skip
    assert found["racecheck"] == {"problems": 2}


def test_memcheck_sees_each_tensor_alone(visit: Visit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tests, "find_program", lambda name: f"/bin/{name}")
    memcheck, racecheck = gpu_parts.PARTS["sanitizer"].commands(visit)
    assert memcheck[:3] == [
        "env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "/bin/compute-sanitizer",
    ]  # fmt: skip
    assert "env" not in racecheck


def test_tests_that_are_cut_off_are_counted(visit: Visit) -> None:
    """Of each process what it came to: one that hung, one that ended, one that never began."""
    part = gpu_parts.PARTS["tests"]
    assert part.result(visit) is None
    ops = [{"tests": 90}, *passed("a"), *passed("b"), {"begun": "c"}]
    write_report(visit.results / "tests-ops.jsonl", *ops)
    # An error of a fixture behind a test that passed, and half a line.
    late = [{"tests": 2}, *passed("d"), {"test": "d", "outcome": "failed"}, *passed("e")]
    write_report(visit.results / "tests-fused.jsonl", *late)
    with (visit.results / "tests-fused.jsonl").open("a") as file:
        file.write('{"begun": "f')
    found = part.result(visit)
    assert found is not None
    groups = found.pop("groups")
    assert found == {"tests": 92, "passed": 3, "skipped": 0, "failed": ["d"], "ended_in": "c"}
    assert list(groups) == ["ops", "fused"]
    words = gpu.describe({"status": "failed", "result": found})
    assert words == "failed; 3 of 92 tests passed, failed: d, ended in c"


def test_processes_of_tests(visit: Visit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test for a GPU is in one of them."""
    monkeypatch.setattr(gpu_tests, "find_program", lambda name: None)
    ops, fused, models = gpu_parts.PARTS["tests"].commands(visit)
    assert len({command[2] for command in (ops, fused, models)}) == 3
    for command in (ops, fused, models):
        assert command[command.index("--timeout") + 1] == "60"
    assert gpu_tests.OPS in ops
    assert gpu_tests.OPS in fused
    assert ops[-1] == f"not ({fused[-1]})"
    assert {gpu_tests.OPS, *models} >= set(gpu_tests.marked_tests())
    assert "tests/bitlab_hf/test_gpu.py" in models
    assert all((ROOT / name).is_file() for name in gpu_tests.marked_tests())


def start_tests(folder: Path, code: str, *options: str) -> subprocess.Popen[bytes]:
    (folder / "test_some.py").write_text(code)
    command = [sys.executable, str(ROOT / "scripts/gpu_pytest.py"), str(folder / "report")]
    command += ["test_some.py", "-p", "no:xdist", *options]
    log = (folder / "log").open("w")
    return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)


def test_what_a_killed_process_has_tested_is_known(tmp_path: Path) -> None:
    code = (
        "import time, pytest\n"
        "@pytest.fixture\n"
        "def broken():\n    yield\n    raise ValueError\n"
        "@pytest.mark.parametrize('n', range(3))\n"
        "def test_good(n): pass\n"
        "def test_bad(): assert False\n"
        "def test_late(broken): pass\n"
        "def test_left_out(): pytest.skip()\n"
        "def test_hangs(): time.sleep(60)\n"
        "def test_never(): pass\n"
    )
    process = start_tests(tmp_path, code)
    for _ in range(600):
        found = gpu_pytest.read_report(tmp_path / "report")
        if found is not None and found["ended_in"] == "test_some.py::test_hangs":
            break
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert found == {
        "tests": 8, "passed": 3, "skipped": 1, "ended_in": "test_some.py::test_hangs",
        "failed": ["test_some.py::test_bad", "test_some.py::test_late"],
    }  # fmt: skip
    assert "test_some.py::test_good[2] PASSED" in (tmp_path / "log").read_text()


def test_a_kernel_that_hangs_ends_its_process_only(tmp_path: Path) -> None:
    """As one: no signal is looked at, and the test's time has no effect."""
    code = (
        "import signal, time\n"
        "def test_slow(): time.sleep(60)\n"
        "def test_hangs():\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})\n"
        "    time.sleep(60)\n"
    )
    started = time.monotonic()
    assert start_tests(tmp_path, code, "--timeout", "1").wait() == 1
    assert time.monotonic() - started < 30
    found = gpu_pytest.read_report(tmp_path / "report")
    assert found is not None
    assert found["failed"] == ["test_some.py::test_slow"]
    assert found["ended_in"] == "test_some.py::test_hangs"
    assert "in test_hangs" in (tmp_path / "log").read_text()


def test_which_library_is_measured(visit: Visit, monkeypatch: pytest.MonkeyPatch) -> None:
    """That which was built; the installed one only where it is asked for."""
    monkeypatch.delenv("BITLAB_LIBRARY_DIR", raising=False)
    assert not gpu.has_library(visit)
    visit.libraries.mkdir()
    (visit.libraries / "libbitkernels_cuda.so").touch()
    assert not gpu.has_library(visit)
    visit.end_build(True)
    assert gpu.has_library(visit)
    assert gpu.environment_of(visit)["BITLAB_LIBRARY_DIR"] == str(visit.libraries)
    visit.begin_build()
    assert not list(visit.libraries.iterdir())
    visit.installed = True
    assert not list(gpu_parts.PARTS["build"].commands(visit))
    monkeypatch.setenv("BITLAB_LIBRARY_DIR", str(visit.work))
    assert not gpu.has_library(visit)
    problem = gpu_parts.PARTS["build"].problem(visit)
    assert problem is not None
    assert "BITLAB_LIBRARY_DIR" in problem


def test_an_installed_library_is_found_behind_the_sources(
    visit: Visit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `pip install .` has put beside other packages, where a clone comes first."""
    import bitcore.kernels.native

    nowhere = tmp_path / "clone/bitcore/lib/libbitkernels_cuda.so"
    monkeypatch.setattr(bitcore.kernels.native, "library_path", lambda name: nowhere)
    monkeypatch.delenv("BITLAB_LIBRARY_DIR", raising=False)
    info, library = tmp_path / "site/bitlab_hf-0.1.0.dist-info", tmp_path / "site/bitcore/lib"
    for folder in (info, library):
        folder.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bitlab-hf\nVersion: 0.1.0\n")
    (info / "RECORD").write_text("bitcore/lib/libbitkernels_cuda.so,,\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    visit.installed = True
    assert not gpu.has_library(visit)
    (library / "libbitkernels_cuda.so").touch()
    assert gpu.environment_of(visit)["BITLAB_LIBRARY_DIR"] == str(library)
    part = gpu_parts.PARTS["build"]
    assert part.problem(visit) is None
    assert part.result(visit) == {"libraries": ["libbitkernels_cuda.so"]}


def test_checkpoints_are_of_these_sources_and_sizes(visit: Visit) -> None:
    """Those of others are removed, being large; nothing else is."""
    quick = Visit(visit.work, True, True, None, SOURCES)
    assert len({visit.kept("whole"), quick.kept("whole"), visit.kept("quality")}) == 3
    mine = {visit.kept("whole"), quick.kept("whole"), visit.work / "whole-life"}
    others = {visit.work / f"whole-{'f' * 16}", visit.work / f"whole-{'f' * 16}-quick"}
    for folder in mine | others:
        (folder / "dense").mkdir(parents=True)
    first, packed = gpu_parts.PARTS["generate"].commands(visit)
    assert {path for path in visit.work.iterdir() if path.name != "results"} == mine
    for command in (first, packed):
        assert command[command.index("--work") + 1] == str(visit.kept("whole"))
    assert packed[packed.index("--engines") + 1 : packed.index("--json")] == ["bitnet packed"]


def test_engines_that_are_measured_before_a_cut_off_count(visit: Visit) -> None:
    """The packed peer, in a command of its own, joins the others where there is time for it."""
    part = gpu_parts.PARTS["generate"]
    assert part.result(visit) is None
    speeds = {"bitlab int8": 240.0, "dense bf16": 200.0, "bitnet packed": 12.0}
    engines = [{"engine": name, "decode_tok_s": speed} for name, speed in speeds.items()]
    common = {"date": "2026-12-01", "device": "cuda"}

    def rows(name: str, measured: list[dict[str, Any]]) -> list[str]:
        command = f"python scripts/bench/generate.py --json /x/{name}.json --rounds 1"
        found = json.dumps({**common, "command": command, "engines": measured})
        (visit.results / f"{name}.json").write_text(found)
        result = {"gpu": "NVIDIA H200", "cuda": "13.0", "machine": MACHINE,
                  "parts": {"generate": {"result": part.result(visit)}}}  # fmt: skip
        (run,) = page_runs.runs_of(result)
        assert "/x/" not in run.command
        return [line for line in page.render("gpu-whole", [run]).splitlines() if "bitlab" in line]

    assert rows("generate", engines[:1]) == []
    (line,) = rows("generate", engines[:2])
    assert line.startswith("| bitlab int8 | dense bf16 | 240 | 200 | 1.20 |")
    assert rows("packed", []) == [line]
    assert rows("packed", engines[2:])[0] == line
    line = rows("packed", engines[2:])[1]
    assert line.startswith("| bitlab int8 | bitnet packed | 240 | 12.0 | 20.0 |")
    found = part.result(visit)
    assert found is not None
    assert found["command"].count("python scripts/bench/generate.py") == 2
    visit.left = lambda: gpu_parts.PACKED_PEER - 1
    assert len(list(part.commands(visit))) == 1


@pytest.mark.parametrize("quick", [False, True])
def test_commands_for_a_gpu(quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot run here: every script is there and has every option that it is given."""
    monkeypatch.setattr(gpu_tests, "_is_hopper", lambda: True)
    monkeypatch.setattr(gpu_tests, "find_program", lambda name: f"/bin/{name}")
    visit = Visit(tmp_path, True, quick, tmp_path / "models")
    made = visit.kept("quality") / "smollm2-135m/default-10m/seed-1/making.json"
    made.parent.mkdir(parents=True)
    made.write_text('{"seconds": 1.0}')
    checked = 0
    for name, one in gpu_parts.PARTS.items():
        commands = list(one.commands(visit))
        assert commands, name
        assert name != "quality" or len(commands) == (1 if quick else 2)
        for command in commands:
            scripts = [
                word for word in command if word.startswith(str(ROOT)) and word.endswith(".py")
            ]
            for script in scripts:
                text = Path(script).read_text()
                options = [word for word in command if word.startswith("--")]
                # The other ones are pytest's and compute-sanitizer's.
                if Path(script).name != "gpu_pytest.py":
                    assert all(f'"{option}"' in text for option in options), command
                    checked += len(options)
            assert ("--device" in command) <= ("cuda" in command)
            assert ("--quick" in command) <= quick
    assert checked > 30


def test_what_a_build_is_for_and_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert native_build.architecture((9, 0)) == "90a-real"
    assert native_build.architecture((8, 6)) == "86-real"
    monkeypatch.setattr(native_build, "find_program", lambda name: None)
    missing = "; ".join(native_build.missing_programs())
    assert all(name in missing for name in ("nvcc", "cmake", "c++"))
    with pytest.raises(SystemExit, match=r"missing nvcc"):
        native_build.build_libraries(tmp_path, "90a-real")


def test_the_tables_of_a_visit() -> None:
    """Of each part that the page shows, and "Not measured" where a cut-off came first."""
    rows = [
        {"precision": "bfloat16", "geometry": "8B", "m": 4096, "engine": engine,
         "time": {"step_ms": ms}, "bytes": {"peak": 2e9}, "failed": None}
        for engine, ms in (("plain", 10.0), ("bitlab", 11.0))
    ]  # fmt: skip
    command = "python scripts/bench/train.py --json /x/y.json"
    train = {
        "device": "cuda",
        "date": "2026-12-01",
        "command": command,
        "rows": rows,
        "targets": [],
    }
    result = {"gpu": "NVIDIA H200", "cuda": "13.0", "machine": MACHINE,
              "parts": {"train": {"result": train}, "generate": {"result": None}}}  # fmt: skip
    tables = page.visit_tables(result)
    assert "| 8B, bfloat16 | 4096 | plain | 11.0 | 10.0 | 1.10 | H200 | 2026-12-01 |" in tables
    assert "| 8B, bfloat16 | 4096 | plain | 2000 | 2000 | 1.00 | H200 | 2026-12-01 |" in tables
    assert tables.count("Not measured.") == len(page.GPU_TABLES) - 2
