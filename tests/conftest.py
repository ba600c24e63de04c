"""Fixtures that force every instruction set, backend and thread count in turn; the GPU, if any."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

# Before torch reads it. With a process for each CPU, a thread that spins until the others are done
# keeps them from the CPU that they need: seen to make 40 ms of 0.5 ms.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

import bitcore
from bitcore.kernels import kernels_for
from bitcore.kernels.cpu import CpuKernels
from bitcore.kernels.cuda import CudaKernels
from tests.native.cuda.build_host import build
from tests.native.cuda.host import HostKernels, load_host_library
from tests.processes import Elsewhere, shared
from tests.stock_environment import stock_processes

# Of the tests marked `ci` these take minutes each. They come first, so that no process of a session
# is left alone with one in the end.
_MINUTES = (
    "bitlab_vllm", "scripts", "test_demo.py", "test_ecosystem.py", "test_real_model.py",
    "test_wheels.py",
)  # fmt: skip
# Names a host library of the CUDA kernels that is there already.
HOST_LIBRARY_VARIABLE = "BITLAB_CUDA_HOST_LIBRARY"


@pytest.hookimpl(trylast=True)  # behind -m, which leaves some out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest tests first, otherwise the order stays. Each process of a session begins
    with an equal part of what is collected: with its share of the files of long ones.
    """
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    long = [i for i in items if i.get_closest_marker("ci") and {*i.path.parts} & {*_MINUTES}]
    files = {path: n % processes for n, path in enumerate(dict.fromkeys(i.path for i in long))}
    taken = {*long}
    others = iter([item for item in items if item not in taken])
    parts = []
    for process in range(processes):
        size = len(items) * (process + 1) // processes - len(items) * process // processes
        part = [item for item in long if files[item.path] == process]
        parts += [*part, *islice(others, max(0, size - len(part)))]
    items[:] = [*parts, *others]


def native_kernels() -> CpuKernels:
    """The native CPU kernels; a missing library fails the test instead of skipping it."""
    with bitcore.use_backend("cpu"):
        kernels = kernels_for("cpu")
    assert isinstance(kernels, CpuKernels)
    return kernels


@pytest.fixture(params=native_kernels().supported_isas)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this CPU has, forced."""
    with bitcore.use_backend("cpu"), native_kernels().use_isa(request.param):
        yield request.param


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with bitcore.use_backend(request.param):
        yield request.param


@pytest.fixture(params=[1, 2])
def num_threads(request: pytest.FixtureRequest) -> int:
    torch.set_num_threads(request.param)
    return int(request.param)


@pytest.fixture(scope="session")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The CUDA kernels compiled for the emulator, once for all processes of a session."""
    path = os.environ.get(HOST_LIBRARY_VARIABLE)
    if path is not None:
        return load_host_library(Path(path))
    with shared("cuda_host", tmp_path_factory) as folder:
        library = folder / "libbitkernels_cuda_host.so"
        return load_host_library(library if library.is_file() else build(folder))


@pytest.fixture
def host(host_library: ctypes.CDLL, request: pytest.FixtureRequest) -> Iterator[HostKernels]:
    """The CUDA kernels on CPU tensors; each test runs its threads in another order."""
    host_library.bk_emulator_order(zlib.crc32(request.node.name.encode()) % 3)
    yield HostKernels(host_library)
    host_library.bk_emulator_clear()


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elsewhere]:
    """Processes of an environment that has transformers and no BitLab."""
    server = stock_processes(tmp_path_factory.mktemp("stock") / "venv")
    yield server
    server.close()


@pytest.fixture
def gpu() -> torch.device:
    """A CUDA device with BitLab's kernels, which fail if they are missing; the only place that
    skips for want of a device.
    """
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    # Not forced: the same tests compute on the CPU too.
    assert isinstance(kernels_for("cuda"), CudaKernels)
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session", autouse=True)
def _no_user_cache() -> Iterator[None]:
    """No test depends on what another run left in the user's cache, nor leaves anything there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITLAB_CACHE", "off")
        yield


@pytest.fixture(scope="module", autouse=True)
def _collections_look_at_the_module_alone() -> None:
    """Keeps what is there before a module's tests from every collection of garbage in them.

    Modules make a million objects, and looking at these takes a second. transformers' Trainer
    collects at the start of every run.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _as_if_alone() -> Iterator[None]:
    """The same random numbers and thread count for every test, whatever ran before.

    torch.compile keeps eight versions of a function and no more, so those of other tests go.
    """
    before = torch.get_num_threads()
    # For each kind of device that is not there, torch.manual_seed keeps a call and its traceback.
    seed = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed
    seed(0)
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)
