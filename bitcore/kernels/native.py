"""Loads the native libraries with ctypes; every signature stands in one table."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Callable
from ctypes import c_char_p, c_int32, c_int64, c_void_p
from pathlib import Path

# Before the library: it loads torch's OpenMP runtime, which the library shares.
import torch
from torch import Tensor

from bitcore.checks import check_storage
from bitcore.errors import BackendError

ABI_VERSION = 8
LIBRARY_DIRECTORY_VARIABLE = "BITLAB_LIBRARY_DIR"
ISA_VARIABLE = "BITLAB_CPU_ISA"

# name: (result, arguments)
Signatures = dict[str, tuple[type, tuple[type, ...]]]
# Pointers are c_void_p. A test compares this with bitkernels.h.
CPU_SIGNATURES: Signatures = {
    "bk_cpu_abi_version": (c_int32, ()),
    "bk_cpu_last_error": (c_char_p, ()),
    "bk_cpu_supported_isas": (c_char_p, ()),
    "bk_cpu_isa": (c_char_p, ()),
    "bk_cpu_select_isa": (c_int32, (c_char_p,)),
    "bk_cpu_linear_workspace": (c_int64, (c_int64, c_int64, c_int64, c_int32, c_int32)),
    "bk_cpu_linear_i8_t2": (c_int32, (c_void_p,)),
    "bk_cpu_linear_f32_t2": (c_int32, (c_void_p,)),
    "bk_cpu_linear_i8_i8": (c_int32, (c_void_p,)),
    "bk_cpu_experts_workspace": (
        c_int64,
        (c_int64, c_int64, c_int64, c_int64, c_int64, c_int32),
    ),
    "bk_cpu_experts_i8_t2": (c_int32, (c_void_p,)),
    "bk_cpu_quantize_i8": (
        c_int32,
        (c_void_p, c_int32, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_int32, c_int32),
    ),
    "bk_cpu_matmul_i8_t2_i32": (
        c_int32,
        (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int32),
    ),
    "bk_cpu_weight_scale": (
        c_int32,
        (
            c_void_p, c_int32, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64, c_int32,
        ),
    ),
    "bk_cpu_learned_gradients": (
        c_int32,
        (
            c_void_p, c_int32, c_void_p, c_int32, c_void_p, c_int64, c_int64, c_void_p, c_void_p,
            c_void_p, c_int64, c_int64, c_int32,
        ),
    ),
    "bk_cpu_pack_t2": (
        c_int32,
        (
            c_void_p, c_int32, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64, c_int32,
        ),
    ),
    "bk_cpu_pack_groups_t2": (
        c_int32,
        (
            c_void_p, c_int32, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int32,
        ),
    ),
    "bk_cpu_unpack_t2": (
        c_int32,
        (
            c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int32, c_int64, c_int64,
            c_int64, c_int64, c_int64, c_int64, c_int32,
        ),
    ),
    "bk_cpu_find_invalid_t2": (c_int32, (c_void_p, c_void_p, c_int64, c_void_p, c_int32)),
}  # fmt: skip

# bk_type.
TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# More threads than any machine of today runs at once; each costs its share of the workspace.
_MOST_THREADS = 1024
# The two halves of a bk_linear_args, fields of eight bytes each. As one record they cost a tenth of
# what ctypes takes for as many arguments.
_linear_constants = struct.Struct("@10q").pack
linear_inputs = struct.Struct("@8q").pack
# What a bk_experts_args has beside these.
experts_inputs = struct.Struct("@3q").pack


def _search_path() -> list[str]:
    # Of the package that this module is in, which an import of it here would lead back to.
    return list(sys.modules[__name__.partition(".")[0]].__path__)


def address(tensor: Tensor) -> int:
    """Returns where a tensor's elements lie, one after the other: what native code is given.

    Raises:
        BackendError: They do not.
    """
    if not tensor.is_contiguous():
        raise BackendError(
            f"libbitkernels: tensors must be contiguous, got strides {list(tensor.stride())} for "
            f"{list(tensor.shape)}"
        )
    return tensor.data_ptr()


def made_memory(op: str, x: Tensor) -> Tensor:
    """Returns an input whose address is too low to be believed: made memory if it only stands for
    zeros, which only the dispatcher would have done.

    Raises:
        ArgumentError: Its memory was freed.
    """
    if x._is_zerotensor():
        return x.clone()
    check_storage(op, "x", x)
    return x


def count_threads() -> int:
    """Returns the most threads that a call may use: torch's number, within reason."""
    threads = torch.get_num_threads()
    return threads if threads < _MOST_THREADS else _MOST_THREADS


def count_columns(weight_scale: Tensor, multiplier: Tensor | None) -> int:
    """Returns how many groups of K there are; 0 where scales are not of groups."""
    if multiplier is not None:
        return multiplier.shape[1]
    return weight_scale.shape[1] if weight_scale.dim() == 2 else 0


class LinearConstants:
    """What does not depend on the input of a linear layer, or of all experts of one, as the native
    call takes it.
    """

    __slots__ = ("columns", "held", "in_features", "out_features", "planes", "record", "run")

    def __init__(
        self,
        run: Callable[[bytes], int],
        qweight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        out_features: int,
        columns: int = 0,
        planes: int = 1,
        per_tensor: bool = False,
        multiplier: Tensor | None = None,
    ) -> None:
        qweight, weight_scale = qweight.contiguous(), weight_scale.contiguous()
        bias = None if bias is None else bias.contiguous()
        multiplier = None if multiplier is None else multiplier.contiguous()
        # The record holds addresses: what they point at has to live as long.
        self.held = qweight, weight_scale, bias, multiplier
        self.run, self.out_features, self.in_features = run, out_features, qweight.shape[-1]
        self.columns, self.planes = columns, planes
        # Those of experts have one axis more.
        scale_rows = weight_scale.shape[qweight.dim() - 2]
        self.record = _linear_constants(
            qweight.data_ptr(), weight_scale.data_ptr(), scale_rows, columns,
            0 if multiplier is None else multiplier.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if bias is None else TYPE_CODES[bias.dtype],
            out_features, self.in_features, per_tensor,
        )  # fmt: skip


def library_path(name: str) -> Path:
    """Returns where a library is looked for: ``BITLAB_LIBRARY_DIR``, else in the installed package.

    An editable install spreads the package over two folders, the sources and what was built.
    """
    directory = os.environ.get(LIBRARY_DIRECTORY_VARIABLE)
    bases = [Path(directory)] if directory else [Path(path) / "lib" for path in _search_path()]
    paths = [base / f"lib{name}.so" for base in bases]
    return next((path for path in paths if path.is_file()), paths[0])


def load_library(name: str, how: str) -> ctypes.CDLL:
    """Opens a native library.

    Args:
        name: Without ``lib`` and ``.so``.
        how: How to build it, for the message.

    Raises:
        BackendError: The library is missing or cannot be opened.
    """
    path = library_path(name)
    if not path.is_file():
        raise BackendError(
            f"lib{name} is not installed (looked for {path}); build it with {how}, "
            f"or name its folder in {LIBRARY_DIRECTORY_VARIABLE}"
        )
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendError(f"{path} cannot be loaded: {error}") from error


def declare(library: ctypes.CDLL, signatures: Signatures, abi_function: str, version: int) -> None:
    """Declares the functions of a library.

    Raises:
        BackendError: A function is missing, or the library has another ABI version.
    """
    path = library._name
    try:
        for name, (result, arguments) in signatures.items():
            function = getattr(library, name)
            function.restype = result
            function.argtypes = arguments
    except AttributeError as error:
        raise BackendError(f"{path} cannot be loaded: {error}") from error
    found = getattr(library, abi_function)()
    if found != version:
        raise BackendError(
            f"{path} must have ABI version {version}, got {found}; rebuild it with `pip install .`"
        )


def load_cpu_library() -> ctypes.CDLL:
    """Loads libbitkernels_cpu and declares its functions.

    Raises:
        BackendError: The library is missing, cannot be loaded, or has another ABI version.
    """
    library = load_library("bitkernels_cpu", "`pip install .`")
    declare(library, CPU_SIGNATURES, "bk_cpu_abi_version", ABI_VERSION)
    return library
