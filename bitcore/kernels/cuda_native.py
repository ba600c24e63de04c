"""Loads libbitkernels_cuda with ctypes; every signature stands in one table."""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_int32, c_int64, c_void_p

from bitcore.kernels.native import Signatures, declare, load_library

CUDA_ABI_VERSION = 6
INVALID_ARGUMENT = 1

# name: (result, arguments); pointers are c_void_p. A test compares this with bitkernels_cuda.h.
CUDA_SIGNATURES: Signatures = {
    "bk_cuda_abi_version": (c_int32, ()),
    "bk_cuda_last_error": (c_char_p, ()),
    "bk_cuda_architectures": (c_char_p, ()),
    "bk_cuda_linear_workspace": (
        c_int64,
        (c_int32, c_int64, c_int64, c_int64, c_int64, c_int32, c_int32),
    ),
    "bk_cuda_linear_i8_t2": (
        c_int32,
        (
            c_void_p, c_int32, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p,
            c_int32, c_void_p, c_int32, c_int64, c_int64, c_int64, c_int32, c_void_p, c_int32,
            c_void_p,
        ),
    ),
    "bk_cuda_linear_codes_i8_t2": (
        c_int32,
        (
            c_void_p, c_int32, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p,
            c_int32, c_void_p, c_int32, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int32,
            c_void_p, c_int32, c_void_p,
        ),
    ),
    "bk_cuda_linear_float_t2": (
        c_int32,
        (
            c_void_p, c_int32, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p,
            c_int32, c_void_p, c_int32, c_int64, c_int64, c_int64, c_void_p, c_int32, c_void_p,
        ),
    ),
    "bk_cuda_experts_workspace": (
        c_int64,
        (c_int64, c_int64, c_int64, c_int64, c_int64, c_int64, c_int32, c_int32),
    ),
    "bk_cuda_experts_i8_t2": (
        c_int32,
        (
            c_void_p, c_int32, c_int64, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64,
            c_int64, c_void_p, c_void_p, c_int32, c_void_p, c_int32, c_int64, c_int64, c_int64,
            c_int32, c_void_p, c_void_p,
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
            c_void_p, c_int32, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p,
            c_int32, c_int64, c_int64, c_int64, c_void_p,
        ),
    ),
    "bk_cuda_weight_scale": (
        c_int32,
        (c_void_p, c_int32, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64, c_void_p),
    ),
    "bk_cuda_learned_gradients": (
        c_int32,
        (
            c_void_p, c_int32, c_void_p, c_int32, c_void_p, c_int64, c_int64, c_void_p, c_void_p,
            c_void_p, c_int64, c_int64, c_void_p,
        ),
    ),
    "bk_cuda_pack_t2": (
        c_int32,
        (c_void_p, c_int32, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64, c_void_p),
    ),
    "bk_cuda_pack_groups_t2": (
        c_int32,
        (c_void_p, c_int32, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
    ),
    "bk_cuda_unpack_t2": (
        c_int32,
        (
            c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int32, c_int64, c_int64,
            c_void_p,
        ),
    ),
}  # fmt: skip


def declare_cuda_functions(library: ctypes.CDLL) -> None:
    """Declares the functions of a loaded library; see `bitcore.kernels.native.declare`."""
    declare(library, CUDA_SIGNATURES, "bk_cuda_abi_version", CUDA_ABI_VERSION)


def load_cuda_library() -> ctypes.CDLL:
    """Loads libbitkernels_cuda and declares its functions; starts nothing on a device.

    Raises:
        BackendError: The library is missing, cannot be loaded, or has another ABI version.
    """
    library = load_library("bitkernels_cuda", "`pip install .` where nvcc is")
    declare_cuda_functions(library)
    return library
