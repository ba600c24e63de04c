"""Atomic writes of checkpoints."""

from __future__ import annotations

import ctypes
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from bitcore.errors import ArgumentError, ArgumentTypeError, CheckpointError
from bitlab_hf.checkpoint.aligned import align_file
from bitlab_hf.checkpoint.atomic import (
    check_folder,
    flush,
    keep_access,
    naming_full_disk,
    naming_place,
    staged_beside,
)
from bitlab_hf.checkpoint.card import CARD, model_card
from bitlab_hf.checkpoint.facts import Facts
from bitlab_hf.checkpoint.previous import take_over, weights_of
from bitlab_hf.checkpoint.written import check_written
from bitlab_hf.config import QUANT_METHOD, BitLabConfig
from bitlab_hf.model.deploy import settle_vocabulary

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

    Everything is written into a new directory beside it, which then takes its place in one step,
    with the owner and mode of the one before. Other files of the directory are kept; weight files
    of the previous checkpoint are not, and what was recorded of it only where the model is the
    same. A deployed model gets a model card, README.md, unless there is one that somebody wrote.
    Of a model with an adapter transformers saves the adapter alone: a model that is there stays,
    with its card and what was recorded of it.

    Args:
        model: A transformers model, latent or deployed.
        directory: Where to save it; made if needed.
        tokenizer: A tokenizer or processor to save beside the model.
        facts: What the model's card says beside what the model shows; kept beside the model.
        kwargs: Passed to ``model.save_pretrained``, such as ``max_shard_size``.

    Raises:
        ArgumentTypeError: model is no transformers model.
        ArgumentError: directory is no folder, may not be written or exchanged, or holds the
            working directory; or push_to_hub is asked for, or facts are given with an adapter.
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
    if not (kwargs.get("is_main_process", True) and model.should_save_on_this_rank(True)):
        # It writes nothing, but other processes may wait for it.
        with tempfile.TemporaryDirectory() as scratch:
            model.save_pretrained(scratch, **kwargs)
        return
    deployed = getattr(model, "quantization_method", None) == QUANT_METHOD
    if deployed and "state_dict" in kwargs:
        raise ArgumentError(
            "save: state_dict must be left out of a deployed model, got one\n"
            "transformers writes the model's own in its place."
        )
    scheme = getattr(model.config, "quantization_config", None)
    if isinstance(scheme, BitLabConfig):
        settle_vocabulary(model, scheme)
    with replacing(directory, "save") as staged:
        model.save_pretrained(staged, **kwargs)
        for file in staged.glob("*.safetensors"):
            align_file(file)
        check_written(model, staged, given="state_dict" in kwargs)
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        if not (staged / "config.json").exists():
            # An adapter alone; the model that it belongs to may be in the same directory.
            if facts is not None:
                raise ArgumentError("save: facts must be left out of an adapter, got some")
            return
        if facts is not None:
            facts.save(staged)
        card = staged / CARD
        if deployed and not card.exists():
            title = Path(directory).resolve().name
            card.write_text(model_card(model, title, facts), encoding="utf-8")


@contextmanager
def replacing(directory: str | os.PathLike[str], op: str) -> Iterator[Path]:
    """Gives a new directory to write a checkpoint into, which then takes another's place.

    Other files of the directory are taken over, with its owner and mode; what belongs to the model
    that was there is not, see `take_over`. Where the block raises, or writes no weights, the
    directory stays as it was.

    Args:
        directory: What is replaced, or made.
        op: Who asks, for error messages.

    Raises:
        ArgumentError: directory is no folder, may not be written or exchanged, or holds the
            working directory.
        CheckpointError: The block wrote no weights.
        DiskFullError: They do not fit.
        OutputError: The system does not let the directory be exchanged.
    """
    check_folder(directory, op)
    target = Path(directory).resolve()
    with naming_place(directory, op):
        target.parent.mkdir(parents=True, exist_ok=True)
    with staged_beside(target, op, folder=True) as staged:
        usual = stat.S_IMODE(staged.stat().st_mode)
        if target.exists():
            # Nobody who may not read the old one reads the new one while it is written.
            staged.chmod(0o700)
        with naming_full_disk(directory, op):
            yield staged
        if not any(weights_of(entry.name) for entry in staged.iterdir()):
            raise CheckpointError(f"{op}: weights must be written, got none")
        with naming_full_disk(directory, op):
            for file in staged.glob("*.safetensors"):
                # The library that writes them lets nobody else read them.
                file.chmod(usual & 0o666)
            if target.exists():
                take_over(target, staged)
                keep_access(target, staged)
            for file in staged.rglob("*"):
                flush(file)
        with naming_place(directory, op):
            if target.exists():
                _exchange(staged, target)
            else:
                staged.rename(target)


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
