"""Loads the native libraries with ctypes; every signature stands in one table."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from ctypes import c_char_p, c_int32, c_int64, c_void_p
from pathlib import Path

import torch  # noqa: F401  (loads torch's OpenMP runtime first, so that the library shares it)

from bitcore.errors import BackendError

ABI_VERSION = 4
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
    "bk_cpu_pack_t2": (
        c_int32,
        (
            c_void_p, c_int32, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64, c_int32,
        ),
    ),
    "bk_cpu_unpack_t2": (
        c_int32,
        (
            c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int32, c_int64, c_int64, c_int64,
            c_int64, c_int64, c_int64, c_int32,
        ),
    ),
    "bk_cpu_find_invalid_t2": (c_int32, (c_void_p, c_void_p, c_int64, c_void_p, c_int32)),
}  # fmt: skip

# The two halves of a bk_linear_args, fields of eight bytes each. As one record they cost a tenth of
# what ctypes takes for as many arguments.
linear_constants = struct.Struct("@9q").pack
linear_inputs = struct.Struct("@8q").pack


def _search_path() -> list[str]:
    # Of the package that this module is in, which an import of it here would lead back to.
    return list(sys.modules[__name__.partition(".")[0]].__path__)


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
