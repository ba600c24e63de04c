"""Runs command lines as Python would, in forks of a process that has imported modules already.

``python forked.py MODULE...`` imports them, then reads requests, one JSON object a line: the
arguments of `be_python`. Each is answered by its exit code.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import signal
import sys
import traceback
import types
from pathlib import Path

_SECONDS = 600


def be_python(
    arguments: list[str], environment: dict[str, str], folder: str, output: str, errors: str
) -> None:
    """Runs a file, ``-m module`` or ``-c code``; what it prints is added to existing files."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, path in ((0, os.devnull), (1, output), (2, errors)):
        file = os.open(path, os.O_RDWR | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    first, *others = arguments
    try:
        if first == "-m":
            sys.argv = others
            sys.path.insert(0, os.getcwd())
            runpy.run_module(others[0], run_name="__main__", alter_sys=True)
        elif first == "-c":
            sys.argv = ["-c", *others[1:]]
            sys.path.insert(0, "")
            module = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(others[0], "<string>", "exec"), vars(module))
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(first).parent))
            runpy.run_path(first, run_name="__main__")
    finally:
        atexit._run_exitfuncs()


def _child(given: dict[str, object]) -> int:
    # Killed, a request that hangs is answered too.
    signal.alarm(_SECONDS)
    try:
        be_python(**given)  # type: ignore[arg-type]
    except SystemExit as ended:
        if not isinstance(ended.code, str):
            return ended.code or 0
        print(ended.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _main() -> None:
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        process = os.fork()
        if not process:
            os._exit(_child(json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    _main()
