"""The folder where BitLab keeps what it would otherwise do again in every process.

``BITLAB_CACHE`` names it, or turns it off with ``off``; else it is ``bitlab`` in
``XDG_CACHE_HOME`` or ``~/.cache``. What lies in it may be run, so it is used only if it is this
user's and nobody else may write to it. Nothing depends on it: what cannot be read is made again,
and what cannot be written is not kept.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

ENVIRONMENT_VARIABLE = "BITLAB_CACHE"
_OFF = ("off", "0")


def cache_folder(kind: str) -> Path | None:
    """Returns the folder for one kind of things, made if there is none yet; None for no cache.

    Args:
        kind: The folder's name.
    """
    named = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if named in _OFF:
        return None
    try:
        if named:
            base = Path(named).absolute()
        else:
            home = os.environ.get("XDG_CACHE_HOME")
            base = (Path(home) if home else Path.home() / ".cache") / "bitlab"
        folder = base / kind
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder if _is_private(base) and _is_private(folder) else None
    except (OSError, RuntimeError):
        # RuntimeError: there is no home.
        return None


def _is_private(folder: Path) -> bool:
    found = folder.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def keep(path: Path, content: bytes) -> bool:
    """Writes a file of the cache, whole or not at all; tells whether it did."""
    draft = None
    try:
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(draft).replace(path)
    except OSError:
        if draft is not None:
            Path(draft).unlink(missing_ok=True)
        return False
    return True
