"""New Python processes that have imported the libraries already.

An import of transformers and its Trainer takes more than ten seconds on a slow CPU, most of what a
test waits for that looks at a process from outside. Here a server imports them once for a session
and each process is a fork of it: its own memory, process number, exit code and output. What a test
finds out about imports, about what is read at import, or about a program of its own stays with
`subprocess`.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.forked import be_python

ROOT = Path(__file__).parents[1]
BITLAB = Path(sys.executable).with_name("bitlab")
# What the server has, whatever a test changes for itself later.
_ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}
_LOCK = threading.Lock()
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preloaded"])


def fork(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Starts a function of a module in such a process, with arguments that can be pickled."""
    with _LOCK:
        held = dict(os.environ)
        os.environ.clear()
        os.environ.update(_ENVIRONMENT)
        try:
            forkserver.ensure_running()
        finally:
            os.environ.clear()
            os.environ.update(held)
    process = _CONTEXT.Process(target=function, args=arguments)
    process.start()
    return process


def start(*arguments: str | Path, output: str | Path = os.devnull) -> BaseProcess:
    """Starts Python on arguments as after ``python``; its output is added to an existing file."""
    given = [*map(str, arguments)]
    return fork(be_python, given, dict(os.environ), os.getcwd(), str(output), os.devnull)


def run(*arguments: str | Path, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Waits for such a process and returns its exit code and what it printed."""
    with closing(_Printed()) as printed:
        given = [*map(str, arguments)]
        process = fork(be_python, given, dict(os.environ), os.getcwd(), *printed.names)
        process.join(timeout)
        code = process.exitcode
        process.kill()
        process.join()
        if code is None:
            raise subprocess.TimeoutExpired(given, timeout, *printed.texts())
        return subprocess.CompletedProcess(given, code, *printed.texts())


class Program:
    """A program that starts others, such as torchrun; what they print goes to two files.

    Its processes may have sessions of their own, and hold what they print to open after it has
    ended: so no pipe is waited for, and they are looked for by who started them.
    """

    def __init__(self, *command: str | Path, **environment: str) -> None:
        self._given = [*map(str, command)]
        self._printed = _Printed()
        held = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", **environment}
        output, errors = self._printed.names
        with open(output, "a") as out, open(errors, "a") as err:
            self._process = subprocess.Popen(
                self._given, cwd=ROOT, stdout=out, stderr=err, env=held
            )

    def end(self, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Waits for it; where it does not end, every process tells where it is, and is killed."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._stop(signal.SIGABRT)
            output, errors = self._printed.texts()
            raise AssertionError(f"no end within {timeout} s: {output}\n{errors}") from None
        return subprocess.CompletedProcess(self._given, code, *self._printed.texts())

    def close(self) -> None:
        """Kills what has not ended, and forgets what was printed."""
        self._stop(signal.SIGKILL)
        self._printed.close()

    def _stop(self, how: signal.Signals) -> None:
        if self._process.poll() is not None:
            return
        parent = psutil.Process(self._process.pid)
        # One after another, so that what they tell is not mixed, and those that started others
        # first, so that none sees another end and acts upon it.
        for one in [parent, *parent.children(recursive=True)]:
            for signal_number in (how, signal.SIGKILL):
                with suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
                    one.send_signal(signal_number)
                    one.wait(10)
        self._process.wait()


def launch(
    *command: str | Path, timeout: float = 600, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Waits for a program that starts others, run in the project's folder."""
    with closing(Program(*command, **environment)) as program:
        return program.end(timeout)


@contextmanager
def shared(name: str, factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of all processes of a session, held by one of them at a time."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def run_once(module: str, factory: pytest.TempPathFactory) -> Path:
    """Runs a module with a folder, in the first process of a session that asks for it.

    Returns:
        The folder, which all tests read and none changes.
    """
    with shared(module, factory) as place:
        if not (place / "done").exists():
            shutil.rmtree(place / "folder", ignore_errors=True)
            (place / "folder").mkdir()
            done = launch(sys.executable, "-m", module, place / "folder")
            assert done.returncode == 0, done.stderr[-5000:]
            (place / "done").touch()
    return place / "folder"


class Elsewhere:
    """The same with the Python of another environment, or with other variables at import."""

    def __init__(self, python: Path, environment: dict[str, str], *modules: str) -> None:
        self.environment, self._folder = environment, str(python.parent)
        self._server = subprocess.Popen(
            [python, "-P", Path(__file__).with_name("forked.py"), *modules], env=environment,
            cwd=self._folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Waits for a process with further variables of the environment."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with closing(_Printed()) as printed:
            given = {
                "arguments": [*map(str, arguments)],
                "environment": {**self.environment, **environment},
                "folder": self._folder,
                "output": printed.names[0],
                "errors": printed.names[1],
            }
            print(json.dumps(given), file=self._server.stdin, flush=True)
            answer = self._server.stdout.readline()
            if not answer:
                raise RuntimeError(f"the server ended by itself, with {self._server.wait()}")
            return subprocess.CompletedProcess(given["arguments"], int(answer), *printed.texts())

    def close(self) -> None:
        """Ends the server."""
        self._server.kill()
        self._server.wait()


class _Printed:
    """Two files that a process writes to."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="printed-")
        self._files = [Path(self._folder.name) / name for name in ("output", "errors")]
        for file in self._files:
            file.touch()
        self.names = tuple(map(str, self._files))

    def texts(self) -> list[str]:
        return [file.read_text() for file in self._files]

    def close(self) -> None:
        self._folder.cleanup()
