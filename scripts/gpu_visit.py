"""What a visit to a GPU is, and what one part of it is; see gpu.py."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts/bench")]

# As tests/conftest.py names it.
HOST_LIBRARY_VARIABLE = "BITLAB_CUDA_HOST_LIBRARY"
LIBRARY, HOST_LIBRARY = "libbitkernels_cuda.so", "libbitkernels_cuda_host.so"

Result = dict[str, Any]


@dataclass
class Visit:
    """What the parts have to know.

    Attributes:
        work: A folder for libraries, checkpoints, texts and results; may be lost.
        on_gpu: Whether there is a GPU.
        quick: Whether shapes are tiny, to see that everything runs.
        models: What scripts/real_models.py made; None where it was not brought.
        sources: What stands for them; what was made of others is not gone on with.
        installed: Whether to measure the installed libraries, and to build none.
        left: Returns the seconds that are left to the part that runs.
    """

    work: Path
    on_gpu: bool
    quick: bool
    models: Path | None
    sources: str = ""
    installed: bool = False
    left: Callable[[], float] = lambda: float("inf")

    @property
    def results(self) -> Path:
        """Where commands write; nothing else is there."""
        return self.work / "results"

    @property
    def libraries(self) -> Path:
        """Where the build goes on from the last one."""
        return self.work / "libraries"

    def kept(self, name: str) -> Path:
        """Returns a folder of what takes long to make, for these sources and sizes only."""
        return self.work / f"{name}-{self.sources}{'-quick' if self.quick else ''}"

    def drop_others(self, name: str) -> None:
        """Removes such folders of other sources, which are of gigabytes."""
        for path in self.work.glob(f"{name}-*"):
            of = re.fullmatch(rf"{name}-([0-9a-f]{{16}})(-quick)?", path.name)
            if of is not None and of[1] != self.sources:
                shutil.rmtree(path)

    def bench(self, script: str, result: str, *options: str) -> list[str]:
        """Returns the command of a benchmark that writes its result to `results`."""
        command = [sys.executable, str(ROOT / "scripts/bench" / script), *options]
        command += ["--json", str(self.results / result)]
        return [*command, "--quick"] if self.quick else command

    def pytest(self, report: str, *options: str) -> list[str]:
        """Returns the command of tests that write their report to `results`."""
        command = [sys.executable, str(ROOT / "scripts/gpu_pytest.py"), str(self.results / report)]
        return [*command, *options]

    def clear(self) -> None:
        """Removes what earlier commands have written, which is no part's that follows."""
        self.results.mkdir(parents=True, exist_ok=True)
        for path in self.results.iterdir():
            if path.is_file():
                path.unlink()

    def read(self, name: str) -> Result | None:
        """Returns a command's result; None where a cut-off came first."""
        return read_json(self.results / name)

    def library(self) -> Path | None:
        """Returns the library to measure; None where there is none of these sources."""
        if self.on_gpu and self.installed:
            return installed_library()
        given = os.environ.get(HOST_LIBRARY_VARIABLE)
        if not self.on_gpu and given:
            path, ready = Path(given), True
        else:
            path = self.libraries / (LIBRARY if self.on_gpu else HOST_LIBRARY)
            ready = self._built() == self.sources
        return path if ready and path.is_file() else None

    def _built(self) -> str | None:
        """Returns for which sources the last build was done; None where it was not."""
        mark = self.libraries / "sources"
        return mark.read_text() if mark.is_file() else None

    def begin_build(self) -> None:
        """Removes the libraries, so that those of a build that fails are not of other sources."""
        for path in (self.libraries / "sources", *self.libraries.glob("*.so")):
            path.unlink(missing_ok=True)

    def end_build(self, done: bool) -> None:
        """Notes whether the libraries are of these sources."""
        self.libraries.mkdir(parents=True, exist_ok=True)
        mark = self.libraries / "sources"
        if done:
            mark.write_text(self.sources)
        else:
            mark.unlink(missing_ok=True)


@dataclass(frozen=True)
class Part:
    """One part of a visit.

    Attributes:
        weight: Its share of the time that is left when its turn comes, beside those after it.
        least: Seconds without which it is not begun.
        commands: Yields what it runs, one after another.
        result: Reads what it has found, also when it was cut off.
        problem: Returns why it cannot run here; None where it can.
    """

    weight: float
    least: float
    commands: Callable[[Visit], Iterator[list[str]]]
    result: Callable[[Visit], Result | None]
    problem: Callable[[Visit], str | None] = lambda visit: None


def read_json(path: Path) -> Result | None:
    """Returns what a file holds; None where there is none."""
    found: Result | None = json.loads(path.read_text()) if path.is_file() else None
    return found


def installed_library() -> Path | None:
    """Returns the library where BitLab looks for it, else of the installed BitLab, which the
    sources here hide unless it is an editable one; None where there is none.
    """
    from bitcore.kernels.native import LIBRARY_DIRECTORY_VARIABLE, library_path

    path = library_path("bitkernels_cuda")
    if path.is_file():
        return path
    if LIBRARY_DIRECTORY_VARIABLE in os.environ:
        return None
    for distribution in importlib.metadata.distributions(name="bitlab-hf"):
        for file in distribution.files or ():
            path = Path(str(distribution.locate_file(file)))
            if file.name == LIBRARY and path.is_file():
                return path
    return None
