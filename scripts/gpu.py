"""Everything that wants a GPU, in one visit of minutes, most important first.

    scripts/gpu.sh                       # 9 minutes; goes on where the last one was cut off
    scripts/gpu.sh --only train kernels --minutes 4
    scripts/gpu.sh --wheels              # what has to be brought where there is no network
    scripts/gpu.sh --quick               # tiny, to see that all of it runs; without a GPU too

Builds the native libraries for the GPU at hand, then runs its tests, compute-sanitizer on a few of
them, the training step, `generate`, the kernels by shape, experts, quality at 10 and 50 M tokens,
and the training step under torch.compile. Each part has its share of the time that is left when its
turn comes. OUT/gpu.json is written anew after each, so that a cut-off loses one part; what is done
for the same sources on the same GPU is not done again, unless --only names it, and of a part that
was cut off in several visits the longest run is kept. OUT/gpu.log has all that the parts printed.
No network is needed, given the packages that --wheels lists.

Prints the tables of docs/benchmarks.md at the end; `scripts/bench/page.py --take OUT/gpu.json` puts
the figures on that page. The exit status is 0 when all parts that were asked for are done.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

from gpu_parts import PARTS
from gpu_visit import HOST_LIBRARY_VARIABLE, ROOT, Part, Result, Visit
from results import write_json

# What the parts import: a package, its least version, and who wants it.
PACKAGES = (
    ("torch", "2.8", "all, with CUDA"),
    ("numpy", "1.26", "all"),
    ("safetensors", "0.6", "all"),
    ("transformers", "5.20", "all"),
    ("rich", "13.0", "all"),
    ("typer", "0.15", "all"),
    ("cmake", "3.22", "build, unless installed otherwise"),
    ("ninja", "1.11", "build; quicker with it"),
    ("pytest", "8.0", "tests, sanitizer"),
    ("pytest-timeout", "2.3", "tests, sanitizer"),
    ("psutil", "6.0", "tests, sanitizer"),
    ("accelerate", "1.10", "generate, quality"),
    ("matplotlib", "3.8", "quality"),
    ("onebitllms", "0", "train, as a peer; left out without"),
)
BRINGING = """
Where there is a network, for the Python and the platform of the GPU's machine:
    pip download --no-deps --only-binary=:all: --dest wheels NAME==VERSION ...
There, `pip check` says what these need besides:
    pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=$PWD/site scripts/gpu.sh
"""
# What results are lists of.
MEASURED = ("rows", "quantizers", "gradients", "engines", "results")
# Characters of what a part printed that are kept where it did not end well.
TAIL = 2000
# Seconds between asking a part to end and ending it.
GRACE = 5


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9, help="of all parts together (9)")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument(
        "--installed", action="store_true",
        help="build no library, use that of the installed BitLab or of BITLAB_LIBRARY_DIR",
    )  # fmt: skip
    parser.add_argument("--models", type=Path, help="scripts/real_models.py's folder, for quality")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="two files: out/gpu")
    parser.add_argument("--work", type=Path, default=Path("out/gpu-work"), help="may be lost")
    parser.add_argument("--wheels", action="store_true", help="list the packages, and end")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that all of it runs")
    options = parser.parse_args()
    if not options.minutes > 0:
        parser.error(f"--minutes must be more than 0, got {options.minutes:g}")
    if options.models is not None and not options.models.is_dir():
        parser.error(f"--models must be a folder of scripts/real_models.py, got {options.models}")
    options.out, options.work = options.out.absolute(), options.work.absolute()
    out, work = options.out.resolve(), options.work.resolve()
    if out == work or work / "results" in (out, *out.parents):
        parser.error(f"--out must be another folder than --work, where files come and go: {out}")
    return options


def numbers(version: str) -> tuple[int, ...]:
    """Returns a version's numbers, to compare it by."""
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])))


def packages() -> list[str]:
    """Returns a line for each package: what is there, and whether it serves."""
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    lines = []
    for name, least, who in PACKAGES:
        try:
            found = importlib.metadata.version(name)
            serves = numbers(found) >= numbers(least)
        except importlib.metadata.PackageNotFoundError:
            found, serves = "not there", False
        pinned = f"{name}=={pins[name]}" if name in pins else name
        verdict = "serves" if serves else f"BRING {pinned}"
        lines.append(f"{name:12} {found:>14}, at least {least:6} {verdict:26} ({who})")
    return lines


def digest() -> str:
    """Returns what stands for the sources: no matter whether they are committed."""
    found = hashlib.sha256()
    for folder in ("csrc", "bitcore", "bitlayers", "bitlab_hf", "scripts", "tests"):
        for file in sorted((ROOT / folder).rglob("*.*")):
            if file.suffix in (".py", ".sh", ".cu", ".cuh", ".h", ".cpp", ".inl", ".txt"):
                found.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return found.hexdigest()[:16]


def begin(options: argparse.Namespace, on_gpu: bool) -> Result:
    """Returns the result to go on with: that of before where nothing has changed; another one is
    kept under another name.
    """
    import torch

    from bitlab_hf.cli.timing import machine

    where = torch.cuda.get_device_name() if on_gpu else "no GPU: no time here is a measurement"
    fresh: Result = {
        "sources": digest(), "gpu": where, "quick": options.quick, "date": date.today().isoformat(),
        "machine": machine(), "cuda": torch.version.cuda, "parts": {},
    }  # fmt: skip
    path = options.out / "gpu.json"
    if not path.is_file():
        return fresh
    try:
        before: Result = json.loads(path.read_text())
        same = all(before[key] == fresh[key] for key in ("sources", "gpu", "quick"))
    except (ValueError, TypeError, KeyError):
        raise SystemExit(
            f"gpu: {path} must be a result of gpu.sh; move it, or name another --out"
        ) from None
    if same:
        return before
    aside = path.with_name(f"gpu-{before['sources']}-{int(path.stat().st_mtime)}.json")
    path.rename(aside)
    print(f"{path} is of other sources or another GPU: kept as {aside.name}")
    return fresh


class Runner:
    """Runs commands, one at a time; ends the one that runs when this process is ended."""

    def __init__(self, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("a")
        self._running: subprocess.Popen[bytes] | None = None
        signal.signal(signal.SIGTERM, self._ended)

    def _ended(self, *_: Any) -> None:
        self._end()
        raise SystemExit("ended; what is done is written")

    def _end(self) -> None:
        process = self._running
        if process is None or process.poll() is not None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            os.killpg(process.pid, number)
            try:
                process.wait(GRACE)
                return
            except subprocess.TimeoutExpired:
                continue

    def run(self, command: list[str], seconds: float, environment: dict[str, str]) -> int | None:
        """Returns the exit status; None where the time ended first."""
        print(f"\n$ {shlex.join(command)}", file=self._log, flush=True)
        self._running = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=self._log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            return self._running.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return None
        finally:
            self._end()

    def tail(self) -> str:
        """Returns the end of what was printed."""
        self._log.flush()
        return Path(self._log.name).read_text(errors="replace")[-TAIL:]


def environment_of(visit: Visit) -> dict[str, str]:
    """Returns the environment of the parts: with the library that is measured."""
    found, library = dict(os.environ), visit.library()
    if library is not None and visit.on_gpu:
        found["BITLAB_LIBRARY_DIR"] = str(library.parent)
    elif library is not None:
        found[HOST_LIBRARY_VARIABLE] = str(library)
    return found


def has_library(visit: Visit) -> bool:
    """Whether there are kernels to measure: installed ones, or what a build for these sources that
    was done has left.
    """
    return visit.library() is not None


def run_part(name: str, part: Part, visit: Visit, runner: Runner, seconds: float) -> Result:
    """Runs one part within its time; returns what is kept of it."""
    started = time.monotonic()
    visit.left = lambda: seconds - (time.monotonic() - started)
    visit.clear()
    status = "done"
    commands = []
    for command in part.commands(visit):
        commands.append(shlex.join(command))
        code = runner.run(command, visit.left(), environment_of(visit))
        if code is None:
            status = "cut off"
            break
        if code != 0:
            status = "failed"
    found = {
        "status": status, "seconds": round(time.monotonic() - started, 1),
        "limit": round(seconds, 1), "commands": commands, "result": part.result(visit),
    }  # fmt: skip
    if status != "done":
        found["output"] = runner.tail()
    return found


def plan(options: argparse.Namespace, result: Result) -> list[str]:
    """Returns the names of the parts to run; the build always, since it costs nothing twice."""
    if options.only:
        return [name for name in PARTS if name in (*options.only, "build")]
    done = {name for name, part in result["parts"].items() if part["status"] == "done"}
    return [name for name in PARTS if name == "build" or name not in done]


def amount(found: Result) -> int:
    """Returns how much there is in a part's result: rows, and tests that ended."""
    result = found.get("result") or {}
    lists = [result[name] for name in MEASURED if isinstance(result.get(name), list | dict)]
    tests = [one for one in (result, *result.values()) if isinstance(one, dict)]
    ended = [one.get("passed", 0) + len(one.get("failed", ())) for one in tests]
    return sum(map(len, lists)) + sum(map(int, ended))


def better(before: Result | None, found: Result) -> Result:
    """Returns what is kept of a part, of an earlier visit for the same sources and of this one: the
    later, unless it was not begun or came less far.
    """
    if before is None or before["status"] == "not begun" or found["status"] == "done":
        return found
    if found["status"] != "not begun" and amount(found) >= amount(before):
        return found
    return {**before, "later": {key: found[key] for key in found if key != "result"}}


def visit_all(options: argparse.Namespace, visit: Visit, result: Result) -> bool:
    """Runs the parts, writing the result after each; returns whether all of them are done."""
    names, path = plan(options, result), options.out / "gpu.json"
    runner = Runner(options.out / "gpu.log")
    deadline = time.monotonic() + 60 * options.minutes
    statuses = []
    for place, name in enumerate(names):
        part, left = PARTS[name], deadline - time.monotonic()
        problem = part.problem(visit)
        others = [PARTS[one] for one in names[place + 1 :] if PARTS[one].problem(visit) is None]
        share = part.weight / (part.weight + sum(one.weight for one in others))
        if problem is None and name != "build" and not has_library(visit):
            problem = "there is no libbitkernels_cuda of these sources: the build is not done"
        if problem is None and left < part.least:
            problem = f"{left:.0f} s are left, and it takes {part.least:.0f}"
        if problem is not None:
            found: Result = {"status": "not begun", "why": problem}
        else:
            print(f"{name} ...", flush=True)
            found = run_part(name, part, visit, runner, min(left, max(part.least, share * left)))
            if name == "build" and not visit.installed:
                visit.end_build(found["status"] == "done")
        result["parts"][name] = kept = better(result["parts"].get(name), found)
        write_json(path, result)
        print(f"{name}: {describe(found)}", flush=True)
        if kept is not found:
            print(f"{name}: kept is what was {describe(kept)}", flush=True)
        # Nothing is missing where the library of an earlier visit is there.
        statuses.append("done" if name == "build" and has_library(visit) else found["status"])
    return all(status == "done" for status in statuses)


def describe(found: Result) -> str:
    """Returns what came of a part, in a line."""
    words = f"{found['status']}: {found['why']}" if "why" in found else found["status"]
    if "seconds" in found:
        words += f" after {found['seconds']:.0f} of {found['limit']:.0f} s"
    counts = found.get("result") or {}
    if "passed" in counts:
        words += f"; {counts['passed']} of {counts['tests']} tests passed"
        words += f", failed: {', '.join(counts['failed'])}" if counts["failed"] else ""
        words += f", ended in {counts['ended_in']}" if counts.get("ended_in") else ""
    return words


def main() -> None:
    """Runs what is missing, and prints the tables."""
    options = parse_arguments()
    if options.wheels:
        print("\n".join([*packages(), BRINGING]))
        return
    import torch

    on_gpu = torch.cuda.is_available()
    if not on_gpu and not options.quick:
        raise SystemExit("gpu.sh needs a CUDA device, and torch finds none (but with --quick)")
    missing = [line for line in packages() if "BRING" in line]
    print("\n".join(["missing packages:", *missing] if missing else ["all packages are there"]))
    options.work.mkdir(parents=True, exist_ok=True)
    models = options.models and options.models.absolute()
    result = begin(options, on_gpu)
    visit = Visit(options.work, on_gpu, options.quick, models, result["sources"], options.installed)
    complete = visit_all(options, visit, result)
    from page import visit_tables

    print(visit_tables(result))
    states = [f"{name} {part['status']}" for name, part in result["parts"].items()]
    print(f"{options.out / 'gpu.json'}: {', '.join(states)}")
    sys.exit(0 if complete else 1)


if __name__ == "__main__":
    main()
