"""What a model's folder says of itself, checked before anything is loaded from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bitcore.errors import ArgumentError, CheckpointError, ConfigError
from bitlab_hf.config import QUANT_METHOD, BitLabConfig

INDEX = "model.safetensors.index.json"


def read_config(folder: Path) -> dict[str, Any]:
    """Returns a folder's config.json.

    Raises:
        ArgumentError: There is none.
        CheckpointError: It is damaged; the message says where.
    """
    file = folder / "config.json"
    if not file.exists():
        raise ArgumentError(f"{folder}: the folder must hold config.json, got none")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{file}: the file must hold JSON, got: {error}\n"
            "It is damaged; fetch or write it again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: the file must hold a JSON object, got {content!r:.80}")
    return content


def scheme_of(held: Any, source: str) -> dict[str, Any] | None:
    """Returns the quantization_config that a model's configuration holds; None of a float model.

    Args:
        held: What it holds under that name.
        source: The model, for error messages.

    Raises:
        ConfigError: Neither BitLab nor transformers' bitnet method wrote it, a newer BitLab did, or
            a field has a value that is not allowed.
    """
    if held is None:
        return None
    fields = held if isinstance(held, dict) else {}
    method = fields.get("quant_method")
    if method not in (QUANT_METHOD, "bitnet"):
        raise ConfigError(
            f"{source}: quant_method must be {QUANT_METHOD!r} or 'bitnet', or there must be no "
            f"quantization_config, got {method!r}\n"
            "Take the float model that it was made from, or the library that made it."
        )
    if method == QUANT_METHOD:
        BitLabConfig.from_dict(fields)
    return fields


def weight_files(folder: Path, op: str) -> list[Path]:
    """Returns a folder's safetensors files.

    Raises:
        CheckpointError: There are none, one is missing, or the index names a file elsewhere.
    """
    single, index = folder / "model.safetensors", folder / INDEX
    if not index.exists():
        if single.exists():
            return [single]
        raise CheckpointError(
            f"{op}: the folder must hold model.safetensors or its index, got neither in {folder}"
        )
    try:
        names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{op}: {index.name} must hold a weight_map, got: {error}") from error
    for name in names:
        if Path(name).name != name:
            raise _elsewhere(op, name)
        if not (folder / name).exists():
            raise CheckpointError(f"{op}: {name} must be in the folder, got none")
    return [folder / name for name in names]


def own_safetensors(
    folder: str | None, files: list[str] | None, op: str = "bitlab"
) -> list[str] | None:
    """Returns the files that transformers found for a model; None if they are not safetensors.

    Args:
        folder: Where it looked; of a name on the hub the client itself keeps to the repository.
        files: What it found; it joins the folder and whatever name the index gives.
        op: Who asks, for error messages.

    Raises:
        CheckpointError: A file lies outside of the folder.
    """
    if folder and Path(folder).is_dir():
        for file in map(Path, files or ()):
            inside = file.relative_to(folder) if file.is_relative_to(folder) else file
            if inside.is_absolute() or ".." in inside.parts:
                raise _elsewhere(op, str(inside))
    return files if files and all(str(file).endswith(".safetensors") for file in files) else None


def _elsewhere(op: str, name: str) -> CheckpointError:
    return CheckpointError(
        f"{op}: {INDEX} must name files of its own folder, got {name!r}\n"
        "Do not trust the checkpoint, or put the file into its folder."
    )
