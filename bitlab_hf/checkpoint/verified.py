"""Files that were scanned for damage before are not scanned again: a record in the user's cache.

A record says that a checkpoint's files, as they were then, hold nothing that no writer produces. It
counts only if they are the same files, not written to since, by everything that the system tells of
them, and if their headers hash to the same; so an edit is always noticed, also one that puts the
times back, which cannot be done to the time of the last change. Deleting a record, or turning the
cache off (`bitcore.user_cache`), costs a scan and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitcore.user_cache import cache_folder, keep

# Goes up when the scan looks for more than it did.
_SCAN = 1
# A file changed again within the clock's grain could look unchanged.
_SETTLED_NS = 2_000_000_000
_MOST_HEADER = 2**27
_CHUNK = 2**23


class Verification:
    """What is known of a checkpoint's files at the beginning of a load.

    Args:
        files: The safetensors files.
        scanned: Names of the modules whose tensors are scanned.

    Attributes:
        is_known: Whether they were found whole before, just as they are.
    """

    def __init__(self, files: Sequence[str], scanned: list[str]) -> None:
        self._files = [os.path.realpath(file) for file in files]
        self._states = _states(self._files)
        name = hashlib.sha256(json.dumps([_SCAN, self._files, scanned]).encode()).hexdigest()
        folder = cache_folder("verified")
        self._record = None if folder is None else folder / f"{name}.json"
        self.is_known = bool(self._states) and self._states == _read(self._record)

    def is_same(self) -> bool:
        """Tells whether the files are still those of the beginning: what was loaded is theirs."""
        return self._states is not None and self._states == _states(self._files)

    def keep(self) -> None:
        """Notes that a scan found nothing, unless the files changed meanwhile or just before."""
        if self._record is None or not self._states or not self.is_same():
            return
        latest = max(max(state[1:3]) for state in self._states)
        if latest + _SETTLED_NS < time.time_ns():
            keep(self._record, json.dumps(self._states).encode())

    def read_ahead(self) -> None:
        """Asks the system for the files' pages, so that a scan need not wait for each."""
        if hasattr(os, "posix_fadvise"):
            threading.Thread(target=_read_ahead, args=(self._files,), daemon=True).start()


def _states(files: list[str]) -> list[list[Any]] | None:
    """Returns size, times, place and the header's hash of each file; None if one cannot be read."""
    states: list[list[Any]] = []
    try:
        for name in files:
            with open(name, "rb") as file:
                found = os.fstat(file.fileno())
                length = min(int.from_bytes(file.read(8), "little"), _MOST_HEADER)
                digest = hashlib.sha256(file.read(length)).hexdigest()
            times = found.st_mtime_ns, found.st_ctime_ns
            states.append([found.st_size, *times, found.st_dev, found.st_ino, digest])
    except OSError:
        return None
    return states


def _read(record: Path | None) -> Any:
    """Returns what a record holds; None if there is none that can be read."""
    if record is None:
        return None
    try:
        return json.loads(record.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _read_ahead(files: list[str]) -> None:
    try:
        for name in files:
            with open(name, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                # In parts: the call may wait until a part's reads have been queued.
                for start in range(0, size, _CHUNK):
                    os.posix_fadvise(file.fileno(), start, _CHUNK, os.POSIX_FADV_WILLNEED)
    except OSError:
        # The scan reads the file itself.
        return
