"""What a model's folder says of itself, checked before anything is loaded from it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from bitcore.errors import ArgumentError, CheckpointError, ConfigError
from bitlab_hf.config import QUANT_METHOD, BitLabConfig

INDEX = "model.safetensors.index.json"
FACTS_FILE = "bitlab_facts.json"
# A vocabulary can have other names too: those that the tokenizer's class gives it.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "vocab.json", "vocab.txt", "merges.txt",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
_MODEL_FILES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "audio_tokenizer_config.json", "README.md", FACTS_FILE,
    "bitlab_recipe.json",
)  # fmt: skip
_LICENCE = re.compile(r"(LICEN[CS]E|COPYING|NOTICE|USE_POLICY)(\.(txt|md))?", re.IGNORECASE)


def read_json(file: Path) -> Any:
    """Returns what a JSON file holds.

    Raises:
        CheckpointError: It is no file, or damaged; the message says where.
    """
    if not file.is_file():
        raise CheckpointError(f"{file}: the file must be a plain file, got another kind")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: the file must hold JSON, got: {error}\n"
            "It is damaged; fetch or write it again."
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """Returns a folder's config.json.

    Raises:
        ArgumentError: There is none.
        CheckpointError: It is damaged; the message says where.
    """
    file = folder / "config.json"
    if not file.exists():
        raise ArgumentError(f"{folder}: the folder must hold config.json, got none")
    content = read_json(file)
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: the file must hold a JSON object, got {content!r:.80}")
    return content


def scheme_of(held: Any, source: str) -> dict[str, Any] | None:
    """Returns the quantization_config that a model's configuration holds; None of a float model.

    Args:
        held: What it holds under that name.
        source: The model, for error messages.

    Returns:
        The fields as they are written. ``"quant_method"`` and ``"weight_format"`` (``"packed"`` or
        ``"latent"``) are always among them: where a file does not say the format, as transformers'
        bitnet method never does, it is the one that its other fields mean.

    Raises:
        ConfigError: Neither BitLab nor transformers' bitnet method wrote it, a newer BitLab did, or
            a field has a value that is not allowed.
    """
    if held is None:
        return None
    fields = held if isinstance(held, dict) else {}
    method = fields.get("quant_method")
    if method not in (QUANT_METHOD, "bitnet"):
        got = f"{method!r:.80}" if isinstance(held, dict) else f"None in {held!r:.80}"
        raise ConfigError(
            f"{source}: quant_method must be {QUANT_METHOD!r} or 'bitnet', or there must be no "
            f"quantization_config, got {got}\n"
            "Take the float model that it was made from, or the library that made it."
        )
    if method == QUANT_METHOD:
        weight_format = BitLabConfig.from_dict(fields).weight_format
    else:
        online = fields.get("quantization_mode", "offline") == "online"
        latent = online and fields.get("linear_class", "bitlinear") == "autobitlinear"
        weight_format = "latent" if latent else "packed"
    return {**fields, "weight_format": weight_format}


def companions(folder: Path) -> list[Path]:
    """Returns a folder's files that go with a model's weights wherever they go, by their names.

    They are those that transformers and BitLab write for a model, its tokenizer and its processor,
    the card and the licence. Links, other kinds of files and folders are never among them.
    """
    known = {*_MODEL_FILES, *TOKENIZER_FILES, *_vocabulary_names(folder / "tokenizer_config.json")}
    return [
        file
        for file in sorted(folder.iterdir())
        if file.is_file()
        and not file.is_symlink()
        and (file.name in known or _LICENCE.fullmatch(file.name))
    ]


def _vocabulary_names(config: Path) -> set[str]:
    """Returns what the class of a folder's tokenizer calls its files."""
    if not config.is_file() or config.is_symlink():
        return set()
    # It imports much.
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    content = read_json(config)
    name = content.get("tokenizer_class") if isinstance(content, dict) else None
    found = tokenizer_class_from_name(name) if isinstance(name, str) else None
    return set(getattr(found, "vocab_files_names", {}).values())


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
    content = read_json(index)
    held = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(held, dict) or not held or not all(isinstance(n, str) for n in held.values()):
        raise CheckpointError(
            f"{op}: {index.name} must hold a weight_map, got: {content!r:.80}\n"
            "It is damaged; fetch or write it again."
        )
    names = sorted(set(held.values()))
    for name in names:
        if Path(name).name != name:
            raise _elsewhere(op, name)
        if not name.endswith(".safetensors"):
            raise CheckpointError(f"{op}: {INDEX} must name safetensors files, got {name!r}")
        if not (folder / name).is_file():
            raise CheckpointError(f"{op}: {name} must be in the folder, got none")
    return [folder / name for name in names]


def claim_keys(owners: dict[str, str], keys: Iterable[str], file: str, op: str = "bitlab") -> None:
    """Notes which file of a checkpoint holds which tensors; each may stand in one only.

    Of two, transformers takes either, without a word.

    Args:
        owners: The file of each tensor so far; it is added to.
        keys: Those of another file.
        file: Its name.
        op: Who asks, for error messages.

    Raises:
        CheckpointError: A tensor stands in two files.
    """
    for key in keys:
        if owners.setdefault(key, file) != file:
            raise CheckpointError(
                f"{op}: {key} must stand in one file, got it in {Path(owners[key]).name} and in "
                f"{Path(file).name}\nThe files do not belong together; fetch or write them again."
            )


def shard_keys(files: list[Path], op: str) -> dict[str, Path]:
    """Returns which of a checkpoint's files holds each tensor.

    Raises:
        CheckpointError: A file is truncated or damaged, or a tensor stands in two.
    """
    owners: dict[str, str] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                keys = list(handle.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file.name}: the file must be a whole safetensors file, got: {error}\n"
                "It is truncated or damaged; fetch or write it again."
            ) from error
        claim_keys(owners, keys, str(file), op)
    return {key: Path(name) for key, name in owners.items()}


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
