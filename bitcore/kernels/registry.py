"""Which backend runs the ops on which device.

A backend is a module or object with the functions of `Kernels`. For each device type the first
available backend of `_CANDIDATES` is taken; ``BITLAB_BACKEND`` or `use_backend` forces one for the
whole process, and a forced backend that is not available raises instead of falling back.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Protocol, cast

import torch
from torch import Tensor

from bitcore import reference
from bitcore.errors import BackendError
from bitcore.kernels.native import ISA_VARIABLE

logger = logging.getLogger("bitlab")
ENVIRONMENT_VARIABLE = "BITLAB_BACKEND"


class Kernels(Protocol):
    """The functions that a backend provides; `bitcore.reference` documents and defines them."""

    def pack_weight(
        self, weight: Tensor, granularity: str, group_size: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ternarizes and packs a float weight; multipliers where there are groups."""
        ...

    def row_sums(self, weight: Tensor) -> Tensor:
        """Adds up the magnitudes of each row."""
        ...

    def pack_codes(self, weight: Tensor, step: Tensor) -> Tensor:
        """Ternarizes a float weight with a given step and packs it."""
        ...

    def quantize_activation(self, x: Tensor, per_tensor: bool) -> tuple[Tensor, Tensor]:
        """Quantizes activations to int8."""
        ...

    def matmul(self, codes: Tensor, qweight: Tensor, out_features: int) -> Tensor:
        """Multiplies int8 codes with packed ones, exactly."""
        ...

    def unpack_weight(
        self,
        qweight: Tensor,
        weight_scale: Tensor,
        out_features: int,
        dtype: torch.dtype,
        multiplier: Tensor | None = None,
    ) -> Tensor:
        """Unpacks to codes times scale."""
        ...

    def input_gradient(
        self,
        dy: Tensor,
        qweight: Tensor,
        weight_scale: Tensor,
        out_features: int,
        dtype: torch.dtype,
        multiplier: Tensor | None = None,
    ) -> Tensor:
        """Multiplies an output's gradient with the packed weight."""
        ...

    def learned_gradients(self, dw: Tensor, weight: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Makes the gradients of a weight and of its learned scale."""
        ...

    def find_invalid_code(self, qweights: Sequence[Tensor]) -> int | None:
        """Finds the first of several packed matrices that holds the code 3."""
        ...

    def linear_int8(
        self,
        x: Tensor,
        qweight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """Runs a layer with int8 weights."""
        ...

    def linear(
        self,
        x: Tensor,
        qweight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        out_features: int,
        activation: str,
        out_dtype: torch.dtype,
        multiplier: Tensor | None = None,
    ) -> Tensor:
        """Runs the whole layer."""
        ...

    def linear_with_codes(
        self,
        x: Tensor,
        qweight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        out_features: int,
        activation: str,
        out_dtype: torch.dtype,
        multiplier: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the whole layer and keeps the int8 codes of x and their scales."""
        ...


@dataclass(frozen=True)
class BackendInfo:
    """What `backends` says of one backend on one device type.

    Attributes:
        device: Device type, such as ``"cpu"``.
        name: The backend's name, as `use_backend` takes it.
        available: Whether it can run here.
        chosen: Whether it is the one that runs.
        reason: Why it was chosen or not; the load error where there was one.
    """

    device: str
    name: str
    available: bool
    chosen: bool
    reason: str


def _load_cpu() -> Kernels:
    from bitcore.kernels.cpu import CpuKernels

    return CpuKernels()


def _load_cuda() -> Kernels:
    from bitcore.kernels.cuda import CudaKernels

    return CudaKernels()


def _load_reference() -> Kernels:
    return cast(Kernels, reference)


# Best first; the reference runs on every device that torch knows.
_CANDIDATES: dict[str, dict[str, Callable[[], Kernels]]] = {
    "cpu": {"cpu": _load_cpu},
    "cuda": {"cuda": _load_cuda},
}
_forced: list[str] = []
_chosen: dict[str, Kernels] = {}


@cache
def _load(device: str, name: str) -> Kernels | BackendError:
    """Loads a backend once; a failure is kept, so that `backends` can tell it."""
    if name == "reference":
        return _load_reference()
    try:
        return _CANDIDATES[device][name]()
    except BackendError as error:
        return error


def _names(device: str) -> list[str]:
    return [*_CANDIDATES.get(device, {}), "reference"]


def _all_names() -> list[str]:
    return sorted({name for device in ("cpu", *_CANDIDATES) for name in _names(device)})


def _check_name(name: str, source: str) -> None:
    if name not in ("auto", *_all_names()):
        raise BackendError(
            f"{source}: backend must be one of {['auto', *_all_names()]}, got {name!r}"
        )


def _wanted() -> str:
    if _forced:
        return _forced[-1]
    name = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    _check_name(name, ENVIRONMENT_VARIABLE)
    return name


def kernels_for(device: str) -> Kernels:
    """Returns the kernels for a device type such as ``"cpu"``.

    Raises:
        BackendError: A backend is forced that is not available on this device.
    """
    kernels = _chosen.get(device)
    if kernels is None:
        kernels = _chosen[device] = _choose(device)
    return kernels


def _choose(device: str) -> Kernels:
    wanted = _wanted()
    if wanted != "auto":
        if wanted not in _names(device):
            raise BackendError(
                f"bitlab: backend must be one of {_names(device)} on device {device!r}, "
                f"got {wanted!r}"
            )
        loaded = _load(device, wanted)
        if isinstance(loaded, BackendError):
            raise loaded
        return loaded
    for name in _names(device):
        loaded = _load(device, name)
        if not isinstance(loaded, BackendError):
            return loaded
        if name == "cpu" and os.environ.get(ISA_VARIABLE, "auto") != "auto":
            # An instruction set was asked for by name: no silent fallback.
            raise loaded
        logger.warning("bitlab: backend %r is not available, falling back: %s", name, loaded)
    raise AssertionError("the reference backend is always available")


def backends() -> list[BackendInfo]:
    """Tells which backends there are for each device, which one runs, and why not the others."""
    wanted = _wanted()
    infos = []
    for device in _CANDIDATES:
        names = _names(device)
        loaded = {name: _load(device, name) for name in names}
        usable = [name for name in names if not isinstance(loaded[name], BackendError)]
        chosen = wanted if wanted in usable else usable[0] if wanted == "auto" else None
        for name in names:
            kernels = loaded[name]
            if isinstance(kernels, BackendError):
                reason = str(kernels)
            elif name != chosen:
                reason = f"{chosen!r} is faster" if wanted == "auto" else f"{wanted!r} is forced"
            else:
                reason = "forced" if wanted != "auto" else "the first that is available"
                reason += getattr(kernels, "description", "")
            infos.append(BackendInfo(device, name, name in usable, name == chosen, reason))
    return infos


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces a backend for the whole process while the context is open.

    Args:
        name: ``"reference"``, ``"cpu"``, ``"cuda"``, or ``"auto"`` for the best.

    Raises:
        BackendError: No such backend, or it is not available on any device; nothing is changed.
    """
    _check_name(name, "use_backend")
    if name not in ("auto", "reference"):
        for device, candidates in _CANDIDATES.items():
            if name in candidates and isinstance(error := _load(device, name), BackendError):
                raise error
    _forced.append(name)
    _chosen.clear()
    try:
        yield
    finally:
        _forced.pop()
        _chosen.clear()
