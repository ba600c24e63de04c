"""What the benchmarks share: the machine and its limits, interleaved timing, tables, targets."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

PACKAGES = ("bitlab-hf", "torch", "transformers", "llama-cpp-python")
FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
LEAST, MOST = 3, 300
QUIET = 0.03  # share of the CPU time that may go elsewhere
# Calls up to this long are led in by one that is not timed.
LEAD_IN_NS = 20_000_000


def machine() -> dict[str, Any]:
    """Returns what the figures depend on: CPU, caches, memory, versions; nothing that names it."""
    cpuinfo = _text("/proc/cpuinfo")
    values = dict(
        line.split(":", 1) for line in cpuinfo.split("\n\n")[0].splitlines() if ":" in line
    )
    fields = {name.strip(): value.strip() for name, value in values.items()}
    flags = set(fields.get("flags", "").split())
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    model = f"{fields.get('model name', platform.machine())}"
    family = f"family {fields.get('cpu family', '?')}, model {fields.get('model', '?')}"
    return {
        "cpu": f"{model} ({family})",
        "cores": len(os.sched_getaffinity(0)),
        "isa": [name for name in FLAGS if name in flags],
        "vnni": bool({"avx512_vnni", "avx_vnni"} & flags),
        "l3_bytes": last_level_cache(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "huge_pages": _text("/sys/kernel/mm/transparent_hugepage/enabled").strip(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _text(path: str) -> str:
    file = Path(path)
    return file.read_text() if file.is_file() else ""


def last_level_cache() -> int:
    """Returns the bytes of the last-level cache, 0 if unknown."""
    size = _text("/sys/devices/system/cpu/cpu0/cache/index3/size").strip()
    return int(size.rstrip("K")) * 1024 if size.endswith("K") else 0


class Disturbance:
    """What else the machine did while a benchmark ran."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._before = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Returns seconds of CPU time: used by all, stolen by the host, used by this command."""
        user, nice, system, _, _, irq, softirq, steal, *_ = (
            int(value) / os.sysconf("SC_CLK_TCK") for value in _text("/proc/stat").split()[1:11]
        )
        own = sum(os.times()[:4])
        return user + nice + system + irq + softirq, steal, own

    def measured(self) -> dict[str, float]:
        """Returns the seconds since the start, and shares of all cores' time: others', the host's.

        Processes that this one started count as its own once they have ended.
        """
        elapsed = time.perf_counter() - self._started
        used, stolen, own = (
            after - before for before, after in zip(self._before, self._read(), strict=True)
        )
        total = elapsed * (os.cpu_count() or 1)
        others = max(0.0, (used - own) / total)
        return {"seconds": elapsed, "other_processes": others, "host": stolen / total}


def header(console: Console, script: str) -> dict[str, Any]:
    """Prints and returns what a result file begins with: machine, date, command."""
    found = {
        "machine": machine(),
        "date": date.today().isoformat(),
        "command": shlex.join(["python", f"scripts/{script}", *sys.argv[1:]]),
    }
    described = found["machine"]
    console.print(
        f"{described['cpu']}, {described['cores']} cores, "
        f"{described['memory_bytes'] / 2**30:.0f} GiB, {' '.join(described['isa'])}; "
        + ", ".join(f"{name} {version}" for name, version in described["versions"].items()),
        highlight=False,
    )
    return found


class Probe:
    """The limits of the machine, measured by `probe.cpp` on torch's OpenMP threads.

    Args:
        buffer_bytes: Size of the buffer that is read; several times the last-level cache.

    Raises:
        SystemExit: There is no C++ compiler, or it fails.
    """

    CHUNKS = 8

    def __init__(self, buffer_bytes: int) -> None:
        compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            raise SystemExit("The probe of the machine's limits needs a C++ compiler, found none.")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "probe.so"
            source = Path(__file__).with_name("probe.cpp")
            options = ["-O3", "-march=native", "-fopenmp", "-std=c++17", "-shared", "-fPIC"]
            command = [compiler, *options, str(source), "-o", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise SystemExit(f"{compiler} cannot compile probe.cpp:\n{done.stderr}")
            # Loaded after torch, so that both share one OpenMP pool.
            self._library = ctypes.CDLL(str(path))
        pointer, size, count = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        self._library.probe_read.argtypes = (pointer, size, size, count)
        self._library.probe_read.restype = ctypes.c_uint64
        self._library.probe_multiply.argtypes = (size, count)
        self._library.probe_multiply.restype = ctypes.c_int64
        self._library.probe_name.restype = ctypes.c_char_p
        self.multiply_name: str = self._library.probe_name().decode()
        self._buffer = torch.ones(buffer_bytes, dtype=torch.uint8)
        self._ahead: dict[int, int] = {}

    def reads(self, tensor: Tensor) -> Callable[[], object]:
        """Returns a call that reads the tensor once, with the best prefetch distance."""
        threads = torch.get_num_threads()
        pointer, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        ahead = self._best_ahead(threads)
        return lambda: self._library.probe_read(pointer, size, ahead, threads)

    def _best_ahead(self, threads: int) -> int:
        """Returns the prefetch distance with which this many threads read fastest."""
        if threads not in self._ahead:
            times: dict[int, list[int]] = {0: [], 1024: [], 2048: [], 4096: []}
            pointer, size = self._buffer.data_ptr(), self._buffer.numel()
            for _ in range(5):
                for ahead, found in times.items():
                    started = time.perf_counter_ns()
                    self._library.probe_read(pointer, size, ahead, threads)
                    found.append(time.perf_counter_ns() - started)
            self._ahead[threads] = min(times, key=lambda ahead: np.median(times[ahead]))
        return self._ahead[threads]

    def contenders(self) -> tuple[Contender, Contender]:
        """Returns the two limits as contenders of a race: DRAM reading, int8 multiplying."""
        threads = torch.get_num_threads()
        chunks = [self.reads(chunk) for chunk in self._buffer.chunk(self.CHUNKS)]
        iterations = 200_000
        multiply = Contender(
            "probe: multiply", [lambda: self._library.probe_multiply(iterations, threads)]
        )
        multiply.work = self._library.probe_multiply(1, threads) * iterations
        return Contender("probe: read", chunks, work=self._buffer.numel() // self.CHUNKS), multiply


@dataclass
class Contender:
    """One side of a race.

    Attributes:
        name: As in the tables.
        calls: What is timed, in turn: the same work on different memory.
        before: Called before each call, not timed.
        work: Bytes read, or multiplications done, by one call.
        lead_in: Whether each timed call follows one on other memory that is not timed. In a model
            the layer before has just run the same code; only the weights are cold.
    """

    name: str
    calls: list[Callable[[], object]]
    before: Callable[[], object] | None = None
    work: int = 0
    lead_in: bool = False
    _turns: Iterator[Callable[[], object]] = field(init=False)

    def __post_init__(self) -> None:
        self._turns = cycle(self.calls)

    def time(self) -> int:
        """Returns the nanoseconds of one call."""
        if self.before is not None:
            self.before()
        if self.lead_in:
            next(self._turns)()
        call = next(self._turns)
        started = time.perf_counter_ns()
        call()
        return time.perf_counter_ns() - started


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call, over `repeats` calls."""

    p50: float
    p10: float
    p90: float
    repeats: int

    @classmethod
    def of(cls, nanoseconds: list[int]) -> Timing:
        """Returns the percentiles of measured times."""
        p10, p50, p90 = np.percentile(nanoseconds, (10, 50, 90)) / 1e3
        return cls(float(p50), float(p10), float(p90), len(nanoseconds))


def race(contenders: list[Contender], seconds: float, limit: float) -> dict[str, Timing]:
    """Times contenders in turn, so that whatever disturbs the machine disturbs them all.

    Args:
        contenders: Who runs.
        seconds: Timed for each; a slow one joins some rounds only, spread over the race.
        limit: Seconds of one call above which this call is all that is measured.
    """
    times: dict[str, list[int]] = {}
    counts: dict[str, int] = {}
    for contender in contenders:
        first = contender.time()
        if first > limit * 1e9:
            times[contender.name], counts[contender.name] = [first], 0
            continue
        second = contender.time()
        contender.lead_in = second < LEAD_IN_NS
        times[contender.name] = []
        counts[contender.name] = min(MOST, max(LEAST, int(seconds * 1e9 / max(second, 1))))
    rounds = max(counts.values(), default=0)
    for turn in range(rounds):
        for contender in contenders:
            count = counts[contender.name]
            if (turn + 1) * count // rounds != turn * count // rounds:
                times[contender.name].append(contender.time())
    return {name: Timing.of(found) for name, found in times.items()}


@dataclass(frozen=True)
class Target:
    """One line of the closing table.

    Attributes:
        name: What is asked, with its bound.
        measured: The figure of this run; None where the run did not measure it.
        bound: The figure asked for.
        at_least: Whether the bound is a lower one.
        unit: Printed after the figures.
    """

    name: str
    measured: float | None
    bound: float
    at_least: bool
    unit: str

    @property
    def met(self) -> bool | None:
        """Whether the run met it; None where it was not measured."""
        if self.measured is None:
            return None
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    def to_dict(self) -> dict[str, Any]:
        """Returns what the result file holds."""
        return {**vars(self), "met": self.met}


@dataclass
class Grid:
    """A table of texts, for the terminal and for Markdown; the first `left` columns are names."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    left: int = 1

    def show(self, console: Console) -> None:
        """Prints the table."""
        table = Table(title=self.title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for index, name in enumerate(self.columns):
            named = index < self.left
            table.add_column(name, justify="left" if named else "right", no_wrap=not named)
        for row in self.rows:
            table.add_row(*row)
        console.print(table)

    def markdown(self) -> str:
        """Returns the table in Markdown, its title above."""
        rule = ["---" if index < self.left else "--:" for index in range(len(self.columns))]
        lines = [f"| {' | '.join(row)} |" for row in (self.columns, rule, *self.rows)]
        return "\n".join([f"**{self.title}**", "", *lines, ""])


def target_grid(targets: list[Target]) -> Grid:
    """Returns the closing table."""
    grid = Grid("Targets", ["target", "measured", "met"])
    words = {True: "yes", False: "NO", None: "not in this run"}
    for target in targets:
        figure = "-" if target.measured is None else f"{target.measured:.3g}{target.unit}"
        grid.rows.append([target.name, figure, words[target.met]])
    return grid


def close(
    console: Console,
    result: dict[str, Any],
    grids: list[Grid],
    targets: list[Target],
    disturbance: Disturbance,
    output: Path,
    for_vnni: bool = True,
) -> None:
    """Prints the closing table and writes JSON to output and the tables beside it as Markdown.

    `for_vnni` tells whether the targets are stated for machines with VNNI.
    """
    closing = target_grid(targets)
    closing.show(console)
    result["disturbance"] = found = disturbance.measured()
    quiet = found["other_processes"] + found["host"] < QUIET
    console.print(
        f"{found['seconds']:.0f} s; other processes took {found['other_processes']:.1%} of the CPU "
        f"time, the host {found['host']:.1%}{'.' if quiet else ': do not trust these figures.'}"
    )
    if for_vnni and not result["machine"]["vnni"]:
        console.print("The targets are stated for machines with VNNI; this CPU has none.")
    result["targets"] = [target.to_dict() for target in targets]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    markdown = "\n".join(grid.markdown() for grid in (*grids, closing))
    output.with_suffix(".md").write_text(markdown)


def pyplot() -> Any:
    """Returns matplotlib's pyplot, drawing to files.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise SystemExit(
            'The PNG needs matplotlib: pip install "bitlab-hf[bench]", or pass --no-png.'
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt
