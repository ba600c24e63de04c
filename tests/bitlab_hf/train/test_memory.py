"""What a training step frees is kept for the next one, and given back behind the last."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from bitlab_hf.train import trainer as module
from tests.bitlab_hf.models import make_float_model
from tests.bitlab_hf.train.test_trainer import make

# A block of 64 MiB: glibc maps one of this size anew each time, by itself.
PAGES = (64 << 20) // resource.getpagesize()
CODE = """
import json, resource
from bitlab_hf.train.memory import kept_memory

def touch():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(64 << 20)[:: resource.getpagesize()] = b"1" * ((64 << 20) // resource.getpagesize())
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

found = {"before": touch()}
with kept_memory():
    touch()
    found["within"] = touch()
found["after"] = touch()
print(json.dumps(found))
"""


def faults(**environment: str) -> dict[str, int]:
    """Returns how many pages the system had to find for a block."""
    # What the machine's own environment says of malloc is left out.
    inherited = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    inherited.pop("GLIBC_TUNABLES", None)
    run = subprocess.run(
        [sys.executable, "-c", CODE], env=inherited | environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    found: dict[str, int] = json.loads(run.stdout)
    return found


def test_freed_memory_is_kept_meanwhile() -> None:
    found = faults()
    assert found["within"] < PAGES // 10
    assert min(found["before"], found["after"]) > PAGES * 9 // 10


@pytest.mark.parametrize(
    "environment",
    [
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"},
    ],
)
def test_what_the_environment_sets_stays(environment: dict[str, str]) -> None:
    assert faults(**environment)["within"] > PAGES * 9 // 10


def test_the_trainer_trains_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    @contextmanager
    def recorded() -> Iterator[None]:
        called.append("begin")
        yield
        called.append("end")

    class Steps(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            called.append("step")

    monkeypatch.setattr(module, "kept_memory", recorded)
    source = make_float_model("llama", tmp_path / "float")
    make(source, tmp_path / "run", max_steps=2, callbacks=[Steps()]).train()
    assert called == ["begin", "step", "step", "end"]
