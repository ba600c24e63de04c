"""The parts of a visit to a GPU: what each runs, and what is kept of it; see gpu.py.

Without a GPU a quick visit runs the same parts: the kernels on the emulator, which is their
sanitizer too, and the benchmarks on the CPU.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import gpu_tests
from gpu_visit import (
    HOST_LIBRARY,
    HOST_LIBRARY_VARIABLE,
    ROOT,
    Part,
    Result,
    Visit,
    installed_library,
    read_json,
)
from native_build import missing_programs

NOT_INSTALLED = (
    "the installed BitLab has no libbitkernels_cuda: it needs `pip install .` where nvcc is, or "
    "BITLAB_LIBRARY_DIR"
)
# Seconds that transformers' packed models take at least: one makes eleven tokens a second.
PACKED_PEER = 90
# The second takes so many times the training of the first.
LONGER = {"default-10m": 1, "default-50m": 5}


def _build(visit: Visit) -> Iterator[list[str]]:
    if visit.installed:
        return
    script = "scripts/bench/native_build.py"
    if not visit.on_gpu:
        if HOST_LIBRARY_VARIABLE in os.environ:
            return
        library, script = visit.libraries / HOST_LIBRARY, "tests/native/cuda/build_host.py"
        made = library.stat().st_mtime if library.is_file() else 0
        read = [*(ROOT / "csrc").rglob("*.*"), *(ROOT / "tests/native/cuda").glob("*.*")]
        if all(file.stat().st_mtime < made for file in read):
            return
    visit.begin_build()
    yield [sys.executable, str(ROOT / script), str(visit.libraries)]


def _built(visit: Visit) -> Result | None:
    measured = visit.library()
    found = [] if visit.installed else sorted(visit.libraries.glob("*.so"))
    if measured is not None:
        found = found or [measured]
    return {"libraries": [path.name for path in found]} if found else None


def _no_build(visit: Visit) -> str | None:
    if not visit.on_gpu:
        return None
    if visit.installed:
        return None if installed_library() is not None else NOT_INSTALLED
    missing = missing_programs()
    return f"missing {'; '.join(missing)}" if missing else None


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
    visit.drop_others("whole")
    options = ["--cache", "static", "--no-png", "--rounds", "1"]
    options += ["--device", "cuda" if visit.on_gpu else "cpu", "--work", str(visit.kept("whole"))]
    options += [] if visit.quick else ["--decode", "127"]
    engines = ["--engines", "bitlab int8", "dense bf16"]
    yield visit.bench("generate.py", "generate.json", *options, *engines)
    if visit.on_gpu and visit.left() > PACKED_PEER:
        yield visit.bench("generate.py", "packed.json", *options, "--engines", "bitnet packed")


def _generated(visit: Visit) -> Result | None:
    found, packed = visit.read("generate.json"), visit.read("packed.json")
    if found is None or packed is None:
        return found or packed
    commands = f"{found['command']}; {packed['command']}"
    return {**found, "command": commands, "engines": [*found["engines"], *packed["engines"]]}


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
    command += ["--folder", str(visit.kept("quality"))]
    if visit.quick:
        models = _quick_models(visit.work / "quick")
        few = ["--models", str(models), "--model", "demo", "--blocks", "2", "--examples", "2"]
        yield [*command, *few, "--rows", "quick"]
        return
    command += ["--models", str(visit.models), "--bf16", "--rows"]
    rows = list(LONGER)
    yield [*command, rows[0]]
    made = read_json(visit.kept("quality") / f"smollm2-135m/{rows[0]}/seed-1/making.json")
    for row in rows[1:]:
        if made is not None and LONGER[row] * made["seconds"] < visit.left():
            yield [*command, row]


def _quality_read(visit: Visit) -> Result | None:
    model = "demo" if visit.quick else "smollm2-135m"
    return read_json(visit.kept("quality") / model / "quality.json")


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
    "build": Part(16, 20, _build, _built, _no_build),
    "tests": Part(3, 20, gpu_tests.tests, gpu_tests.tested),
    "sanitizer": Part(2.5, 30, gpu_tests.sanitizer, gpu_tests.sanitized, gpu_tests.no_sanitizer),
    "train": Part(2, 25, _train, _written("train.json")),
    "generate": Part(3, 40, _generate, _generated),
    "kernels": Part(1.5, 20, _kernels, _written("kernels.json")),
    "experts": Part(1, 20, _experts, _written("experts.json")),
    "quality": Part(2, 60, _quality, _quality_read, _no_models),
    "compiled": Part(1, 40, _compiled, _written("compiled.json")),
}
