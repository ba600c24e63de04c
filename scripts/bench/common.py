"""What the benchmarks share: the machine's limits, tables, targets."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import write_json
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bitlab_hf.cli.timing import Contender, machine

QUIET = 0.03  # share of the CPU time that may go elsewhere


class Disturbance:
    """What else the machine did while a benchmark ran."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._before = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Returns seconds of CPU time: used by all, stolen by the host, used by this command."""
        user, nice, system, _, _, irq, softirq, steal, *_ = (
            int(value) / os.sysconf("SC_CLK_TCK")
            for value in Path("/proc/stat").read_text().split()[1:11]
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


def device_words() -> str:
    """Returns the GPU in words."""
    found = torch.cuda.get_device_properties(0)
    return f"{found.name}, {found.multi_processor_count} multiprocessors, CUDA {torch.version.cuda}"


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
    write_json(output, result)
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
            'The PNG needs matplotlib: pip install ".[bench]", or pass --no-png.'
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt
