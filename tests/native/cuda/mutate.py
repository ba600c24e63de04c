"""Applies each fault of `mutations` to a copy of the kernels, and must see a check fail.

    python tests/native/cuda/mutate.py [WORD ...]     all, or those whose name or file holds a word

Every mutant is compiled for the emulator; one that does not compile ends the program, as does one
that no check notices.
"""

from __future__ import annotations

import multiprocessing
import os
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

from tests.native.cuda.build_host import ROOT, build, sources
from tests.native.cuda.host import load_host_library
from tests.native.cuda.mutations import MUTATIONS, Mutation
from tests.native.cuda.quick_check import first_failure

LIMIT = 120.0  # seconds
FOLDERS = ("csrc/include", "csrc/cuda", "tests/native/cuda")


def apply(mutation: Mutation, root: Path) -> None:
    """Replaces the text in a copy; any white space in `old` stands for any other."""
    path = root / mutation.path
    text = path.read_text()
    pattern = r"\s+".join(re.escape(word) for word in mutation.old.split())
    found = len(re.findall(pattern, text))
    if found != 1:
        raise SystemExit(f"{mutation.path}: {mutation.old!r} must be there once, found {found}")
    path.write_text(re.sub(pattern, lambda _: mutation.new, text))


def reachable(source: Path, root: Path) -> set[str]:
    """Names of the files that a source includes, itself among them."""
    names, queue = set(), [source]
    while queue:
        path = queue.pop()
        if path.name in names:
            continue
        names.add(path.name)
        for name in re.findall(r'#include "([^"]+)"', path.read_text()):
            found = [root / folder / name for folder in FOLDERS]
            queue += [path for path in found if path.is_file()]
    return names


def build_mutant(mutation: Mutation, objects: Path, folder: Path) -> Path:
    """Compiles what the fault can reach; the other objects are those of the right kernels."""
    root = folder / "root"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, root / name)
    apply(mutation, root)
    kept = folder / "kept"
    kept.mkdir()
    changed = Path(mutation.path).name
    for source in sources(root):
        if changed not in reachable(source, root):
            os.link(objects / f"{source.stem}.o", kept / f"{source.stem}.o")
    return build(folder / "objects", root, kept, options=("-O1", "-w"))


def judge(library: Path, answer: Connection) -> None:
    """Sends the first failure of a library, or None."""
    torch.set_num_threads(1)
    answer.send(first_failure(load_host_library(library)))


def judged(library: Path, context: ForkServerContext) -> str | None:
    """What the checks say of a library, from a process of its own; a crash is a failure too."""
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=judge, args=(library, theirs))
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
        failure = judged(build(work / "right"), context)
        if failure is not None:
            raise SystemExit(f"The kernels fail without any fault: {failure}")

        def one(index: int) -> str | None:
            folder = work / str(index)
            folder.mkdir()
            found = judged(build_mutant(chosen[index], work / "right", folder), context)
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
