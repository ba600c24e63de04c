"""Room for what samples make of a model: memory, or the disk where memory is short."""

from __future__ import annotations

import logging
import os
import tempfile

import torch
from torch import Tensor

from bitlab_hf.checkpoint.atomic import naming_full_disk
from bitlab_hf.fit.memory import memory_bytes

logger = logging.getLogger("bitlab")

# Of the memory; solving a layer needs some beside the streams, and so do other programs.
_FREE_SHARE = 0.25


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
    # Only the first process of a run has made it.
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        # A disk that is full says so here; a page that it has no room for would be a signal.
        os.posix_fallocate(file.fileno(), 0, x.nbytes)
        # By the name of what is open: a mapping of the descriptor would keep that one open.
        name = f"/proc/self/fd/{file.fileno()}"
        copy = torch.from_file(name, shared=True, size=x.numel(), dtype=x.dtype)
    return copy.view(x.shape).copy_(x)


def _is_short() -> bool:
    free, total = memory_bytes()
    return free is not None and total is not None and free < _FREE_SHARE * total


def _is_short_gpu(device: torch.device) -> bool:
    free, total = torch.cuda.mem_get_info(device)
    # What torch holds of it without need it gives to the next tensor.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free < _FREE_SHARE * total
