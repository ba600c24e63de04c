"""Atomic writes of checkpoints."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from bitcore.errors import ArgumentError, ArgumentTypeError, CheckpointError
from bitlab_hf.checkpoint.aligned import align_file
from bitlab_hf.checkpoint.atomic import check_folder, naming_full_disk
from bitlab_hf.checkpoint.card import model_card
from bitlab_hf.checkpoint.facts import Facts
from bitlab_hf.checkpoint.written import check_written
from bitlab_hf.config import QUANT_METHOD

_WEIGHT_FILES = re.compile(
    r"(model|pytorch_model|adapter_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?$"
)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def save(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    facts: Facts | None = None,
    **kwargs: Any,
) -> None:
    """Saves a model so that at every moment the directory holds a whole checkpoint.

    Everything is written into a new directory beside it, which then takes its place in one step.
    Other files of the directory are kept; weight files of the previous checkpoint are not. A
    deployed model gets a model card, README.md, unless there is one.

    Args:
        model: A transformers model, latent or deployed.
        directory: Where to save it; made if needed.
        tokenizer: A tokenizer or processor to save beside the model.
        facts: What the model's card says beside what the model shows; kept beside the model.
        kwargs: Passed to ``model.save_pretrained``, such as ``max_shard_size``.

    Raises:
        ArgumentTypeError: model is no transformers model.
        ArgumentError: directory is a file, or holds the working directory, or push_to_hub is asked
            for.
        OSError: Writing failed; the previous checkpoint is as it was.
    """
    if not isinstance(model, PreTrainedModel):
        raise ArgumentTypeError(
            f"save: model must be a transformers PreTrainedModel, got {type(model).__name__}"
        )
    if kwargs.pop("push_to_hub", False):
        raise ArgumentError(
            "save: push_to_hub must be left out, got it set\n"
            "Call model.push_to_hub(repo) after saving."
        )
    if not kwargs.get("is_main_process", True):
        # It writes nothing, but other processes may wait for it.
        with tempfile.TemporaryDirectory() as scratch:
            model.save_pretrained(scratch, **kwargs)
        return
    with replacing(directory, "save") as staged:
        model.save_pretrained(staged, **kwargs)
        for file in staged.glob("*.safetensors"):
            align_file(file)
        check_written(model, staged, given="state_dict" in kwargs)
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        if facts is not None:
            facts.save(staged)
        card = staged / "README.md"
        deployed = getattr(model, "quantization_method", None) == QUANT_METHOD
        if deployed and not card.exists() and not (Path(directory) / "README.md").exists():
            title = Path(directory).resolve().name
            card.write_text(model_card(model, title, facts), encoding="utf-8")


@contextmanager
def replacing(directory: str | os.PathLike[str], op: str) -> Iterator[Path]:
    """Gives a new directory to write a checkpoint into, which then takes another's place.

    Other files of the directory are taken over, weight files are not. Where the block raises, or
    writes no weights, the directory stays as it was.

    Args:
        directory: What is replaced, or made.
        op: Who asks, for error messages.

    Raises:
        ArgumentError: directory is a file, or holds the working directory.
        CheckpointError: The block wrote no weights.
        DiskFullError: They do not fit.
    """
    check_folder(directory, op)
    target = Path(directory).resolve()
    if target == Path.cwd() or target in Path.cwd().parents:
        raise ArgumentError(
            f"{op}: directory must not hold the working directory, got {directory}\n"
            "The directory is exchanged for a new one; name a folder inside it."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        staged.chmod(0o777 & ~_umask())
        with naming_full_disk(directory, op):
            yield staged
        if not any(_WEIGHT_FILES.fullmatch(entry.name) for entry in staged.iterdir()):
            raise CheckpointError(f"{op}: weights must be written, got none")
        with naming_full_disk(directory, op):
            if target.exists():
                _take_over(target, staged)
            for file in staged.rglob("*"):
                _flush(file)
        if target.exists():
            _exchange(staged, target)
        else:
            staged.rename(target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush(path: Path) -> None:
    if path.is_symlink():
        return
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


def _take_over(previous: Path, staged: Path) -> None:
    """Links what is no part of the previous checkpoint's weights, and is not written anew, over."""
    for entry in previous.iterdir():
        copy = staged / entry.name
        if _WEIGHT_FILES.fullmatch(entry.name) or copy.exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, copy, symlinks=True, copy_function=_link)
        else:
            _link(entry, copy)


def _link(source: str | Path, destination: str | Path) -> None:
    try:
        os.link(source, destination, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, destination, follow_symlinks=False)
