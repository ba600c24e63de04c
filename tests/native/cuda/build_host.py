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
OPTIONS = (
    "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra",
    "-Werror", "-fno-exceptions", "-fno-rtti",
)  # fmt: skip


def sources(root: Path) -> list[Path]:
    """What the library is made of."""
    return [
        *sorted((root / "csrc/cuda").glob("*.cu")),
        *sorted((root / "tests/native/cuda").glob("*.cpp")),
    ]


def build(
    folder: Path, root: Path = ROOT, reuse: Path | None = None, options: tuple[str, ...] = ()
) -> Path:
    """Compiles, with more options if given, and links.

    `reuse` is a folder of objects that are taken as they are.

    Raises:
        SystemExit: There is no compiler, or it fails.
    """
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise SystemExit("The host build of the CUDA kernels needs a C++ compiler, found none.")
    folder.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{root / path}" for path in ("csrc/include", "csrc/cuda", "tests/native/cuda")]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        kept = None if reuse is None else reuse / target.name
        if kept is not None and kept.is_file():
            return kept
        run(
            [
                compiler,
                *OPTIONS,
                *options,
                *includes,
                "-x",
                "c++",
                "-c",
                str(source),
                "-o",
                str(target),
            ]
        )
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources(root)))
    library = folder / "libbitkernels_cuda_host.so"
    run([compiler, "-shared", *map(str, objects), "-o", str(library)])
    return library


def run(command: list[str]) -> None:
    """Runs a compiler; its messages end the program."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT))
