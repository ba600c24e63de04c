"""What every write shares: a check of the place, small files in one step."""

from __future__ import annotations

import os
from pathlib import Path

from bitcore.errors import ArgumentError


def check_folder(directory: str | os.PathLike[str], op: str) -> None:
    """Checks that there is, or can be, a folder of this name.

    Raises:
        ArgumentError: It is a file, or lies below one.
    """
    path = Path(directory).resolve()
    nearest = next(place for place in (path, *path.parents) if place.exists())
    if not nearest.is_dir():
        raise ArgumentError(
            f"{op}: the output must be a folder or a new name, got {directory}, where {nearest} is "
            "a file"
        )


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file so that at every moment the path holds all of the old or of the new one.

    Raises:
        OSError: Writing failed; the file is as it was.
    """
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with staged.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
