"""Where commands read and write, checked before any work is done."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path

from bitcore.errors import ArgumentError

_KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def special(path: Path) -> str | None:
    """Returns what a path is that blocks or never ends when it is read; None of other paths."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return None
    return next((name for is_kind, name in _KINDS if is_kind(mode)), None)


def check_files(files: Iterable[Path]) -> None:
    """Checks that none of these would block or never end.

    Raises:
        ArgumentError: One is a pipe, a socket or a device.
    """
    for file in files:
        kind = special(file)
        if kind is not None:
            raise ArgumentError(f"{file}: the file must be an ordinary one, got {kind}\nRemove it.")


def check_folder(folder: Path) -> None:
    """Checks the files that lie in a folder which is to be read, see `check_files`."""
    if folder.is_dir():
        check_files(folder.iterdir())


def check_text(file: Path) -> None:
    """Checks a text file; what a shell hands over as ``<(command)`` is one.

    Raises:
        ArgumentError: It is a named pipe, a socket or a device.
    """
    # An open pipe has no name that leads to it.
    if special(file) == "a named pipe" and not file.resolve().exists():
        return
    check_files([file])


def check_output(source: str | None, output: Path) -> None:
    """Checks where a command writes the folder that it makes.

    Args:
        source: The model that it is made of; None where that is not on disk.
        output: The folder, or a new name.

    Raises:
        ArgumentError: The output cannot be a folder that BitLab may replace, or would take the
            source's place.
    """
    from bitlab_hf.checkpoint.atomic import check_folder as check_exchange

    target = _resolved(output, "a folder or a new name")
    check_exchange(output, str(output))
    both = source is not None and output.exists() and Path(source).exists()
    if source is not None and both and output.samefile(source):
        raise ArgumentError(
            f"{output}: the output must be another folder than the model's, got the same\n"
            "The model would be replaced by what is made of it."
        )
    if target.exists():
        check_files(Path(place, name) for place, _, names in os.walk(target) for name in names)
    _check_writable(output, target.parent)


def check_output_file(output: Path) -> None:
    """Checks where a command writes a file.

    Raises:
        ArgumentError: The output is no ordinary file and no new name, or cannot be written there.
    """
    from bitlab_hf.checkpoint.atomic import check_place

    target = _resolved(output, "a file or a new name")
    kind = "a folder" if target.is_dir() else special(target)
    if kind is not None:
        raise ArgumentError(
            f"{output}: the output must be a file or a new name, got {kind}, which is no file\n"
            f"Name a file in a folder: {target / 'NAME' if target.is_dir() else 'FOLDER/NAME'}."
        )
    check_place(target.parent, str(output))
    _check_writable(output, target.parent)


def _resolved(output: Path, wanted: str) -> Path:
    try:
        output.lstat()
        if output.is_symlink():
            output.stat()
    except (OSError, ValueError) as error:
        # A name that is free, or a link to one.
        if getattr(error, "errno", None) not in (errno.ENOENT, errno.ENOTDIR):
            raise _unusable(output, wanted, error) from error
    try:
        return output.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise _unusable(output, wanted, error) from error


def _unusable(output: Path, wanted: str, error: Exception) -> ArgumentError:
    reason = getattr(error, "strerror", None) or str(error)
    return ArgumentError(
        f"{str(output)!r:.200}: the output must be {wanted}, got what the system refuses: {reason}"
    )


def _check_writable(output: Path, folder: Path) -> None:
    """Makes a folder where the output is to lie, and removes it: permissions alone do not tell."""
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        Path(tempfile.mkdtemp(prefix=".bitlab-", dir=nearest)).rmdir()
    except OSError as error:
        raise ArgumentError(
            f"{output}: the output must lie where it can be written, got {nearest}, which refuses "
            f"it: {error.strerror}\nName another place, or change its permissions."
        ) from error
