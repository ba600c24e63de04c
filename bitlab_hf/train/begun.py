"""What a run was begun with, kept in its folder: only the same run goes on from what is there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bitcore.errors import ArgumentError, CheckpointError
from bitlab_hf.checkpoint.atomic import write_atomically
from bitlab_hf.config import LOADING_ATTRIBUTES, BitLabConfig


def blocks_mark(blocks: Tensor) -> str:
    """Returns what tells token blocks [blocks, length] from others: text, tokenizer and length."""
    digest = hashlib.sha256(f"{blocks.dtype} {tuple(blocks.shape)}".encode())
    digest.update(blocks.contiguous().numpy().tobytes())
    return f"{tuple(blocks.shape)} {digest.hexdigest()[:16]}"


def scheme_fields(config: BitLabConfig) -> dict[str, Any]:
    """Returns all of a scheme, also what its file leaves out where nothing was asked for."""
    return {name: value for name, value in vars(config).items() if name not in LOADING_ATTRIBUTES}


def read_begun(op: str, file: Path, options: Mapping[str, Any], anew: str) -> dict[str, Any] | None:
    """Returns what `write_begun` has written of a run; None without a record.

    Args:
        op: Who asks, for the message.
        file: The record, in the run's folder.
        options: What is asked for, by name, as plain values that JSON holds.
        anew: For the message: how the run is begun anew.

    Raises:
        ArgumentError: The run was begun with other options.
        CheckpointError: The record is damaged.
    """
    if not file.exists():
        return None
    run = file.parent
    try:
        record = dict(json.loads(file.read_text(encoding="utf-8")))
        held = dict(record["options"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{op}: {file} must say what the run was begun with, got {error!r}\n"
            f"Remove {run}: the run begins anew."
        ) from error
    asked = json.loads(json.dumps(dict(options)))
    # What another version of BitLab knows nothing of tells no runs apart.
    other = [name for name in asked if name in held and held[name] != asked[name]]
    if other:
        wanted = ", ".join(f"{name} {held[name]!r}" for name in other)
        got = ", ".join(f"{name} {asked[name]!r}" for name in other)
        raise ArgumentError(
            f"{op}: a run that goes on must be asked for what {run} was begun with, {wanted}, got "
            f"{got}\nAsk for that, name another --output, or {anew}."
        )
    return record


def write_begun(file: Path, options: Mapping[str, Any], **more: Any) -> None:
    """Writes the record that `read_begun` reads.

    Args:
        file: The record; its folder is made where it is missing.
        options: What a run that goes on must be asked for.
        **more: What it is told beside.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    record = {"options": dict(options), **more}
    write_atomically(file, json.dumps(record, indent=2) + "\n")
