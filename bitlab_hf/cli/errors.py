"""How a command that fails ends: one line, an exit code, and with ``--json`` an object."""

from __future__ import annotations

import json
import shlex
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

from bitcore.errors import BitLabError
from bitlab_hf.demo.terminal import printable

# What typer itself ends a command with: wrong usage, and orderly ends.
_USAGE: type[Exception] = next(
    kind
    for kind in typer.BadParameter.__mro__
    if issubclass(kind, Exception) and kind.__name__ == "ClickException"
)
_TYPER = (_USAGE, typer.Exit, typer.Abort)
_MOST = 2000


class CommandError(BitLabError, RuntimeError):
    """Something else than BitLab failed; the message says at what."""


@contextmanager
def doing(
    what: str, fix: str = "Pass --debug to see where.", name: str | None = None
) -> Iterator[None]:
    """Names what was being done, and to which file, in errors that do not say it themselves.

    Args:
        what: What the block does, with the file's name.
        fix: What the user can do about it.
        name: The file, which BitLab's own errors are to name, too.

    Raises:
        CommandError: Instead of any error that is not BitLab's own.
    """
    try:
        yield
    except BitLabError as error:
        if name is None or name in str(error):
            raise
        raise type(error)(f"{name}: {error}") from error
    except (BrokenPipeError, *_TYPER):
        raise
    except Exception as error:
        raise CommandError(f"{what} must work, got {describe(error)}\n{fix}") from error


def describe(error: BaseException) -> str:
    """Returns an error as one line that a terminal can be given."""
    name = type(error).__name__
    # Some modules call theirs just that.
    name = f"{type(error).__module__}.{name}" if name == "error" else name
    kind = "" if isinstance(error, BitLabError) else f"{name}: "
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    text = ""
    for line in filter(None, lines):
        joint = "" if not text else " " if text[-1] in ".:;,!?" else ". "
        text += joint + line
    text = printable(kind + (text or "(no message)"))
    return text if len(text) <= _MOST else f"{text[:_MOST]}..."


def run(app: Any) -> None:
    """Runs the command line on ``sys.argv`` and ends the process.

    ``--debug`` and ``--json`` may stand anywhere before a ``--``. Exit codes: 0 done, 1 failed, 2
    wrong usage, 130 interrupted. With ``--json`` every failure prints ``{"error": message, "type":
    class}`` to standard output, beside the line on standard error.
    """
    debug, as_json = take_flag("--debug"), "--json" in _options()
    line = shlex.join(["bitlab", *sys.argv[1:]])
    line = line if len(line) <= 200 else f"{line[:200]}..."
    try:
        with doing(line):
            code = app(standalone_mode=not as_json)
    except SystemExit:
        raise
    except BaseException as error:
        raise SystemExit(_end(error, debug, as_json)) from None
    if code == 130:
        raise SystemExit(_end(KeyboardInterrupt("interrupted"), debug, as_json))
    raise SystemExit(code if isinstance(code, int) else 0)


def _end(error: BaseException, debug: bool, as_json: bool) -> int:
    """Shows an error; returns the exit code."""
    message, kind = describe(error), type(error).__name__
    if isinstance(error, _USAGE):
        # Its text is not whole without the option's name.
        shown: Any = error
        message, kind = printable(shown.format_message()), "UsageError"
    if as_json:
        typer.echo(json.dumps({"error": message, "type": kind}, indent=2))
    if debug:
        typer.echo(printable("".join(traceback.format_exception(error))), err=True, nl=False)
    else:
        Console(stderr=True, soft_wrap=True).print(
            f"error: {message}", markup=False, highlight=False, style="red"
        )
    if isinstance(error, KeyboardInterrupt):
        return 130
    return int(getattr(error, "exit_code", 1))


def _options() -> list[str]:
    """Returns the arguments before a ``--``."""
    given = sys.argv[1:]
    return given[: given.index("--")] if "--" in given else given


def take_flag(name: str) -> bool:
    """Takes a flag from the command line, wherever it stands before a ``--``."""
    if name not in _options():
        return False
    sys.argv.remove(name)
    return True
