"""The GPU benchmark where there is no GPU: what it says, and how it judges."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_cuda.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_cuda", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_cuda"] = module
    spec.loader.exec_module(module)
    return module


def test_targets_and_table(bench: ModuleType) -> None:
    rows = [
        bench.Row("8192x8192", 1, "bitlab", 8.0, 7.0, 9.0, 2097.0, 16.8),
        bench.Row("8192x8192", 1, "cublas bf16", 50.0, 49.0, 52.0, 2684.0, 2.7),
        bench.Row("2560x6912", 1, "bitlab", 7.0, 6.0, 8.0, 632.0, 5.1),
        bench.Row("2560x6912", 1, "cublas bf16", 10.5, 10.0, 11.0, 3370.0, 3.4),
    ]
    found = {target.name: target for target in bench.targets(rows, {"copy_gbs": 2600.0})}
    assert found["M 1, 8192x8192: 6x bf16"].verdict == "yes"
    assert found["M 1, 8192x8192: 70 % of the copy bandwidth"].measured == pytest.approx(
        80.65, 1e-3
    )
    assert found["M 1, 2560x6912: 2x bf16"].verdict == "NO"
    assert found["M 1, 2560x6912: under 6 us"].verdict == "NO"
    assert found["M 256, 8192x8192: 1.3x bf16"].verdict == "not in this run"
    assert (
        bench.table(rows).splitlines()[2] == "| 8192x8192 | 1 | 8.00 | 50.00 | 6.25 | 2097 | 16.8 |"
    )


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        command = [sys.executable, str(SCRIPT), "--help"]
    else:
        command = [sys.executable, str(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert "CUDA" in done.stdout + done.stderr
    assert (done.returncode == 0) == torch.cuda.is_available()
