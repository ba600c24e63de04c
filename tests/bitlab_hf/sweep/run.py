"""Sweeps: each architecture in a process of its own, forked from one that has imported all."""

from __future__ import annotations

import multiprocessing
import os
import resource
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

from tests.bitlab_hf.sweep.life import live
from tests.bitlab_hf.sweep.results import Result

# Of computing; and by the clock, of a machine that may be busy.
CPU_SECONDS, SECONDS = 60, 300
_PRELOAD = ["transformers.modeling_utils", "tests.bitlab_hf.sweep.life"]


def sweep(architectures: Iterable[str], processes: int = 1) -> Iterator[Result]:
    """Yields the result of each architecture, in order."""
    # Not a fork of this process, which may hold threads; the variables are read by the server.
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with (
        mock.patch.dict(os.environ, {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}),
        ThreadPoolExecutor(processes) as pool,
    ):
        yield from pool.map(lambda name: _one(context, name), architectures)


def _one(context: Any, architecture: str) -> Result:
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
        process = context.Process(target=_child, args=(architecture, folder, theirs))
        process.start()
        theirs.close()
        try:
            if not ours.poll(SECONDS):
                process.kill()
                return _lost(architecture, f"no end within {SECONDS} s")
            return Result(**ours.recv())
        except EOFError:
            process.join()
            return _lost(architecture, f"the process died with exit code {process.exitcode}")
        finally:
            ours.close()
            process.join()


def _lost(architecture: str, what: str) -> Result:
    return Result(architecture, outcome="fault", faults=[["sweep", what]])


def _child(architecture: str, folder: str, connection: Connection) -> None:
    import torch
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    result = live(architecture, Path(folder))
    result.seconds = time.process_time()
    connection.send(result.to_dict())
