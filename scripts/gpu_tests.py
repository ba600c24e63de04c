"""The parts of a visit to a GPU that look for faults: the tests, and compute-sanitizer."""

from __future__ import annotations

import re
from collections.abc import Iterator

from gpu_pytest import read_report
from gpu_visit import ROOT, Result, Visit
from native_build import find_program

OPS = "tests/bitcore/test_cuda_gpu.py"
# Of these, the kernels that do several things in one launch, experts, and what a graph replays.
FUSED = "experts or few_tokens or graph"
# Of one test.
TEST_SECONDS = "60"
# Of the tests: those that compute-sanitizer slows down to seconds, one of each kernel.
SHORT = "shape0 or shape2 or shape4 or shape6 or int8_weights or training_step"
TOOLS = ("memcheck", "racecheck")
# By torch's allocator, tensors lie in blocks of megabytes, of which memcheck sees the ends only.
EACH_ALLOCATED = "PYTORCH_NO_CUDA_MEMORY_CACHING=1"
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")


def marked_tests() -> list[str]:
    """Returns the files whose tests want a GPU."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    found = [
        file for file in files if re.search(r"^pytestmark = .*\bgpu\b", file.read_text(), re.M)
    ]
    return [str(file.relative_to(ROOT)) for file in found]


def groups() -> dict[str, list[str]]:
    """Returns pytest's options for tests that share a process, the most important first: after an
    illegal access all that follow in its process fail.
    """
    models = [file for file in marked_tests() if file != OPS]
    found = {"ops": [OPS, "-k", f"not ({FUSED})"], "fused": [OPS, "-k", FUSED], "models": models}
    return {name: ["-m", "gpu", "--timeout", TEST_SECONDS, *one] for name, one in found.items()}


def tests(visit: Visit) -> Iterator[list[str]]:
    """Yields the commands of the tests."""
    if not visit.on_gpu:
        some = "extreme_codes or one_token_with_groups or ties_of_weights"
        yield visit.pytest("tests-ops.jsonl", "tests/native/cuda/test_kernels.py", "-k", some)
        return
    for name, options in groups().items():
        yield visit.pytest(f"tests-{name}.jsonl", *options)
    nvcc = find_program("nvcc")
    if nvcc is not None:
        # The tables of mma's and wgmma's fragments, which the emulator takes for granted.
        include = [
            f"-I{ROOT / path}" for path in ("csrc/include", "csrc/cuda", "tests/native/cuda")
        ]
        source, program = ROOT / "tests/native/cuda/fragments_gpu.cu", visit.results / "fragments"
        hopper = ["-gencode=arch=compute_90a,code=sm_90a", '-DBK_CUDA_ARCHITECTURES="sm_90a"']
        target = hopper if _is_hopper() else ["-arch=native"]
        yield [nvcc, "-std=c++17", *target, *include, str(source), "-o", str(program)]
        yield [str(program)]


def _is_hopper() -> bool:
    import torch

    return torch.cuda.get_device_capability() == (9, 0)


def tested(visit: Visit) -> Result | None:
    """Returns what came of the tests, together and by process."""
    read = {name: read_report(visit.results / f"tests-{name}.jsonl") for name in groups()}
    found = {name: one for name, one in read.items() if one is not None}
    if not found:
        return None
    count = {key: sum(one[key] for one in found.values()) for key in ("tests", "passed", "skipped")}
    failed = [test for one in found.values() for test in one["failed"]]
    ended = ", ".join(one["ended_in"] for one in found.values() if one["ended_in"] is not None)
    return {**count, "failed": failed, "ended_in": ended or None, "groups": found}


def sanitizer(visit: Visit) -> Iterator[list[str]]:
    """Yields the commands of compute-sanitizer."""
    if not visit.on_gpu:
        some = "faults_are_reported or fragment_tables"
        yield visit.pytest("emulator.jsonl", "tests/native/cuda/test_emulator.py", "-k", some)
        return
    for tool in TOOLS:
        command = ["env", EACH_ALLOCATED] if tool == "memcheck" else []
        command += [str(find_program("compute-sanitizer")), "--tool", tool, "--error-exitcode", "9"]
        tests = visit.pytest(f"{tool}.jsonl", OPS, "-m", "gpu", "-k", SHORT)
        yield [*command, "--log-file", str(visit.results / f"{tool}.txt"), *tests]


def sanitized(visit: Visit) -> Result | None:
    """Returns what each tool found, and in which tests."""
    if not visit.on_gpu:
        return read_report(visit.results / "emulator.jsonl")
    found: Result = {}
    for tool in TOOLS:
        log, report = visit.results / f"{tool}.txt", read_report(visit.results / f"{tool}.jsonl")
        counts = SUMMARY.findall(log.read_text()) if log.is_file() else []
        if counts or report is not None:
            found[tool] = {"problems": int(counts[-1]) if counts else None, **(report or {})}
    return found or None


def no_sanitizer(visit: Visit) -> str | None:
    """Returns what compute-sanitizer lacks here."""
    if visit.on_gpu and find_program("compute-sanitizer") is None:
        return "missing compute-sanitizer (of the CUDA toolkit)"
    return None
