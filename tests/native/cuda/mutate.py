"""Applies each fault of `mutations` to a copy of the kernels, and must see a check fail.

    python tests/native/cuda/mutate.py [WORD ...]     all, or those whose name or file holds a word

A fault is compiled into one of the sources that it reaches, its mutation's unit, and linked with
the right objects of all others: with less of the program wrong it is no easier to notice. A mutant
that does not compile ends the program; one that no check notices fails it.
"""

from __future__ import annotations

import multiprocessing
import re
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.native.cuda.build_host import (
    OPTIONS,
    ROOT,
    build,
    compile_source,
    find_compiler,
    link,
    run,
    sources,
)
from tests.native.cuda.host import load_host_library
from tests.native.cuda.mutation import Mutation
from tests.native.cuda.mutations import MUTATIONS
from tests.native.cuda.quick_check import first_failure

LIMIT = 120.0  # seconds
STANDARD = ("functional", "math.h", "stddef.h", "stdint.h", "string.h")
FOLDERS = ("csrc/include", "csrc/cuda", "tests/native/cuda")


def faulty_text(mutation: Mutation) -> str:
    """Returns the file with the fault in it; any white space in `old` stands for any other.

    Raises:
        SystemExit: `old` is not there exactly once.
    """
    text = (ROOT / mutation.path).read_text()
    pattern = r"\s+".join(re.escape(word) for word in mutation.old.split())
    found = len(re.findall(pattern, text))
    if found != 1:
        raise SystemExit(f"{mutation.path}: {mutation.old!r} must be there once, found {found}")
    return re.sub(pattern, lambda _: mutation.new, text)


def reachable(source: Path) -> set[str]:
    """Names of the files that a source includes, itself among them."""
    names, queue = set(), [source]
    while queue:
        path = queue.pop()
        if path.name in names:
            continue
        names.add(path.name)
        for name in re.findall(r'#include "([^"]+)"', path.read_text()):
            found = [ROOT / folder / name for folder in FOLDERS]
            queue += [path for path in found if path.is_file()]
    return names


def precompile(folder: Path) -> tuple[str, ...]:
    """Compiles the standard headers of the emulator once; returns the options that use them."""
    header = folder / "standard.h"
    header.write_text("".join(f"#include <{name}>\n" for name in STANDARD))
    run([find_compiler(), *OPTIONS, "-w", "-x", "c++-header", str(header), "-o", f"{header}.gch"])
    return ("-w", "-include", str(header))


def build_mutant(
    mutation: Mutation, right: Path, folder: Path, options: tuple[str, ...] = ()
) -> Path:
    """Compiles the fault's unit and links it with the objects of the right kernels."""
    root = folder / "root"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, root / name)
    (root / mutation.path).write_text(faulty_text(mutation))
    unit = next(source for source in sources(root) if source.stem == mutation.unit)
    faulty = compile_source(unit, folder, root, options)
    others = [path for path in sorted(right.glob("*.o")) if path.name != faulty.name]
    return link([faulty, *others], folder / "mutant.so")


def judge(library: Path, unit: str, answer: Connection) -> None:
    """Sends the first failure of a library, or None."""
    torch.set_num_threads(1)
    answer.send(first_failure(load_host_library(library), unit))


def judged(library: Path, context: ForkServerContext, unit: str = "") -> str | None:
    """What the checks say of a library, from a process of its own; a crash is a failure too."""
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=judge, args=(library, unit, theirs))
    child.start()
    theirs.close()
    try:
        found: str | None = ours.recv() if ours.poll(LIMIT) else "no end"
    except EOFError:
        child.join()
        found = f"the process ended with {child.exitcode}"
    child.kill()
    child.join()
    return found


def main(words: list[str]) -> int:
    """Returns how many faults went unnoticed."""
    chosen = [m for m in MUTATIONS if not words or any(w in f"{m.path} {m.name}" for w in words)]
    # Processes of a server that has imported torch already.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.native.cuda.quick_check"])
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        options = precompile(work)
        failure = judged(build(work / "right", options=options), context)
        if failure is not None:
            raise SystemExit(f"The kernels fail without any fault: {failure}")

        def one(index: int) -> str | None:
            folder = work / str(index)
            folder.mkdir()
            mutant = build_mutant(chosen[index], work / "right", folder, options)
            found = judged(mutant, context, chosen[index].calls or chosen[index].unit)
            shutil.rmtree(folder)
            return found

        unnoticed = 0
        with ThreadPoolExecutor(2) as pool:
            for mutation, found in zip(chosen, pool.map(one, range(len(chosen))), strict=True):
                unnoticed += found is None
                said = "NOT NOTICED" if found is None else re.sub(r"\s+", " ", found)[:110]
                print(f"{Path(mutation.path).name}: {mutation.name}: {said}", flush=True)
    print(f"{len(chosen)} faults, {unnoticed} not noticed")
    return unnoticed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) != 0)
