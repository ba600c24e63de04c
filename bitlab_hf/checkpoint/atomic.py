"""What every write shares: a check of the place, what a full disk says, small files in one step."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from bitcore.errors import ArgumentError, BitLabError

# How safetensors and numpy say that a disk is full; they keep no error number.
_FULL = re.compile(r"os error (28|122)\b|\d+ requested and \d+ written")


class DiskFullError(BitLabError, OSError):
    """What was to be written does not fit; what was there before is as it was."""


@contextmanager
def naming_full_disk(path: str | os.PathLike[str], op: str) -> Iterator[None]:
    """Names the output where its disk is full, or the user's share of it.

    Args:
        path: What the block writes, beside or in place.
        op: Who writes, for error messages.

    Raises:
        DiskFullError: Instead of whatever error said so.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        if number not in (errno.ENOSPC, errno.EDQUOT) and not _FULL.search(str(error)):
            raise
        full = DiskFullError(
            f"{op}: {path} must be written whole, got a full disk ({error})\n"
            "Free some space, or name a place on another disk; what was there is as it was."
        )
        full.errno = number or errno.ENOSPC
        raise full from error


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
        with naming_full_disk(path, "write"), staged.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
