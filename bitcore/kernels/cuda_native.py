"""Loads libbitkernels_cuda with ctypes; every signature stands in one table."""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_int32, c_int64, c_void_p

from bitcore.errors import BackendError
from bitcore.kernels.native import LIBRARY_DIRECTORY_VARIABLE, library_path

CUDA_ABI_VERSION = 1
INVALID_ARGUMENT = 1

# name: (result, arguments); pointers are c_void_p. A test compares this with bitkernels_cuda.h.
CUDA_SIGNATURES: dict[str, tuple[type, tuple[type, ...]]] = {
    "bk_cuda_abi_version": (c_int32, ()),
    "bk_cuda_last_error": (c_char_p, ()),
    "bk_cuda_architectures": (c_char_p, ()),
    "bk_cuda_linear_workspace": (
        c_int64,
        (c_int32, c_int64, c_int64, c_int64, c_int64, c_int32),
    ),
    "bk_cuda_linear_i8_t2": (
        c_int32,
        (
            c_void_p, c_int32, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int32,
            c_void_p, c_int32, c_int64, c_int64, c_int64, c_int32, c_void_p, c_int32, c_void_p,
        ),
    ),
    "bk_cuda_linear_float_t2": (
        c_int32,
        (
            c_void_p, c_int32, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int32,
            c_void_p, c_int32, c_int64, c_int64, c_int64, c_void_p, c_int32, c_void_p,
        ),
    ),
    "bk_cuda_linear_i8_i8": (
        c_int32,
        (
            c_void_p, c_int32, c_int64, c_void_p, c_void_p, c_void_p, c_int32, c_void_p, c_int32,
            c_int64, c_int64, c_int64, c_void_p, c_int32, c_void_p,
        ),
    ),
    "bk_cuda_quantize_i8": (
        c_int32,
        (
            c_void_p, c_int32, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_int32, c_void_p,
            c_void_p,
        ),
    ),
    "bk_cuda_matmul_i8_t2_i32": (
        c_int32,
        (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int32, c_void_p),
    ),
    "bk_cuda_input_gradient": (
        c_int32,
        (
            c_void_p, c_int32, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int32,
            c_int64, c_int64, c_int64, c_void_p,
        ),
    ),
    "bk_cuda_weight_scale": (
        c_int32,
        (c_void_p, c_int32, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64, c_void_p),
    ),
    "bk_cuda_pack_t2": (
        c_int32,
        (c_void_p, c_int32, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64, c_void_p),
    ),
    "bk_cuda_unpack_t2": (
        c_int32,
        (c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int32, c_int64, c_int64, c_void_p),
    ),
}  # fmt: skip


def declare_cuda_functions(library: ctypes.CDLL) -> None:
    """Declares the functions of a loaded library.

    Raises:
        BackendError: A function is missing, or the library has another ABI version.
    """
    try:
        for name, (result, arguments) in CUDA_SIGNATURES.items():
            function = getattr(library, name)
            function.restype = result
            function.argtypes = arguments
    except AttributeError as error:
        raise BackendError(f"libbitkernels_cuda cannot be loaded: {error}") from error
    version = library.bk_cuda_abi_version()
    if version != CUDA_ABI_VERSION:
        raise BackendError(
            f"libbitkernels_cuda must have ABI version {CUDA_ABI_VERSION}, got {version}; "
            "rebuild it with `pip install .`"
        )


def load_cuda_library() -> ctypes.CDLL:
    """Loads libbitkernels_cuda and declares its functions; starts nothing on a device.

    Raises:
        BackendError: The library is missing, cannot be loaded, or has another ABI version.
    """
    path = library_path("bitkernels_cuda")
    if not path.is_file():
        raise BackendError(
            f"libbitkernels_cuda is not installed (looked for {path}); build it with "
            f"`pip install .` where nvcc is, or name its folder in {LIBRARY_DIRECTORY_VARIABLE}"
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendError(f"{path} cannot be loaded: {error}") from error
    declare_cuda_functions(library)
    return library
