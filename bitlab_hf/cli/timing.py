"""What measures kernels: the machine, and calls timed in turn.

Shared by ``bitlab bench`` and the repository's benchmarks.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import numpy as np

from bitlab_hf.fit.memory import system_text

PACKAGES = ("bitlab-hf", "torch", "transformers", "llama-cpp-python")
FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
LEAST, MOST = 3, 300
# Calls up to this long are led in by one that is not timed.
LEAD_IN_NS = 20_000_000


def machine() -> dict[str, Any]:
    """Returns what the figures depend on: CPU, caches, memory, versions; nothing that names it."""
    cpuinfo = system_text("/proc/cpuinfo")
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
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "isa": [name for name in FLAGS if name in flags],
        "vnni": bool({"avx512_vnni", "avx_vnni"} & flags),
        "l3_bytes": last_level_cache(),
        "memory_bytes": (
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            if hasattr(os, "sysconf")
            else None
        ),
        "huge_pages": system_text("/sys/kernel/mm/transparent_hugepage/enabled").strip(),
        "python": platform.python_version(),
        "versions": versions,
    }


def last_level_cache() -> int:
    """Returns the bytes of the last-level cache, 0 if unknown."""
    size = system_text("/sys/devices/system/cpu/cpu0/cache/index3/size").strip()
    return int(size.rstrip("K")) * 1024 if size.endswith("K") else 0


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
