"""New Python processes that have imported the libraries already.

An import of transformers and its Trainer takes more than ten seconds on a slow CPU, most of what a
test waits for that looks at a process from outside. Here a server imports them once for a session
and each process is a fork of it: its own memory, process number, exit code and output. What a test
finds out about imports, about what is read at import, or about a program of its own stays with
`subprocess`.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import types
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path

BITLAB = Path(sys.executable).with_name("bitlab")
# What the server has, whatever a test changes for itself later.
_ENVIRONMENT = dict(os.environ)
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preloaded"])


def _be_python(arguments: list[str]) -> None:
    """Runs what Python runs with such a command line: a file, ``-m module`` or ``-c code``."""
    first, *others = arguments
    if first == "-m":
        sys.argv, sys.path[0] = others, os.getcwd()
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv, sys.path[0] = ["-c", *others[1:]], ""
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(others[0], "<string>", "exec"), vars(module))
    else:
        sys.argv, sys.path[0] = arguments, str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


def _child(
    arguments: list[str], environment: dict[str, str], folder: str, output: str, errors: str
) -> None:
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
    sys.path.insert(0, "")
    try:
        _be_python(arguments)
    finally:
        atexit._run_exitfuncs()


def start(
    *arguments: str | Path,
    env: dict[str, str] | None = None,
    output: str | Path = os.devnull,
    errors: str | Path = os.devnull,
) -> BaseProcess:
    """Starts Python on arguments as after ``python``, its output added to existing files.

    Its environment is this process's as it is now, or `env`.
    """
    held = dict(os.environ)
    os.environ.clear()
    os.environ.update(_ENVIRONMENT)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(held)
    given = ([*map(str, arguments)], env or held, os.getcwd(), str(output), str(errors))
    process = _CONTEXT.Process(target=_child, args=given)
    process.start()
    return process


def run(
    *arguments: str | Path, env: dict[str, str] | None = None, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Waits for such a process and returns its exit code and what it printed."""
    with tempfile.NamedTemporaryFile("r+") as output, tempfile.NamedTemporaryFile("r+") as errors:
        process = start(*arguments, env=env, output=output.name, errors=errors.name)
        process.join(timeout)
        ended = process.exitcode is not None
        process.kill()
        process.join()
        given, code = [*map(str, arguments)], process.exitcode
        printed = (output.read(), errors.read())
    if not ended:
        raise subprocess.TimeoutExpired(given, timeout, *printed)
    assert code is not None
    return subprocess.CompletedProcess(given, code, *printed)
