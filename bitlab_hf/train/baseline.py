"""The full-precision model's loss on a run's evaluation text, kept beside the run.

A ternary model's perplexity says little without the one that it should reach. Both have to come
from the same text, cut the same way, so the run's own Trainer measures both.
"""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

from transformers import Trainer

from bitcore.errors import ArgumentError, CheckpointError
from bitlab_hf.checkpoint.atomic import write_atomically

BASELINE_FILE = "bitlab_baseline.json"


def record_baseline(trainer: Trainer, model: Any, name: str = "full precision") -> float:
    """Evaluates a full-precision model on a Trainer's evaluation data and writes the result.

    `bitlab report` draws it beside the run's own perplexity.

    Args:
        trainer: Whose ``eval_dataset`` and collator are used; every process has to come here.
        model: The full-precision model; its mode and its gradients' settings are put back.
        name: What it is, as the report shows it.

    Returns:
        Its loss, in nats a token.

    Raises:
        ArgumentError: The Trainer has no evaluation data, or several sets of them.
    """
    if trainer.eval_dataset is None:
        raise ArgumentError(
            "record_baseline: trainer must have an eval_dataset, got none\n"
            "Give the Trainer eval_dataset=... and eval_strategy."
        )
    if isinstance(trainer.eval_dataset, dict):
        raise ArgumentError(
            "record_baseline: trainer must have one eval_dataset, got a dict of "
            f"{', '.join(map(str, trainer.eval_dataset))}\n"
            "Record the baseline with a Trainer that has the one that the report is to show."
        )
    arguments = copy.copy(trainer.args)
    arguments.report_to = []
    training = model.training
    judge = Trainer(
        model=model,
        args=arguments,
        data_collator=trainer.data_collator,
        eval_dataset=trainer.eval_dataset,
    )
    judge.callback_handler.callbacks.clear()
    try:
        nats = float(judge.evaluate()["eval_loss"])
    finally:
        model.train(training)
    if trainer.is_world_process_zero():
        write_baseline(str(trainer.args.output_dir), nats, name)
    return nats


def write_baseline(folder: str | os.PathLike[str], nats: float, name: str) -> None:
    """Writes ``bitlab_baseline.json`` into a run's folder, in one step."""
    path = Path(folder) / BASELINE_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"version": 1, "nats": nats, "name": name}) + "\n")


def read_baseline(folder: str | os.PathLike[str]) -> tuple[float, str] | None:
    """Returns nats a token and the name of what was measured; None without the file.

    Raises:
        CheckpointError: The file is not one of ours.
    """
    path = Path(folder) / BASELINE_FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        nats = float(found["nats"])
        if found["version"] != 1 or not math.isfinite(nats):
            raise ValueError(f"version {found['version']}, {nats} nats")
        return nats, str(found["name"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path.name}: the file must be JSON of version 1, got: {error!r}"
        ) from error
