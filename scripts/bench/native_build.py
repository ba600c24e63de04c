"""Builds the native libraries out of this clone, for the GPU at hand: without pip or a network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = {
    "nvcc": "the CUDA toolkit's compiler",
    "cmake": "a wheel: cmake",
    "c++": "a C++ compiler: apt-get install g++",
}


def find_program(name: str) -> str | None:
    """Returns where a program is: on the path, beside this Python, or in the CUDA toolkit."""
    homes = [os.environ.get(variable) for variable in ("CUDA_HOME", "CUDA_PATH")]
    folders = [Path(home) / "bin" for home in (*homes, "/usr/local/cuda") if home]
    folders.insert(0, Path(sys.executable).parent)
    places = os.pathsep.join(map(str, folders))
    return shutil.which(name) or shutil.which(name, path=places)


def missing_programs() -> list[str]:
    """Returns what a build lacks here, each with where it comes from."""
    return [f"{name} ({what})" for name, what in PROGRAMS.items() if find_program(name) is None]


def architecture(capability: tuple[int, int]) -> str:
    """Returns what CMake calls a GPU's machine code; wgmma is in no other than 90a."""
    major, minor = capability
    return "90a-real" if capability == (9, 0) else f"{major}{minor}-real"


def build_libraries(folder: Path, target: str | None = None) -> Path:
    """Compiles both native libraries, or what has changed of them; returns their folder.

    Args:
        folder: Kept, and gone on with.
        target: As `architecture` names it; None for that of the first GPU.

    Raises:
        SystemExit: Something that a build needs is missing, or it fails.
    """
    missing = missing_programs()
    if missing:
        raise SystemExit(f"libbitkernels_cuda cannot be built: missing {'; '.join(missing)}")
    if target is None:
        import torch

        target = architecture(torch.cuda.get_device_capability())
    ninja = find_program("ninja")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    cmake = str(find_program("cmake"))
    configure = [
        cmake, *generator, "-S", str(ROOT / "csrc"), "-B", str(folder), "-DBITLAB_CUDA=ON",
        f"-DBITLAB_CUDA_ARCHITECTURES={target}",
        f"-DCMAKE_CUDA_COMPILER={find_program('nvcc')}",
    ]  # fmt: skip
    print(f"compiling the native libraries for {target} ...", flush=True)
    for command in (configure, [cmake, "--build", str(folder), "--parallel", str(os.cpu_count())]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return folder


if __name__ == "__main__":
    print(build_libraries(Path(sys.argv[1])))
