"""Builds the CUDA kernels for the CPU: the same sources, over the emulator instead of PTX.

python tests/native/cuda/build_host.py FOLDER [ROOT]     writes FOLDER/libbitkernels_cuda_host.so
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[3]
# More optimization takes longer to compile than it saves in the tests.
OPTIONS = (
    "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra",
    "-Werror", "-fno-exceptions", "-fno-rtti",
)  # fmt: skip


def sources(root: Path) -> list[Path]:
    """What the library is made of."""
    return [
        *sorted((root / "csrc/cuda").glob("*.cu")),
        *sorted((root / "tests/native/cuda").glob("*.cpp")),
    ]


def find_compiler() -> str:
    """Returns the C++ compiler.

    Raises:
        SystemExit: There is none.
    """
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise SystemExit("The host build of the CUDA kernels needs a C++ compiler, found none.")
    return compiler


def compile_source(source: Path, folder: Path, root: Path, options: tuple[str, ...] = ()) -> Path:
    """Compiles one source, with more options if given, and returns the object in folder.

    Raises:
        SystemExit: The compiler fails.
    """
    includes = [f"-I{root / path}" for path in ("csrc/include", "csrc/cuda", "tests/native/cuda")]
    target = folder / f"{source.stem}.o"
    language = ("-x", "c++", "-c", str(source), "-o", str(target))
    run([find_compiler(), *OPTIONS, *options, *includes, *language])
    return target


def link(objects: list[Path], library: Path) -> Path:
    """Links; of a function that several objects have, the first one's is taken."""
    run([find_compiler(), "-shared", *map(str, objects), "-o", str(library)])
    return library


def build(folder: Path, root: Path = ROOT, options: tuple[str, ...] = ()) -> Path:
    """Compiles everything, two sources at a time, and links.

    Raises:
        SystemExit: There is no compiler, or it fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        tasks = [pool.submit(compile_source, s, folder, root, options) for s in sources(root)]
        objects = [task.result() for task in tasks]
    return link(objects, folder / "libbitkernels_cuda_host.so")


def run(command: list[str]) -> None:
    """Runs a compiler; its messages end the program."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT))
