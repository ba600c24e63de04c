"""Sweeps: each architecture in a process of its own, forked from one that has imported all."""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

from tests import processes
from tests.bitlab_hf.sweep.life import live
from tests.bitlab_hf.sweep.results import Result

# Of computing; and by the clock, of a machine that may be busy.
CPU_SECONDS, SECONDS = 60, 300


def sweep(architectures: Iterable[str], at_once: int = 1) -> Iterator[Result]:
    """Yields the result of each architecture, in order."""
    with ThreadPoolExecutor(at_once) as pool:
        yield from pool.map(_one, architectures)


def _one(architecture: str) -> Result:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
        process = processes.fork(_child, architecture, folder, theirs)
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
