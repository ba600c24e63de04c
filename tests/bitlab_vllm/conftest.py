"""vLLM's environment, made once for all processes of a session."""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

import pytest

from bitcore.kernels.native import library_path

ROOT = Path(__file__).parents[2]
# Names an environment to make or reuse.
VARIABLE = "BITLAB_VLLM_ENVIRONMENT"


def variables() -> dict[str, str]:
    """For programs of that environment: nothing of this repository is seen but the libraries."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    # The wheel that is made here from the sources has none of its own.
    library = {"BITLAB_LIBRARY_DIR": str(library_path("cpu").parent)}
    return {**kept, **library, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


@pytest.fixture(scope="session")
def vllm_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shared = tmp_path_factory.getbasetemp().parent
    folder = Path(os.environ.get(VARIABLE) or shared / "vllm")
    with (shared / "vllm.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(
            [ROOT / "scripts/vllm_environment.sh", folder],
            env={**os.environ, "BITLAB_NATIVE": "OFF"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder
