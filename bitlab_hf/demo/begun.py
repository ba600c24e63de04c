"""What a run of the demo was begun with, kept beside its checkpoints until its report is written.

Only the same run goes on from them. What it computes in is measured when it begins and read again
when it goes on: a busy machine may answer otherwise, and layers that were calibrated in the other
dtype would be of no use.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import TRAINER_STATE_NAME

from bitcore.errors import CheckpointError
from bitlab_hf.train import begun

BEGUN_FILE = "bitlab_demo.json"


def text_mark(folder: Path | None) -> str:
    """Returns what tells one training text from another, wherever it lies.

    Args:
        folder: Of articles; None for the standard library's sources.
    """
    if folder is None:
        return "the standard library's sources"
    return f"articles {hashlib.sha256((folder / 'fit.jsonl').read_bytes()).hexdigest()[:16]}"


def read_begun(run: Path, options: Mapping[str, Any]) -> bool | None:
    """Returns whether the run in a folder computes in bfloat16 (autocast); None without a record.

    Args:
        run: The folder.
        options: What is asked for, by name, as plain values that JSON holds.

    Raises:
        ArgumentError: The run was begun with other options.
        CheckpointError: The record is damaged.
    """
    file = run / BEGUN_FILE
    record = begun.read_begun("demo", file, options, f"remove {run} to begin anew")
    if record is None:
        return None
    if not isinstance(record.get("bf16"), bool):
        raise CheckpointError(
            f"demo: {file} must say what the run was begun with, got bf16 {record.get('bf16')!r}\n"
            f"Remove {run}: the run begins anew."
        )
    return bool(record["bf16"])


def write_begun(run: Path, options: Mapping[str, Any], bf16: bool) -> None:
    """Writes the record that `read_begun` reads."""
    begun.write_begun(run / BEGUN_FILE, options, bf16=bf16)


def forget(run: Path) -> None:
    """Removes a run's checkpoints, then its record: nothing goes on from there."""
    for checkpoint in run.glob("checkpoint-*"):
        # First what makes it whole: where this is killed, none is left that only looks so.
        (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)
        shutil.rmtree(checkpoint)
    (run / BEGUN_FILE).unlink(missing_ok=True)


def bf16_is_faster() -> bool:
    """Measures whether this CPU multiplies faster in bfloat16 than in float32; many do not."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(2048, 256, dtype=dtype), torch.ones(256, 768, dtype=dtype)
        times = []
        for _ in range(5):
            started = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - started)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] < seconds[torch.float32]
