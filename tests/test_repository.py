"""The repository itself: sizes of files, no trace of a machine, clean libraries."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from bitcore.kernels.native import library_path

ROOT = Path(__file__).parents[1]


def tracked_files() -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    paths = [ROOT / name for name in done.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


def machine_values() -> list[bytes]:
    """Paths, home and host name of this machine, read now; too short ones would match anything."""
    values = {
        str(ROOT),
        str(ROOT.parent),
        str(Path.home()),
        os.environ.get("HOME", ""),
        sys.prefix,
        sys.base_prefix,
        sysconfig.get_path("stdlib"),
        socket.gethostname(),
        socket.getfqdn(),
    }
    common = {"/usr", "/usr/local", "/home", "/tmp", "localhost", "debian", "ubuntu"}
    found = {value.rstrip("/") for value in values} - common
    return [value.encode() for value in sorted(found) if len(value) > 4]


def assert_no_trace(name: str, content: bytes) -> None:
    for value in machine_values():
        assert value not in content, f"{name} holds {value.decode()}"


def test_there_is_something_to_search_for() -> None:
    assert str(ROOT).encode() in machine_values() or len(str(ROOT)) <= 4


def test_tracked_files_name_no_machine() -> None:
    for path in tracked_files():
        assert_no_trace(str(path), path.read_bytes())


def test_library_names_no_machine() -> None:
    path = library_path("bitkernels_cpu")
    assert_no_trace(path.name, path.read_bytes())


def test_library_exports_its_contract_only() -> None:
    path = library_path("bitkernels_cpu")
    done = subprocess.run(
        ["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True
    )
    symbols = {line.split()[-1] for line in done.stdout.splitlines()}
    declared = re.findall(
        r"BK_API [\w ]+?[ *](bk_cpu_\w+)\(", (ROOT / "csrc/include/bitkernels.h").read_text()
    )
    assert symbols == set(declared)
    done = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True)
    needed = set(re.findall(r"NEEDED.*\[(.*?)\]", done.stdout))
    assert not any("torch" in name or "stdc++" in name for name in needed)


def test_lengths_of_files() -> None:
    limits = {".py": 400, ".h": 600, ".inl": 600, ".cpp": 600, ".cu": 600, ".cuh": 600}
    long = [
        f"{path}: {count}"
        for path in tracked_files()
        if path.suffix in limits
        and (count := len(path.read_text().splitlines())) > limits[path.suffix]
    ]
    assert not long


def test_cuda_library_exports_its_contract_only() -> None:
    path = library_path("bitkernels_cuda")
    declared = re.findall(
        r"BK_CUDA_API [\w ]+?[ *](bk_cuda_\w+)\(",
        (ROOT / "csrc/include/bitkernels_cuda.h").read_text(),
    )
    assert declared
    if not path.is_file():
        pytest.skip("built without nvcc: there is no CUDA library to compare the header with")
    assert_no_trace(path.name, path.read_bytes())
    done = subprocess.run(
        ["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True
    )
    assert {line.split()[-1] for line in done.stdout.splitlines()} == set(declared)
    done = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True)
    needed = set(re.findall(r"NEEDED.*\[(.*?)\]", done.stdout))
    assert not any(word in name for name in needed for word in ("torch", "stdc++", "cudart"))
