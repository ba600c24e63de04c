"""`CudaKernels` on the CPU: the library's functions over the emulator, every buffer registered."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitcore.kernels.cuda import CudaKernels
from bitcore.kernels.cuda_native import declare_cuda_functions

CONFLICTS, SHARED_LOADS, MMA, LAUNCHES, WGMMA = range(5)


def load_host_library(path: Path) -> ctypes.CDLL:
    """Loads what `build_host.build` made."""
    library = ctypes.CDLL(str(path))
    declare_cuda_functions(library)
    library.bk_emulator_register.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32)
    library.bk_emulator_register.restype = None
    library.bk_emulator_order.argtypes = (ctypes.c_uint32,)
    library.bk_emulator_order.restype = None
    library.bk_emulator_hopper.argtypes = (ctypes.c_int32,)
    library.bk_emulator_hopper.restype = None
    library.bk_emulator_clear.argtypes = ()
    library.bk_emulator_clear.restype = None
    library.bk_emulator_count.argtypes = (ctypes.c_int32,)
    library.bk_emulator_count.restype = ctypes.c_int64
    library.bk_emulator_place.argtypes = (ctypes.c_int32,) * 4
    library.bk_emulator_place.restype = ctypes.c_int32
    pointer = ctypes.c_void_p
    library.bk_emulator_probe.argtypes = (ctypes.c_int32, pointer, pointer)
    library.bk_emulator_probe.restype = ctypes.c_char_p
    library.bk_emulator_mma.argtypes = (ctypes.c_int32, pointer, pointer, pointer)
    library.bk_emulator_mma.restype = ctypes.c_char_p
    library.bk_emulator_wgmma_probe.argtypes = (ctypes.c_int32, pointer)
    library.bk_emulator_wgmma_probe.restype = ctypes.c_char_p
    library.bk_emulator_cluster_probe.argtypes = (ctypes.c_int32, pointer)
    library.bk_emulator_cluster_probe.restype = ctypes.c_char_p
    library.bk_emulator_one_wgmma.argtypes = (pointer, pointer, pointer)
    library.bk_emulator_one_wgmma.restype = ctypes.c_char_p
    return library


def extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


class HostKernels(CudaKernels):
    """The kernels of `CudaKernels` for CPU tensors.

    Args:
        library: As `load_host_library` gives it.
        multiprocessors: Of the device that is played; it decides how K is split.
    """

    def __init__(self, library: ctypes.CDLL, multiprocessors: int = 4) -> None:
        self._library = library
        self.multiprocessors = multiprocessors
        self.is_hopper = False

    def set_hopper(self, is_one: bool) -> None:
        """Plays a Hopper, which has wgmma and clusters, or an older device."""
        self.is_hopper = is_one
        self._library.bk_emulator_hopper(int(is_one))

    def _count_multiprocessors(self, op: str, device: torch.device) -> int:
        return self.multiprocessors

    def _scratch(self, size: int, device: torch.device) -> Tensor:
        # To the byte: what lies past the size that the library asked for is another buffer.
        room = torch.empty(size + 255, dtype=torch.uint8)
        start = -room.data_ptr() % 256
        return room[start : start + size]

    def _launch(
        self, device: torch.device, function: Callable[..., int], arguments: list[Any]
    ) -> int:
        return function(*arguments, None)

    def _call(self, op: str, name: str, outputs: tuple[Tensor, ...], *arguments: Any) -> None:
        self._library.bk_emulator_clear()
        written = {id(tensor) for tensor in outputs}
        for tensor in (*outputs, *arguments):
            if not isinstance(tensor, Tensor):
                continue
            if id(tensor) in written and tensor.numel():
                # What is not written must show: NaN in a float, a large number in an integer.
                tensor.view(-1).view(torch.uint8).fill_(0xFF)
            self._library.bk_emulator_register(
                tensor.data_ptr(), extent(tensor), 1 if id(tensor) in written else 0
            )
        super()._call(op, name, outputs, *arguments)

    def count(self, what: int) -> int:
        """A counter of the emulator since the last call of an op began."""
        found: int = self._library.bk_emulator_count(what)
        return found
