"""What stays of the checkpoint that was in a folder before, once another takes its place."""

from __future__ import annotations

import logging
import os
import re
import shutil
import stat
from pathlib import Path

import torch
from safetensors import safe_open

from bitcore.errors import CheckpointError
from bitlab_hf.checkpoint.atomic import keep_access
from bitlab_hf.checkpoint.card import CARD, is_untouched, with_facts
from bitlab_hf.checkpoint.facts import Facts
from bitlab_hf.checkpoint.files import (
    FACTS_FILE,
    TOKENIZER_FILES,
    read_config,
    shard_keys,
    weight_files,
)

logger = logging.getLogger("bitlab")
_WEIGHTS = re.compile(
    r"(?P<kind>model|pytorch_model|adapter_model)(\.(?P<variant>[^.]+?))?(-\d{5}-of-\d{5})?"
    r"\.(safetensors|bin)(\.index(\.(?P<index_variant>[^.]+))?\.json)?"
)
_ADAPTER = "adapter_model"


def weights_of(name: str) -> tuple[bool, str] | None:
    """Returns what a weight file, or its index, holds by its name; None for other files.

    Returns:
        Whether it is an adapter, and the variant (``""`` for none).
    """
    found = _WEIGHTS.fullmatch(name)
    if found is None:
        return None
    return found["kind"] == _ADAPTER, found["variant"] or found["index_variant"] or ""


def take_over(previous: Path, staged: Path) -> None:
    """Links what is no part of the previous checkpoint, and is not written anew, over.

    Left behind are: its weights; an adapter of it; the tokenizer, where there is a new one; and,
    unless the new model is the same to the last bit, what was recorded of it, `Facts` and the card.
    A card that somebody wrote or edited stays, with the new model's facts. A new adapter takes the
    place of another one only.

    Args:
        previous: The folder as it was.
        staged: The new one.
    """
    new_facts = (staged / FACTS_FILE).exists()
    written = {entry.name for entry in staged.iterdir()}
    weights = {held for held in map(weights_of, written) if held is not None}
    whole_model = any(not adapter for adapter, _ in weights)
    # An adapter leaves the model as it is.
    same = not whole_model or _is_same_model(previous, staged)
    for entry in previous.iterdir():
        copy = staged / entry.name
        if entry.name == CARD:
            _take_over_card(entry, copy, same and not new_facts)
        elif copy.exists():
            if _is_file(entry) and _is_file(copy):
                keep_access(entry, copy)
        elif not _is_replaced(entry.name, weights, whole_model, same, written):
            _link_all(entry, copy)


def _is_replaced(
    name: str, weights: set[tuple[bool, str]], whole_model: bool, same: bool, written: set[str]
) -> bool:
    """Tells whether a file of the previous checkpoint has no meaning beside the new one."""
    held = weights_of(name)
    if held is not None:
        return held in weights or (whole_model and held[0])
    if name in ("adapter_config.json", "generation_config.json"):
        return whole_model
    if name in TOKENIZER_FILES:
        return "tokenizer_config.json" in written
    return name == FACTS_FILE and not same


def _take_over_card(previous: Path, new: Path, keep: bool) -> None:
    """Keeps the previous card where somebody wrote it, or it is still true."""
    if not _is_file(previous):
        new.unlink(missing_ok=True)
        _link_all(previous, new)
        return
    text = previous.read_text(encoding="utf-8", errors="surrogateescape")
    if is_untouched(text) and not keep:
        if new.exists():
            keep_access(previous, new)
        return
    new.unlink(missing_ok=True)
    now = text if keep else with_facts(text, Facts.load(new.parent))
    if now == text:
        _link(previous, new)
        return
    logger.warning(
        "%s was edited, so it stays, with the facts of the model that is there now; check the rest",
        previous,
    )
    new.write_text(now, encoding="utf-8", errors="surrogateescape")
    keep_access(previous, new)


def _is_same_model(previous: Path, staged: Path) -> bool:
    """Tells whether two folders hold one model: the same configuration, and every tensor's bits."""
    described = [name for name in (FACTS_FILE, CARD) if (previous / name).exists()]
    if not described:
        return False
    folders = previous, staged
    try:
        configs = [read_config(folder) for folder in folders]
        keys = [shard_keys(weight_files(folder, "save"), "save") for folder in folders]
    except (CheckpointError, ValueError):
        return False
    for config in configs:
        config.pop("transformers_version", None)
    if configs[0] != configs[1] or keys[0].keys() != keys[1].keys():
        return False
    for key, file in keys[0].items():
        with safe_open(file, "pt") as old, safe_open(keys[1][key], "pt") as new:
            before, now = old.get_tensor(key), new.get_tensor(key)
        if before.dtype != now.dtype or before.shape != now.shape:
            return False
        if not torch.equal(*(part.reshape(-1).view(torch.uint8) for part in (before, now))):
            return False
    return True


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _link_all(entry: Path, copy: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        copy.mkdir(mode=0o700)
        for inner in entry.iterdir():
            _link_all(inner, copy / inner.name)
        keep_access(entry, copy)
    else:
        _link(entry, copy)


def _link(source: Path, destination: Path) -> None:
    try:
        os.link(source, destination, follow_symlinks=False)
    except OSError:
        kind = os.lstat(source).st_mode
        # A pipe or a socket has no content; reading it would wait for somebody to write.
        if stat.S_ISREG(kind) or stat.S_ISLNK(kind):
            shutil.copy2(source, destination, follow_symlinks=False)
