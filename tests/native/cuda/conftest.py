"""The host library, built once a session; each test runs its threads in another order."""

from __future__ import annotations

import ctypes
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.native.cuda.build_host import build
from tests.native.cuda.host import HostKernels, load_host_library

# Names a library that is there already: the mutation test gives its own.
LIBRARY_VARIABLE = "BITLAB_CUDA_HOST_LIBRARY"


@pytest.fixture(scope="session")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = os.environ.get(LIBRARY_VARIABLE)
    if path is None:
        path = str(build(tmp_path_factory.mktemp("cuda_host")))
    return load_host_library(Path(path))


@pytest.fixture
def host(host_library: ctypes.CDLL, request: pytest.FixtureRequest) -> Iterator[HostKernels]:
    host_library.bk_emulator_order(zlib.crc32(request.node.name.encode()) % 3)
    yield HostKernels(host_library)
    host_library.bk_emulator_clear()
