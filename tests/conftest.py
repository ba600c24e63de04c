"""Fixtures that force every instruction set, backend and thread count in turn."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import bitcore
from bitcore.kernels import kernels_for
from bitcore.kernels.cpu import CpuKernels


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
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
