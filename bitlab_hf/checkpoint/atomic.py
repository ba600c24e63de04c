"""What every write shares: a check of the place, a copy written beside it, a full disk."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from bitcore.errors import ArgumentError, BitLabError

logger = logging.getLogger("bitlab")
# How safetensors and numpy say that a disk is full; they keep no error number.
_FULL = re.compile(r"os error (28|122)\b|\d+ requested and \d+ written")
# In the name of every copy that is being written, before a number nobody can guess.
_STAGED = "bitlab-staged-"
# What the system says of a place, rather than of what is written there.
_OF_THE_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.ENAMETOOLONG)


class OutputError(BitLabError, OSError):
    """A place cannot be written to; what was there before is as it was."""


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


@contextmanager
def naming_place(path: str | os.PathLike[str], op: str) -> Iterator[None]:
    """Names the output where the system does not let it be written.

    Raises:
        OutputError: Instead of whatever error said so.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _OF_THE_PLACE or isinstance(error, BitLabError):
            raise
        refused = OutputError(
            f"{op}: {path} must be a place that can be written to, got: {error.strerror}\n"
            "Name another place; what was there is as it was."
        )
        refused.errno = error.errno
        raise refused from error


def check_folder(directory: str | os.PathLike[str], op: str) -> None:
    """Checks, before any work, that a folder can be written, or exchanged for a new one.

    Raises:
        ArgumentError: It is a file, a pipe or a mount point, lies below a file, may not be
            written, or holds the working directory or a mount point; or its name leads nowhere.
    """
    path = check_place(directory, op)
    if path == Path.cwd() or path in Path.cwd().parents:
        raise ArgumentError(
            f"{op}: directory must not hold the working directory, got {directory}\n"
            "The directory is exchanged for a new one; name a folder inside it."
        )
    if path.exists():
        mounts = _mounts_within(path)
        if path in mounts:
            raise ArgumentError(
                f"{op}: the output must not be a mount point, got {directory}\n"
                "The directory is exchanged for a new one; name a folder inside it."
            )
        if mounts:
            raise ArgumentError(
                f"{op}: the output must hold no mount point, got {directory}, where {mounts[0]} "
                "is one\nThe directory is exchanged for a new one; name another folder."
            )
        _check_writable(path.parent, directory, op)


def check_place(directory: str | os.PathLike[str], op: str) -> Path:
    """Checks that there is, or can be, a folder of this name that takes new files.

    Returns:
        Where it leads to, links followed.

    Raises:
        ArgumentError: It is no folder, lies below what is none, or may not be written; or its
            name leads nowhere.
    """
    path = resolved(directory, op)
    nearest = next(place for place in (path, *path.parents) if place.exists())
    if not nearest.is_dir():
        kind = "a file" if nearest.is_file() else "no folder"
        raise ArgumentError(
            f"{op}: the output must be a folder or a new name, got {directory}, where {nearest} is "
            f"{kind}"
        )
    _check_writable(nearest, directory, op)
    return path


def resolved(path: str | os.PathLike[str], op: str) -> Path:
    """Returns where an output's name leads to, links followed.

    Raises:
        ArgumentError: It leads nowhere: links in a circle, a name that no file can have.
    """
    try:
        place = Path(path).resolve()
        # Newer versions of Python leave a circle of links as it stands.
        if place.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        place.exists()
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ArgumentError(
            f"{op}: the output must have a name that leads somewhere, got {str(path)!r}: {reason}"
        ) from error
    return place


def _check_writable(folder: Path, directory: str | os.PathLike[str], op: str) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ArgumentError(
            f"{op}: the output must be a place that can be written to, got {directory}, where "
            f"{folder} may not be\nName another place, or change its permissions."
        )


def _mounts_within(path: Path) -> list[Path]:
    """Returns where something is mounted at a folder or below it, links not followed."""
    found = {path} if os.path.ismount(path) else set()
    with suppress(OSError):
        # A folder mounted from the same disk shows here only; blanks are written as \040.
        for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
            place = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), line.split(" ")[4])
            if path == Path(place) or path in Path(place).parents:
                found.add(Path(place))
    return sorted(found)


@contextmanager
def staged_beside(target: Path, op: str, *, folder: bool = False) -> Iterator[Path]:
    """Gives a new file or folder beside a path, to be written and then put in its place.

    Its name cannot be known before, so that no link can lie in wait there, and the file mode is
    what the umask says. It is locked for as long as the block runs: what a killed process left is
    not, and is removed by the next one that writes to the same path. Whatever has its name when the
    block ends is removed.

    Args:
        target: What it is to become.
        op: Who writes, for error messages.
        folder: Whether to make a folder.

    Raises:
        OutputError: The folder that holds the target may not be written.
    """
    _remove_abandoned(target)
    with naming_place(target, op):
        staged, lock = _create(target, folder)
    try:
        yield staged
    finally:
        _remove(staged)
        os.close(lock)


def _create(target: Path, folder: bool) -> tuple[Path, int]:
    """Makes an empty file or folder; returns it with a descriptor that holds its lock."""
    while True:
        staged = target.with_name(f".{target.name}.{_STAGED}{secrets.token_hex(8)}")
        how = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        try:
            if folder:
                staged.mkdir()
                how = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
            lock = os.open(staged, how, 0o666)
        except FileExistsError:
            continue
        except FileNotFoundError:
            if folder and target.parent.exists():
                # Another process took it for abandoned before it was locked.
                continue
            raise
        if _is_locked(lock) is not False and _is_at(lock, staged):
            return staged, lock
        os.close(lock)


def _is_locked(descriptor: int) -> bool | None:
    """Locks a file for this process; False if another holds it, None where files have no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Tells whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _remove_abandoned(target: Path) -> None:
    """Removes what killed processes left of earlier writes to a path."""
    names = re.compile(re.escape(f".{target.name}.{_STAGED}") + r"[0-9a-f]{16}(\.previous)?")
    try:
        found = [entry for entry in target.parent.iterdir() if names.fullmatch(entry.name)]
    except OSError:
        # The write itself says what is wrong.
        return
    for entry in found:
        if entry.suffix == ".previous" and not target.exists():
            # Killed between two renames: the only whole checkpoint that there is.
            continue
        try:
            lock = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            owned = os.fstat(lock).st_uid == os.geteuid()
            if owned and _is_locked(lock) and _is_at(lock, entry) and _remove(entry):
                logger.warning("%s: removed; a process that was killed left it behind", entry)
        finally:
            os.close(lock)


def _remove(path: Path) -> bool:
    """Removes a file or folder, but no folder that something is mounted in; tells whether."""
    if path.is_dir() and not path.is_symlink():
        mounts = _mounts_within(path)
        if mounts:
            # Mounted since the place was checked; what it holds is no part of the checkpoint.
            logger.warning("%s: left, because %s is a mount point", path, mounts[0])
            return False
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    return True


def keep_access(held: Path, new: Path) -> None:
    """Gives a file or folder the owner, group, mode and attributes of the one it replaces.

    Where the group may not be kept, the new one gets no more than everybody has.
    """
    before = held.stat()
    mode = stat.S_IMODE(before.st_mode)
    for owner in (before.st_uid, -1):
        with suppress(OSError):
            os.chown(new, owner, before.st_gid)
            break
    else:
        mode = mode & 0o1707 | (mode & 0o007) << 3
    if sys.platform == "linux":
        for name in os.listxattr(held):
            with suppress(OSError):
                os.setxattr(new, name, os.getxattr(held, name))
    with suppress(PermissionError):
        os.chmod(new, mode)


def flush(path: Path) -> None:
    """Waits until a file or folder is on the disk; links, pipes and sockets hold nothing."""
    mode = path.lstat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(staged: Path, target: Path) -> None:
    """Lets a file that is written take another's place, with its owner and mode.

    Raises:
        OSError: It failed; the other is as it was.
    """
    flush(staged)
    if target.is_file() and not target.is_symlink():
        keep_access(target, staged)
    staged.replace(target)


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file so that at every moment the path holds all of the old or of the new one.

    Raises:
        OSError: Writing failed; the file is as it was.
    """
    with naming_full_disk(path, "write"), staged_beside(path, "write") as staged:
        staged.write_text(text, encoding="utf-8")
        put_in_place(staged, path)
