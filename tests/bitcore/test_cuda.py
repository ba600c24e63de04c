"""The CUDA backend where there is no GPU: the library, its errors, its absence."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bitcore
from bitcore import reference
from bitcore.errors import ArgumentError, BackendError
from bitcore.kernels.cuda import CudaKernels
from bitcore.kernels.cuda_native import CUDA_ABI_VERSION, CUDA_SIGNATURES, load_cuda_library
from bitcore.kernels.native import library_path
from tests.bitcore.test_registry import run
from tests.native.cuda.host import HostKernels

HEADER = Path(__file__).parents[2] / "csrc" / "include" / "bitkernels_cuda.h"


def test_signatures_equal_the_header() -> None:
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    declared = dict(re.findall(r"BK_CUDA_API [\w ]+?[ *](bk_cuda_\w+)\(([^)]*)\)", text))
    assert set(declared) == set(CUDA_SIGNATURES)
    names = {"int32_t": "c_int", "int64_t": "c_long"}
    for function, parameters in declared.items():
        kinds = [parameter.strip() for parameter in parameters.split(",")]
        expected = [
            "c_void_p" if "*" in kind else names[kind.split()[0]]
            for kind in kinds
            if kind != "void"
        ]
        found = [argument.__name__ for argument in CUDA_SIGNATURES[function][1]]
        assert found == expected, function
    assert f"#define BK_CUDA_ABI_VERSION {CUDA_ABI_VERSION}" in text


def test_info_says_why_cuda_does_not_run() -> None:
    found = {info.name: info for info in bitcore.backends() if info.device == "cuda"}
    assert found["reference"].available
    if found["cuda"].available:
        assert "sm_80" in found["cuda"].reason
    else:
        assert "no CUDA device" in found["cuda"].reason
        assert "libbitkernels_cuda is" in found["cuda"].reason
        assert found["reference"].chosen
        with pytest.raises(BackendError, match="no CUDA device"), bitcore.use_backend("cuda"):
            pass


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, "sm_80 sm_90a compute_90"),
        ("80", "sm_80 compute_80"),
        ("90a;86-virtual;100f-real", "sm_90a compute_90a compute_86 sm_100f"),
        ("native", None),
        ("80-real;all-major", None),
    ],
)
def test_the_build_says_all_that_it_compiles_for(
    given: str | None, expected: str | None, tmp_path: Path
) -> None:
    """The library reads there what runs: fused kernels are empty in PTX of compute_80."""
    text = (HEADER.parents[1] / "cuda" / "CMakeLists.txt").read_text()
    start, end = map(text.index, ("set(BITLAB_CUDA_ARCHITECTURES", "set(CMAKE_CUDA_STANDARD"))
    script = tmp_path / "architectures.cmake"
    script.write_text(text[start:end] + 'message("names: ${architectures}.")\n')
    option = [] if given is None else [f"-DBITLAB_CUDA_ARCHITECTURES={given}"]
    command = [Path(sys.executable).with_name("cmake"), *option, "-P", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if expected is None:
        assert done.returncode != 0
        assert "BITLAB_CUDA_ARCHITECTURES must be numbers such as 80-real" in done.stderr
    else:
        assert f"names: {expected}." in done.stderr


def test_importing_and_asking_starts_nothing_on_a_device() -> None:
    code = (
        "import torch, bitcore; bitcore.backends();"
        "raise SystemExit(int(torch.cuda.is_initialized()))"
    )
    assert run(code).returncode == 0


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITLAB_LIBRARY_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(BackendError, match="libbitkernels_cuda is not installed .*build it with"):
        CudaKernels()
    (tmp_path / "libbitkernels_cuda.so").write_bytes(b"not a library")
    with pytest.raises(BackendError, match="cannot be loaded"):
        CudaKernels()


def test_the_library_answers_without_a_gpu() -> None:
    """The library that was built, if nvcc was there: it loads, and its failures have a text."""
    if not library_path("bitkernels_cuda").is_file():
        with pytest.raises(BackendError, match="is not installed"):
            load_cuda_library()
        return
    library = load_cuda_library()
    assert b"sm_80 sm_90a" in library.bk_cuda_architectures()
    assert library.bk_cuda_linear_workspace(0, 16, 64, 64, 0, 0, 132) > 16 * 64
    status = library.bk_cuda_quantize_i8(None, 0, 64, None, None, 1, 64, 0, None, None)
    assert status == 1
    assert b"x must be aligned to its elements" in library.bk_cuda_last_error()
    if not torch.cuda.is_available():
        arguments = (4096, 0, 64, 4096, 4096, 3, 64, 0, 4096, None)
        assert library.bk_cuda_quantize_i8(*arguments) == 2
        text = library.bk_cuda_last_error().decode()
        assert re.fullmatch(r"bk_cuda_quantize_i8 \[M 3, N 1, K 64\]: \w.*", text)


def packed(out_features: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.pack_weight(torch.randn(out_features, in_features), "per_tensor", 0)[:2]


def test_tensors_on_two_devices_are_refused(host: HostKernels) -> None:
    x, (qweight, scale) = torch.randn(2, 64), packed(8, 64)
    for moved in (
        (x, qweight.to("meta"), scale, None),
        (x, qweight, scale.to("meta"), None),
        (x, qweight, scale, torch.randn(8, device="meta")),
    ):
        with pytest.raises(ArgumentError, match=r"bitlab::linear: all tensors must be on cpu, got"):
            host.linear(*moved, 8, "int8_per_token", torch.float32)


def test_sizes_above_the_limits_are_refused(host: HostKernels) -> None:
    x = torch.empty(2**31, 64, device="meta")
    with pytest.raises(ArgumentError, match="x must be at most 2147483647 tokens, got 2147483648"):
        host.linear(x, *packed(8, 64), None, 8, "int8_per_token", torch.float32)
    library = host._library
    sizes = ((-1, 8, 64), (2**31, 8, 64), (1, 0, 64), (1, 2**31, 64), (1, 8, 131072))
    for tokens, out_features, in_features in sizes:
        arguments = (
            0,
            0,
            64,
            0,
            0,
            1,
            0,
            0,
            0,
            0,
            0,
            0,
            tokens,
            out_features,
            in_features,
            0,
            0,
            1,
            0,
        )
        assert library.bk_cuda_linear_i8_t2(*arguments) == 1
        text = library.bk_cuda_last_error().decode()
        assert f"got M {tokens}, N {out_features}, K {in_features}" in text
    scales = ((2, 0), (1, 1), (8, 3), (8, 2))
    for rows, columns in scales:
        arguments = (0, 0, 64, 0, 0, rows, columns, 0, 0, 0, 0, 0, 1, 8, 64, 0, 0, 1, 0)
        assert library.bk_cuda_linear_i8_t2(*arguments) == 1
        assert f"scales [{rows}, {columns}]" in library.bk_cuda_last_error().decode()


def test_misaligned_storage_is_refused(host: HostKernels) -> None:
    room = torch.zeros(4 * 64 + 4, dtype=torch.uint8)
    library, pointer = host._library, room.data_ptr() + 1
    y, workspace = torch.zeros(8), host._scratch(4096, room.device)
    arguments = [pointer, 0, 64, 0, y.data_ptr(), 1, 0, 0, 0, 0, y.data_ptr(), 0, 1, 8, 64, 0]
    end = (workspace.data_ptr(), 1, 0)
    assert library.bk_cuda_linear_i8_t2(*arguments, *end) == 1
    assert b"x must be aligned to its elements" in library.bk_cuda_last_error()
    assert library.bk_cuda_linear_i8_t2(*arguments, workspace.data_ptr() + 8, 1, 0) == 1
    assert b"workspace must be aligned to 256 bytes" in library.bk_cuda_last_error()
    arguments[1] = 3
    assert library.bk_cuda_linear_i8_t2(*arguments, *end) == 1
    assert b"the type of x must be a float" in library.bk_cuda_last_error()
