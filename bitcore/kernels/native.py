"""Loads the native libraries with ctypes; every signature stands in one table."""

from __future__ import annotations

import ctypes
import os
import struct
from ctypes import c_char_p, c_int32, c_int64, c_void_p
from pathlib import Path

import torch  # noqa: F401  (loads torch's OpenMP runtime first, so that the library shares it)

import bitcore
from bitcore.errors import BackendError

ABI_VERSION = 3
LIBRARY_DIRECTORY_VARIABLE = "BITLAB_LIBRARY_DIR"
ISA_VARIABLE = "BITLAB_CPU_ISA"

# name: (result, arguments); pointers are c_void_p. A test compares this with bitkernels.h.
CPU_SIGNATURES: dict[str, tuple[type, tuple[type, ...]]] = {
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
    "bk_cpu_has_invalid_t2": (c_int32, (c_void_p, c_int64, c_void_p, c_int32)),
}  # fmt: skip

# The two halves of a bk_linear_args, fields of eight bytes each. As one record they cost a tenth of
# what ctypes takes for as many arguments.
linear_constants = struct.Struct("@9q").pack
linear_inputs = struct.Struct("@8q").pack


def library_path(name: str) -> Path:
    """Returns where a library is looked for: ``BITLAB_LIBRARY_DIR``, else in the installed package.

    An editable install spreads the package over two folders, the sources and what was built.
    """
    directory = os.environ.get(LIBRARY_DIRECTORY_VARIABLE)
    bases = [Path(directory)] if directory else [Path(path) / "lib" for path in bitcore.__path__]
    paths = [base / f"lib{name}.so" for base in bases]
    return next((path for path in paths if path.is_file()), paths[0])


def load_cpu_library() -> ctypes.CDLL:
    """Loads libbitkernels_cpu and declares its functions.

    Raises:
        BackendError: The library is missing, cannot be loaded, or has another ABI version.
    """
    path = library_path("bitkernels_cpu")
    if not path.is_file():
        raise BackendError(
            f"libbitkernels_cpu is not installed (looked for {path}); build it "
            f"with `pip install .` or name its folder in {LIBRARY_DIRECTORY_VARIABLE}"
        )
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in CPU_SIGNATURES.items():
            function = getattr(library, name)
            function.restype = result
            function.argtypes = arguments
    except (OSError, AttributeError) as error:
        raise BackendError(f"{path} cannot be loaded: {error}") from error
    version = library.bk_cpu_abi_version()
    if version != ABI_VERSION:
        raise BackendError(
            f"{path} must have ABI version {ABI_VERSION}, got {version}; "
            "rebuild it with `pip install .`"
        )
    return library
