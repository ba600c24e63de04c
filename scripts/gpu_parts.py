"""The parts of a visit to a GPU: what each runs, and what is kept of it; see gpu.py.

Without a GPU a quick visit runs the same parts: the kernels on the emulator, which is their
sanitizer too, and the benchmarks on the CPU.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts/bench")]

from native_build import find_program, missing_programs  # noqa: E402

# As tests/conftest.py names it.
HOST_LIBRARY_VARIABLE = "BITLAB_CUDA_HOST_LIBRARY"

Result = dict[str, Any]
# Of the tests: those that compute-sanitizer slows down to seconds, one of each kernel.
SHORT = "shape0 or shape2 or shape4 or shape6 or int8_weights or training_step"
TOOLS = ("memcheck", "racecheck")
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
# Seconds that transformers' packed models take at least: one makes eleven tokens a second.
PACKED_PEER = 90
# The second takes so many times the training of the first.
LONGER = {"default-10m": 1, "default-50m": 5}


@dataclass
class Visit:
    """What the parts have to know.

    Attributes:
        work: A folder for libraries, checkpoints and texts; may be lost.
        on_gpu: Whether there is a GPU.
        quick: Whether shapes are tiny, to see that everything runs.
        models: What scripts/real_models.py made; None where it was not brought.
        sources: What stands for them; models that others made are not gone on with.
        installed: Whether to measure the installed libraries, and to build none.
        left: Returns the seconds that are left to the part that runs.
    """

    work: Path
    on_gpu: bool
    quick: bool
    models: Path | None
    sources: str = ""
    installed: bool = False
    left: Callable[[], float] = lambda: float("inf")

    def bench(self, script: str, result: str, *options: str) -> list[str]:
        """Returns the command of a benchmark that writes its result into the work folder."""
        command = [sys.executable, str(ROOT / "scripts/bench" / script), *options]
        command += ["--json", str(self.work / result)]
        return [*command, "--quick"] if self.quick else command

    def pytest(self, report: str, *options: str) -> list[str]:
        """Returns the command of tests that writes their report into the work folder."""
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        return [*command, f"--junitxml={self.work / report}", *options]

    def clear(self) -> None:
        """Removes what earlier commands have written, which is no part's that follows."""
        for path in self.work.iterdir():
            if path.is_file():
                path.unlink()

    def read(self, name: str) -> Result | None:
        """Returns a result in the work folder; None where a cut-off came first."""
        path = self.work / name
        found: Result | None = json.loads(path.read_text()) if path.is_file() else None
        return found


@dataclass(frozen=True)
class Part:
    """One part of a visit.

    Attributes:
        weight: Its share of the time that is left when its turn comes, beside those after it.
        least: Seconds without which it is not begun.
        commands: Yields what it runs, one after another.
        result: Reads what it has found, also when it was cut off.
        problem: Returns why it cannot run here; None where it can.
    """

    weight: float
    least: float
    commands: Callable[[Visit], Iterator[list[str]]]
    result: Callable[[Visit], Result | None]
    problem: Callable[[Visit], str | None] = lambda visit: None


def host_library(work: Path) -> Path:
    """Returns where the kernels are, compiled for the emulator; the variable of the tests' fixture
    names one that is there already.
    """
    given = os.environ.get(HOST_LIBRARY_VARIABLE)
    return Path(given) if given else work / "libraries" / "libbitkernels_cuda_host.so"


def _build(visit: Visit) -> Iterator[list[str]]:
    if visit.installed:
        return
    script = "scripts/bench/native_build.py"
    if not visit.on_gpu:
        library, script = host_library(visit.work), "tests/native/cuda/build_host.py"
        made = library.stat().st_mtime if library.is_file() else 0
        read = [*(ROOT / "csrc").rglob("*.*"), *(ROOT / "tests/native/cuda").glob("*.*")]
        if all(file.stat().st_mtime < made for file in read):
            return
    yield [sys.executable, str(ROOT / script), str(visit.work / "libraries")]


def _built(visit: Visit) -> Result | None:
    folder = visit.work / "libraries" if visit.on_gpu else host_library(visit.work).parent
    if visit.installed:
        from bitcore.kernels.native import library_path

        folder = library_path("bitkernels_cuda").parent
    libraries = sorted(folder.glob("*.so"))
    return {"libraries": [path.name for path in libraries]} if libraries else None


def _no_build(visit: Visit) -> str | None:
    missing = missing_programs() if visit.on_gpu and not visit.installed else []
    return f"missing {'; '.join(missing)}" if missing else None


def marked_tests() -> list[str]:
    """Returns the files whose tests want a GPU."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    found = [
        file for file in files if re.search(r"^pytestmark = .*\bgpu\b", file.read_text(), re.M)
    ]
    return [str(file.relative_to(ROOT)) for file in found]


def _tests(visit: Visit) -> Iterator[list[str]]:
    if not visit.on_gpu:
        some = "extreme_codes or one_token_with_groups or ties_of_weights"
        yield visit.pytest("tests.xml", "tests/native/cuda/test_kernels.py", "-k", some)
        return
    yield visit.pytest("tests.xml", "-m", "gpu", *marked_tests())
    nvcc = find_program("nvcc")
    if nvcc is not None:
        # The tables of mma's and wgmma's fragments, which the emulator takes for granted.
        include = [
            f"-I{ROOT / path}" for path in ("csrc/include", "csrc/cuda", "tests/native/cuda")
        ]
        source, program = ROOT / "tests/native/cuda/fragments_gpu.cu", visit.work / "fragments"
        hopper = ["-gencode=arch=compute_90a,code=sm_90a", '-DBK_CUDA_ARCHITECTURES="sm_90a"']
        target = hopper if _is_hopper() else ["-arch=native"]
        yield [nvcc, "-std=c++17", *target, *include, str(source), "-o", str(program)]
        yield [str(program)]


def _is_hopper() -> bool:
    import torch

    return torch.cuda.get_device_capability() == (9, 0)


def _tested(report: str) -> Callable[[Visit], Result | None]:
    def read(visit: Visit) -> Result | None:
        path = visit.work / report
        if not path.is_file():
            return None
        (suite,) = ElementTree.parse(path).getroot().iter("testsuite")
        count = {
            name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")
        }
        bad = [
            f"{case.get('classname')}::{case.get('name')}"
            for case in suite.iter("testcase")
            if case.find("failure") is not None or case.find("error") is not None
        ]
        passed = count["tests"] - count["failures"] - count["errors"] - count["skipped"]
        return {"passed": passed, **count, "failed": bad}

    return read


def _sanitizer(visit: Visit) -> Iterator[list[str]]:
    if not visit.on_gpu:
        some = "faults_are_reported or fragment_tables"
        yield visit.pytest("sanitizer.xml", "tests/native/cuda/test_emulator.py", "-k", some)
        return
    for tool in TOOLS:
        command = [str(find_program("compute-sanitizer")), "--tool", tool, "--error-exitcode", "9"]
        tests = visit.pytest(
            f"{tool}.xml", "tests/bitcore/test_cuda_gpu.py", "-m", "gpu", "-k", SHORT
        )
        yield [*command, "--log-file", str(visit.work / f"{tool}.txt"), *tests]


def _sanitized(visit: Visit) -> Result | None:
    if not visit.on_gpu:
        return _tested("sanitizer.xml")(visit)
    found: Result = {}
    for tool in TOOLS:
        log = visit.work / f"{tool}.txt"
        counts = SUMMARY.findall(log.read_text()) if log.is_file() else []
        if counts:
            tests = _tested(f"{tool}.xml")(visit)
            found[tool] = {"problems": int(counts[-1]), "tests": tests and tests["passed"]}
    return found or None


def _no_sanitizer(visit: Visit) -> str | None:
    if visit.on_gpu and find_program("compute-sanitizer") is None:
        return "missing compute-sanitizer (of the CUDA toolkit)"
    return None


def _train(visit: Visit) -> Iterator[list[str]]:
    few = ["--tokens", "16", "--rounds", "2"] if visit.quick else ["--cell-seconds", "3"]
    few += [] if visit.on_gpu else ["--no-memory", "--threads", "1"]
    yield visit.bench("train.py", "train.json", "--device", "cuda", "--no-png", *few)


def _compiled(visit: Visit) -> Iterator[list[str]]:
    few = ["--engines", "plain", "bitlab", "--device", "cuda", "--no-png", "--compile"]
    # On a CPU, where nothing is measured, only traced.
    few += [] if visit.on_gpu else ["aot_eager", "--rounds", "1", "--no-memory"]
    few += ["--tokens", "16" if visit.quick else "4096"]
    yield visit.bench("train.py", "compiled.json", *few)


def _generate(visit: Visit) -> Iterator[list[str]]:
    options = ["--cache", "static", "--no-png", "--rounds", "1"]
    options += ["--device", "cuda" if visit.on_gpu else "cpu", "--work", str(visit.work / "whole")]
    options += [] if visit.quick else ["--decode", "127"]
    engines = ["--engines", "bitlab int8", "dense bf16"]
    yield visit.bench("generate.py", "generate.json", *options, *engines)
    # All of them again, in one run; the checkpoints of two are there already.
    if visit.on_gpu and visit.left() > PACKED_PEER:
        yield visit.bench("generate.py", "generate-all.json", *options, *engines, "bitnet packed")


def _generated(visit: Visit) -> Result | None:
    return visit.read("generate-all.json") or visit.read("generate.json")


def _kernels(visit: Visit) -> Iterator[list[str]]:
    # First what targets are stated for, and 2B-4T's; a cut-off loses the last of them.
    shapes = "8192x8192 14336x4096 6912x2560 2560x6912 28672x8192 8192x28672 2560x2560 640x2560"
    chosen = [] if visit.quick else ["--shapes", *shapes.split()]
    yield visit.bench("cuda.py", "kernels.json", "--no-generate", *chosen)


def _experts(visit: Visit) -> Iterator[list[str]]:
    few = ["--geometry", "qwen3", "--threads", "1"] if not visit.on_gpu else []
    yield visit.bench("experts.py", "experts.json", "--device", "cuda", *few)


def _quality(visit: Visit) -> Iterator[list[str]]:
    command = [sys.executable, str(ROOT / "scripts/bench/quality.py")]
    command += ["--device", "cuda" if visit.on_gpu else "cpu"]
    command += ["--folder", str(visit.work / _made(visit))]
    if visit.quick:
        models = _quick_models(visit.work / "quick")
        few = ["--models", str(models), "--model", "demo", "--blocks", "2", "--examples", "2"]
        yield [*command, *few, "--rows", "quick"]
        return
    command += ["--models", str(visit.models), "--bf16", "--rows"]
    rows = list(LONGER)
    yield [*command, rows[0]]
    made = visit.read(f"{_made(visit)}/smollm2-135m/{rows[0]}/seed-1/making.json")
    for row in rows[1:]:
        if made is not None and LONGER[row] * made["seconds"] < visit.left():
            yield [*command, row]


def _quality_read(visit: Visit) -> Result | None:
    return visit.read(f"{_made(visit)}/{'demo' if visit.quick else 'smollm2-135m'}/quality.json")


def _made(visit: Visit) -> str:
    return f"quality-{visit.sources}"


def _no_models(visit: Visit) -> str | None:
    if visit.quick or visit.models is not None:
        return None
    return "needs --models FOLDER, which scripts/real_models.py makes where there is a network"


def _quick_models(folder: Path) -> Path:
    """Returns a folder of a model and articles: the demo's, and BitLab's own documents."""
    if not (folder / "demo").is_dir():
        shutil.copytree(ROOT / "bitlab_hf/demo/model", folder / "demo")
    articles = [
        {"title": file.stem, "text": file.read_text(), "description": "", "topic": "document"}
        for file in sorted((ROOT / "docs").glob("*.md"))
    ]
    (folder / "wikipedia").mkdir(exist_ok=True)
    for part, some in (("fit", articles[2:]), ("test", articles[:2])):
        lines = "".join(json.dumps(article) + "\n" for article in some)
        (folder / "wikipedia" / f"{part}.jsonl").write_text(lines)
    return folder


def _written(name: str) -> Callable[[Visit], Result | None]:
    return lambda visit: visit.read(name)


# The most important first; each must be able to run without those before it, but for the build.
PARTS: dict[str, Part] = {
    # Nothing runs without it, so it may take half of the time; what it leaves goes on.
    "build": Part(14, 20, _build, _built, _no_build),
    "tests": Part(1.5, 20, _tests, _tested("tests.xml")),
    "sanitizer": Part(2.5, 30, _sanitizer, _sanitized, _no_sanitizer),
    "train": Part(2, 25, _train, _written("train.json")),
    "generate": Part(3, 40, _generate, _generated),
    "kernels": Part(1.5, 20, _kernels, _written("kernels.json")),
    "experts": Part(1, 20, _experts, _written("experts.json")),
    "quality": Part(2, 60, _quality, _quality_read, _no_models),
    "compiled": Part(1, 40, _compiled, _written("compiled.json")),
}
