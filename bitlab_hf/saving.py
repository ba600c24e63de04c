"""Atomic writes of checkpoints."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from bitcore.errors import ArgumentTypeError

_WEIGHT_FILES = re.compile(
    r"(model|pytorch_model|adapter_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?$"
)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def save(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    **kwargs: Any,
) -> None:
    """Saves a model so that at every moment the directory holds a whole checkpoint.

    Everything is written into a new directory beside it, which then takes its place in one step.
    Other files of the directory are kept; weight files of the previous checkpoint are not.

    Args:
        model: A transformers model, latent or deployed.
        directory: Where to save it; made if needed.
        tokenizer: A tokenizer or processor to save beside the model.
        kwargs: Passed to ``model.save_pretrained``, such as ``max_shard_size``.

    Raises:
        ArgumentTypeError: model has no ``save_pretrained``.
        OSError: Writing failed; the previous checkpoint is as it was.
    """
    if not isinstance(model, PreTrainedModel):
        raise ArgumentTypeError(
            f"save: model must be a transformers PreTrainedModel, got {type(model).__name__}"
        )
    target = Path(directory).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        staged.chmod(0o777 & ~_umask())
        model.save_pretrained(staged, **kwargs)
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        for file in staged.rglob("*"):
            _flush(file)
        if target.exists():
            _replace(staged, target)
        else:
            staged.rename(target)
            _flush(target.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(staged: Path, target: Path) -> None:
    """Swaps two directories in one step; where the system cannot, in two renames."""
    libc = ctypes.CDLL(None, use_errno=True)
    rename = getattr(libc, "renameat2", None)
    if rename is not None:
        names = os.fsencode(staged), os.fsencode(target)
        if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return
    previous = staged.with_name(staged.name + ".previous")
    target.rename(previous)
    try:
        staged.rename(target)
    except OSError:
        previous.rename(target)
        raise
    previous.rename(staged)


def _replace(staged: Path, target: Path) -> None:
    """Exchanges the directories and takes over what is neither weights nor written anew, or
    neither.
    """
    others = [
        entry.name
        for entry in target.iterdir()
        if not _WEIGHT_FILES.fullmatch(entry.name) and not (staged / entry.name).exists()
    ]
    _exchange(staged, target)
    moved = []
    try:
        for name in others:
            (staged / name).rename(target / name)
            moved.append(name)
        _flush(target.parent)
    except BaseException:
        for name in moved:
            (target / name).rename(staged / name)
        _exchange(staged, target)
        raise
