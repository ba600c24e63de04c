"""Room for what samples make of a model: memory, or the disk where memory is short."""

from __future__ import annotations

import logging
import mmap
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from bitlab_hf.checkpoint.atomic import naming_full_disk

logger = logging.getLogger("bitlab")

# Of the memory; solving a layer needs some beside the streams, and so do other programs.
_FREE_SHARE = 0.25
_CGROUP = Path("/sys/fs/cgroup")


class Room:
    """Holds tensors that are needed again later.

    While less than a quarter of a device's memory is free, it takes what a GPU has to the CPU, and
    what a CPU has to files without a name, which are gone when nobody uses them any more, also
    after a kill. Numbers are the same wherever they lie.

    Args:
        folder: Where the files lie; None for all in memory, however short it is.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self._folder = folder
        self._said = False

    def hold(self, x: Tensor) -> Tensor:
        """Returns the same numbers, where there is room for them: in another device's memory,
        perhaps.

        Raises:
            DiskFullError: Memory is short, and the folder's disk is full.
        """
        if x.device.type == "cuda" and _is_short_gpu(x.device):
            x = x.cpu()
        if self._folder is None or x.device.type != "cpu" or not x.numel() or not _is_short():
            return x
        if not self._said:
            self._said = True
            logger.info("calibrate: memory is short: what samples make goes to %s", self._folder)
        with naming_full_disk(self._folder, "calibrate"):
            return _mapped(x, self._folder)


def _mapped(x: Tensor, folder: str | os.PathLike[str]) -> Tensor:
    """Returns a copy of a CPU tensor in a file that is mapped into memory."""
    with tempfile.TemporaryFile(dir=folder) as file:
        # A disk that is full says so here; a page that it has no room for would be a signal.
        os.posix_fallocate(file.fileno(), 0, x.nbytes)
        mapping = mmap.mmap(file.fileno(), x.nbytes)
    copy = torch.frombuffer(mapping, dtype=x.dtype).view(x.shape)
    return copy.copy_(x)


def available_bytes() -> int | None:
    """Returns the memory that is free for use, None if unknown."""
    return _memory()[0]


def _memory() -> tuple[int | None, int | None]:
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


def _is_short() -> bool:
    free, total = _memory()
    return free is not None and total is not None and free < _FREE_SHARE * total


def _is_short_gpu(device: torch.device) -> bool:
    free, total = torch.cuda.mem_get_info(device)
    # What torch holds of it without need it gives to the next tensor.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free < _FREE_SHARE * total


def _text(path: str | Path) -> str:
    file = Path(path)
    return file.read_text(encoding="utf-8") if file.is_file() else ""
