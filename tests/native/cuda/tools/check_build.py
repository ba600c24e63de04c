"""Checks what nvcc made: registers, spills, and the instructions that the kernels are about.

python tests/native/cuda/tools/check_build.py BUILD_LOG SHARED_SIZES SASS...

BUILD_LOG holds the output of a build with ``-Xptxas=-v``; SHARED_SIZES that of shared_sizes.cpp;
each SASS file that of ``cuobjdump -sass`` for one architecture.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# Beginning of a kernel's name: patterns of instructions that must be in its machine code.
LOAD_128 = r"LDG\.E[.A-Z]*\.128"
COPY_128 = r"LDGSTS\.E[.A-Z]*\.128"
SHARED_128 = r"LDS\.128"
PIPELINE = (COPY_128, SHARED_128, "LDGDEPBAR")
INSTRUCTIONS = {
    "few_kernel<bitlab::TernaryInt8": (r"IMMA\.16832\.U8\.S8", LOAD_128),
    "few_kernel<bitlab::Int8Int8": (r"IMMA\.16832\.S8\.S8", LOAD_128),
    "few_kernel<bitlab::TernaryFloat<true": (r"HMMA\.16816\.F32\.BF16", LOAD_128),
    "few_kernel<bitlab::TernaryFloat<false": (r"HMMA\.16816\.F32", LOAD_128),
    "many_kernel<bitlab::TernaryInt8": (r"IMMA\.16832\.U8\.S8", *PIPELINE),
    "many_kernel<bitlab::Int8Int8": (r"IMMA\.16832\.S8\.S8", *PIPELINE),
    "many_kernel<bitlab::TernaryFloat<true": (r"HMMA\.16816\.F32\.BF16", *PIPELINE),
    "many_kernel<bitlab::TernaryFloat<false": (r"HMMA\.16816\.F32", *PIPELINE),
    "experts_few_kernel<bitlab::TernaryInt8": (r"IMMA\.16832\.U8\.S8", LOAD_128),
    "experts_many_kernel<bitlab::TernaryInt8": (r"IMMA\.16832\.U8\.S8", *PIPELINE),
    "experts_quantize_kernel": (LOAD_128,),
    "gemv_kernel": (r"IDP\.4A\.U8\.S8", LOAD_128, SHARED_128),
    "quantize_kernel": (LOAD_128,),
    "gradient_kernel<true": (r"HMMA\.16816\.F32\.BF16",),
    "gradient_kernel<false": (r"HMMA\.16816\.F32",),
}
# The same for kernels that hold nothing on other architectures.
HOPPER = {
    "fused_kernel": (r"IMMA\.16832\.U8\.S8", COPY_128, SHARED_128, "UCGABAR_ARV", "STAS"),
    "experts_wgmma_kernel": (r"IGMMA\.64x64x32\.U8\.S8", r"FENCE\.VIEW\.ASYNC", *PIPELINE),
    "wgmma_kernel": (r"IGMMA\.64x64x32\.U8\.S8", r"FENCE\.VIEW\.ASYNC", *PIPELINE),
}
LOCAL = r"\b(LDL|STL)\b"


@dataclass
class Kernel:
    """What ptxas says of one kernel on one architecture."""

    name: str
    architecture: str
    registers: int = 0
    stack: int = 0
    spills: int = 0


def demangled(names: list[str]) -> dict[str, str]:
    """Returns short readable names: no namespace in front, no parameters."""
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    short = [
        re.sub(r"^(void )?bitlab::", "", name).rsplit("(", 1)[0]
        for name in done.stdout.splitlines()
    ]
    return dict(zip(names, short, strict=True))


def parse_log(text: str) -> list[Kernel]:
    """Reads ptxas's reports in a build log."""
    kernels: list[Kernel] = []
    for line in text.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            kernels.append(Kernel(found[1], found[2]))
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", line):
            kernels[-1].stack = int(found[1])
            kernels[-1].spills = int(found[2]) + int(found[3])
        elif found := re.search(r"Used (\d+) registers", line):
            kernels[-1].registers = int(found[1])
    names = demangled([kernel.name for kernel in kernels])
    for kernel in kernels:
        kernel.name = names[kernel.name]
    return kernels


def parse_sass(text: str) -> dict[str, str]:
    """Returns the machine code of each kernel."""
    parts = re.split(r"Function : (\w+)", text)
    names = demangled(parts[1::2])
    return {names[name]: code for name, code in zip(parts[1::2], parts[2::2], strict=True)}


def check_sass(architecture: str, code: dict[str, str]) -> list[str]:
    """Returns what is missing from, or too much in, the kernels of one architecture."""
    faults = []
    for name, text in code.items():
        if re.search(LOCAL, text):
            faults.append(f"{architecture} {name}: local memory in the machine code")
    wanted = INSTRUCTIONS | (HOPPER if architecture == "sm_90a" else {})
    for beginning, patterns in wanted.items():
        kernels = {name: text for name, text in code.items() if name.startswith(beginning)}
        if not kernels:
            faults.append(f"{architecture}: no kernel {beginning}")
        for name, text in kernels.items():
            faults += [
                f"{architecture} {name}: no {pattern}"
                for pattern in patterns
                if not re.search(pattern, text)
            ]
    return faults


def main(log: Path, sizes: Path, sass: list[Path]) -> int:
    """Prints the table and the faults; returns how many there are."""
    text = log.read_text()
    kernels = parse_log(text)
    shared = [line.split("\t") for line in sizes.read_text().splitlines()]
    faults = [] if kernels else ["the log holds no report of ptxas"]
    faults += re.findall(r".*wgmma.mma_async instructions are serialized.*", text)
    print(f"{'kernel':72} {'arch':6} {'registers':>9} {'shared':>7} {'stack':>6} {'spills':>6}")
    for kernel in sorted(kernels, key=lambda kernel: (kernel.name, kernel.architecture)):
        memory = next((size for name, size in shared if kernel.name.startswith(name)), "0")
        print(
            f"{kernel.name:72} {kernel.architecture:6} {kernel.registers:9} {memory:>7} "
            f"{kernel.stack:6} {kernel.spills:6}"
        )
        if kernel.stack or kernel.spills:
            faults.append(f"{kernel.architecture} {kernel.name}: stack or spills")
    reported = {(kernel.name, kernel.architecture) for kernel in kernels}
    for path in sass:
        code = parse_sass(path.read_text())
        found = check_sass(path.stem, code)
        found += [
            f"{path.stem} {name}: no report of ptxas"
            for name in code
            if (name, path.stem) not in reported
        ]
        print(f"{path.stem}: machine code of {len(code)} kernels, {len(found)} faults")
        faults += found
    for fault in faults:
        print(f"FAULT: {fault}")
    return len(faults)


if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[1:]]
    sys.exit(main(paths[0], paths[1], paths[2:]) != 0)
