"""How much memory a machine, or a container, has left."""

from __future__ import annotations

from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """Returns the memory that is free for use, None if unknown."""
    return memory_bytes()[0]


def memory_bytes() -> tuple[int | None, int | None]:
    """Returns the bytes of memory that are free for use, and of all; None where unknown. Of a
    container with a limit they are its own.
    """
    fields = dict(line.split(":") for line in _text("/proc/meminfo").splitlines())
    if "MemAvailable" not in fields:
        return None, None
    free, total = (int(fields[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    limit, used = _text(_CGROUP / "memory.max").strip(), _text(_CGROUP / "memory.current").strip()
    if limit.isdigit() and used.isdigit():
        statistics = dict(line.split() for line in _text(_CGROUP / "memory.stat").splitlines())
        # Pages of files that were read or written once are let go of first.
        left = int(limit) - int(used) + int(statistics.get("inactive_file", 0))
        free, total = min(free, left), min(total, int(limit))
    return free, total


def _text(path: str | Path) -> str:
    file = Path(path)
    return file.read_text(encoding="utf-8") if file.is_file() else ""
