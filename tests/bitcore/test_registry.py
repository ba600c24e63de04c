from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import bitcore
from bitcore.errors import BackendError
from bitcore.kernels import kernels_for
from bitcore.kernels.native import CPU_SIGNATURES
from tests.conftest import native_kernels

HEADER = Path(__file__).parents[2] / "csrc" / "include" / "bitkernels.h"


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, **environment},
    )


def test_backends_says_what_runs_and_why() -> None:
    found = {info.name: info for info in bitcore.backends() if info.device == "cpu"}
    assert found["cpu"].available
    assert found["cpu"].chosen
    assert "avx2" in found["cpu"].reason or "portable" in found["cpu"].reason
    assert found["reference"].available
    assert not found["reference"].chosen
    with bitcore.use_backend("reference"):
        found = {info.name: info for info in bitcore.backends() if info.device == "cpu"}
        assert found["reference"].chosen
        assert "forced" in found["cpu"].reason


def test_use_backend_nests_and_restores() -> None:
    native = kernels_for("cpu")
    with bitcore.use_backend("reference"):
        assert kernels_for("cpu") is not native
        with bitcore.use_backend("auto"):
            assert kernels_for("cpu") is native
        assert kernels_for("cpu") is not native
    assert kernels_for("cpu") is native


def test_unknown_backend() -> None:
    with (
        pytest.raises(BackendError, match="must be one of .*'reference'.*got 'gpu'"),
        bitcore.use_backend("gpu"),
    ):
        pass


def test_forced_backend_that_is_missing_raises_and_auto_falls_back(tmp_path: Path) -> None:
    missing = {"BITLAB_LIBRARY_DIR": str(tmp_path)}
    code = (
        "import torch, bitcore; print(*bitcore.backends(), sep='\\n');"
        "print(torch.ops.bitlab.pack_weight(torch.randn(4, 64), 'per_tensor', 0)[0].shape)"
    )
    done = run(code, **missing)
    assert done.returncode == 0, done.stderr
    assert "is not installed" in done.stdout
    assert "torch.Size([1, 64])" in done.stdout
    assert done.stderr.count("falling back") == 1
    done = run(code, BITLAB_BACKEND="cpu", **missing)
    assert "BackendError: libbitkernels_cpu is not installed" in done.stderr


def test_library_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "libbitkernels_cpu.so").write_bytes(b"not a library")
    done = run("import bitcore; print(bitcore.backends())", BITLAB_LIBRARY_DIR=str(tmp_path))
    assert "cannot be loaded" in done.stdout


def test_environment_variables() -> None:
    code = "import bitcore; print({i.name for i in bitcore.backends() if i.chosen})"
    assert run(code, BITLAB_BACKEND="reference").stdout.strip() == "{'reference'}"
    assert "must be one of" in run(code, BITLAB_BACKEND="nonsense").stderr
    code = "import bitcore; from bitcore.kernels import kernels_for as k; print(k('cpu').isa)"
    assert run(code, BITLAB_CPU_ISA="portable").stdout.strip() == "portable"
    for backend in ("cpu", "auto"):
        failed = run(code, BITLAB_CPU_ISA="neon", BITLAB_BACKEND=backend)
        assert failed.returncode != 0
        assert "BITLAB_CPU_ISA: instruction set must be one of" in failed.stderr


def test_forcing_a_missing_isa_changes_nothing() -> None:
    before = native_kernels().isa
    with pytest.raises(BackendError, match="got 'neon'"), native_kernels().use_isa("neon"):
        pass
    assert native_kernels().isa == before


def test_signatures_equal_the_header() -> None:
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    declared = dict(re.findall(r"BK_API [\w ]+?[ *](bk_cpu_\w+)\(([^)]*)\)", text))
    assert set(declared) == set(CPU_SIGNATURES)
    names = {"int32_t": "c_int", "int64_t": "c_long"}
    for function, parameters in declared.items():
        expected = []
        for parameter in parameters.split(","):
            kind = parameter.strip()
            if kind == "void":
                continue
            if "*" in kind:
                expected.append("c_char_p" if "char" in kind else "c_void_p")
            else:
                expected.append(names[kind.split()[0]])
        assert [argument.__name__ for argument in CPU_SIGNATURES[function][1]] == expected, function


def test_native_errors_have_a_text() -> None:
    library = native_kernels()._library
    assert library.bk_cpu_quantize_i8(None, 9, 1, None, None, 1, 1, 0, 1) == 1
    assert library.bk_cpu_last_error() == b"x_type must be a bk_type"


def test_several_threads_at_once(isa: str) -> None:
    weight = torch.randn(515, 256)
    x = torch.randn(9, 256)
    qweight, scale, _ = torch.ops.bitlab.pack_weight(weight, "per_tensor", 0)
    args = (x, qweight, scale, None, 515, "int8_per_token", torch.float32)
    expected = native_kernels().linear(*args)
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(50):
            if not torch.equal(native_kernels().linear(*args), expected):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_forked_child_after_a_parallel_call() -> None:
    """torch's OpenMP pool does not survive fork: the child has to run on one thread."""
    code = """
import os, torch
import bitcore
weight, x = torch.randn(2048, 512), torch.randn(64, 512)
qweight, scale, _ = torch.ops.bitlab.pack_weight(weight, "per_tensor", 0)
run = lambda: torch.ops.bitlab.linear(
    x, qweight, scale, None, 2048, "int8_per_token", torch.float32)
torch.set_num_threads(2)
expected = run().numpy().tobytes()
child = os.fork()
if child == 0:
    # No other torch op: torch's own parallel regions hang here.
    os._exit(0 if run().numpy().tobytes() == expected else 3)
import time
for _ in range(200):
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        raise SystemExit(os.waitstatus_to_exitcode(status))
    time.sleep(0.1)
os.kill(child, 9)
raise SystemExit("the child hangs")
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
