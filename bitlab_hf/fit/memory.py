"""How much memory a machine, or a container, has left."""

from __future__ import annotations

from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
# Limit, use, statistics, and what those call pages of files that were read or written once: of
# cgroups v2 and v1.
_CONTAINERS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


def available_bytes() -> int | None:
    """Returns the memory that is free for use, None if unknown."""
    return memory_bytes()[0]


def memory_bytes() -> tuple[int | None, int | None]:
    """Returns the bytes of memory that are free for use, and of all; None where unknown. Of a
    container with a limit they are its own.
    """
    free, total = (_kibibytes(name) for name in ("MemAvailable", "MemTotal"))
    if free is None or total is None:
        return None, None
    for names in _CONTAINERS:
        limit, used, statistics = (system_text(_CGROUP / name) for name in names[:3])
        if limit.strip().isdigit() and used.strip().isdigit() and int(limit) < total:
            pairs = dict(line.split() for line in statistics.splitlines() if line.count(" ") == 1)
            # Such pages are let go of first.
            left = int(limit) - int(used) + int(pairs.get(names[3], 0))
            free, total = min(free, left), int(limit)
    return free, total


def _kibibytes(name: str) -> int | None:
    """Returns the bytes of a line of /proc/meminfo; None without it."""
    for line in system_text("/proc/meminfo").splitlines():
        key, _, value = line.partition(":")
        if key == name and value.split()[:1] and value.split()[0].isdigit():
            return int(value.split()[0]) * 1024
    return None


def system_text(path: str | Path) -> str:
    """Returns what a file of the system holds; nothing where there is none."""
    file = Path(path)
    return file.read_text(encoding="utf-8") if file.is_file() else ""
