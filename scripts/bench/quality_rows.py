"""The rows of the quality benchmark: ways from a pretrained model to a ternary one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from quality_methods import auto_bitlinear, load_bitlab, load_float
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from bitlab_hf.train import RECIPES, BitLabTrainer, Recipe, calibrate

GROUPS = {"weight_granularity": "per_group", "group_size": 64}
LEARNED = {**GROUPS, "weight_quantizer": "lsq"}
LENGTH = 256
_BATCH = 2
# What a calibrated start reads, in blocks.
SAMPLES = RECIPES["default"].calibration_samples


@dataclass(frozen=True)
class Row:
    """One way to make a ternary model, or the original.

    Attributes:
        title: What tables say.
        config: Arguments of `BitLabConfig`; None where no layer is BitLab's.
        stock: Whether transformers' `AutoBitLinear` takes the place of the layers.
        calibrated: Whether it is calibrated, and nothing else.
        recipe: Of the training; None for a plain Trainer.
        tokens: That it is fitted and trained on, in all; 0 for none.
        rate: Peak learning rate.
    """

    title: str
    config: dict[str, Any] | None = field(default_factory=dict)
    stock: bool = False
    calibrated: bool = False
    recipe: Recipe | None = None
    tokens: int = 0
    rate: float = 0.0

    @property
    def blocks(self) -> int:
        """How many blocks are trained on: what a calibrated start reads, and what the teacher
        learns from, is taken off.
        """
        fitted = self.recipe.calibration_samples if self.recipe is not None else 0
        taught = self.recipe.teacher_share if self.recipe is not None else 0
        return max(0, int((self.tokens // LENGTH - fitted) / (1 + taught)))


# Its calibration was another one too, which is gone: this one has today's.
_FORMER = replace(RECIPES["default"], scale_rate=1.0, vector_rate=1.0)
_FITTED = SAMPLES * LENGTH
_DEFAULT = Row("default, 64 k tokens", LEARNED, recipe=RECIPES["default"], tokens=65_536, rate=2e-4)
_TUNED = Row("full precision, fine-tuned, 96 k", None, rate=2e-4)
_STOCK = Row("AutoBitLinear online, Trainer, 64 k", None, stock=True, tokens=65_536, rate=1e-3)
_LEARNED = 3 * _FITTED
ROWS: dict[str, Row] = {
    "original": Row("full precision", None),
    "rounded-tensor": Row("rounded, per tensor"),
    "rounded": Row("rounded, groups of 64", GROUPS),
    "calibrated-tensor": Row("calibrated, per tensor", calibrated=True, tokens=_FITTED),
    "calibrated": Row("calibrated, groups of 64", GROUPS, calibrated=True, tokens=_FITTED),
    "stock-64k": _STOCK,
    "stock-256k": replace(_STOCK, title="AutoBitLinear online, Trainer, 256 k", tokens=262_144),
    "former": Row(
        "the former default's training: per tensor, one rate", recipe=_FORMER,
        tokens=_FITTED + 51_200, rate=3e-4,
    ),
    "budget": replace(
        _DEFAULT, title="default, 51,200 tokens after calibration", tokens=_FITTED + 51_200
    ),
    "budget-staged": replace(
        _DEFAULT, title="the same, in ten stages", tokens=_FITTED + 51_200,
        recipe=replace(RECIPES["default"], stages=10),
    ),
    "default-64k": _DEFAULT,
    "default-256k": replace(_DEFAULT, title="default, 256 k tokens", tokens=262_144),
    "default-1m": replace(_DEFAULT, title="default, 1 M tokens", tokens=1_048_576),
    # For a text that is to be learned: what calibration reads, and twice as much.
    "tuned-96k": replace(_TUNED, tokens=_LEARNED),
    "stock-96k": replace(_STOCK, title="AutoBitLinear online, Trainer, 96 k", tokens=_LEARNED),
    "default-96k": replace(_DEFAULT, title="default, 96 k tokens", tokens=_LEARNED),
    "teach-96k": replace(
        _DEFAULT, title="teach, 96 k tokens", recipe=RECIPES["teach"], tokens=_LEARNED
    ),
    "tuned-256k": replace(_TUNED, title="full precision, fine-tuned, 256 k", tokens=262_144),
    "teach-256k": replace(
        _DEFAULT, title="teach, 256 k tokens", recipe=RECIPES["teach"], tokens=262_144
    ),
    "weights-64k": replace(
        _DEFAULT, title="default, weights only, 64 k tokens",
        config={**LEARNED, "activation_dtype": "float32"},
    ),
}  # fmt: skip


def make(
    row: Row, source: Path, fit: Tensor, seed: int, bf16: bool, scratch: Path,
    say: Callable[[str], None],
) -> Any:  # fmt: skip
    """Makes a row's model from the float one; a killed training goes on from its checkpoint.

    Args:
        row: The row.
        source: The float model's folder.
        fit: Blocks to fit and train on, int64 [n, length], in the seed's order: all that there are,
            of which training takes as many as it may.
        seed: Of the training.
        bf16: Whether to compute in bfloat16 (autocast).
        scratch: Where checkpoints are kept.
        say: Is told how far it is.
    """
    torch.manual_seed(seed)
    if row.config is not None:
        model = load_bitlab(source, **row.config)
    else:
        model = load_float(source)
        model = auto_bitlinear(model) if row.stock else model
    if row.calibrated:
        samples = fit[: row.tokens // LENGTH]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            say(str(calibrate(model, samples, progress=_progress(say))))
    if row.blocks and not row.calibrated:
        _train(row, model, source, fit, seed, bf16, scratch, say)
    return model


def _progress(say: Callable[[str], None]) -> Callable[[int, int, str], None]:
    def progress(done: int, of: int, name: str) -> None:
        if done % 35 == 0:
            say(f"{done}/{of} layers ({name})")

    return progress


def _train(
    row: Row, model: Any, source: Path, blocks: Tensor, seed: int, bf16: bool, scratch: Path,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(scratch), per_device_train_batch_size=_BATCH, max_steps=row.blocks // _BATCH,
        learning_rate=row.rate, lr_scheduler_type="cosine", warmup_steps=0.1, adam_beta2=0.95,
        weight_decay=0.0, use_cpu=True, bf16=bf16, seed=seed, report_to="none",
        save_steps=0.1, save_total_limit=1, logging_steps=0.05, disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": ids, "labels": ids} for ids in blocks]
    common: dict[str, Any] = {"model": model, "args": arguments, "train_dataset": data}
    if row.recipe is None:
        trainer: Any = Trainer(**common)
    else:
        teacher = load_float(source) if row.recipe.distills else None
        trainer = BitLabTrainer(**common, recipe=row.recipe, teacher=teacher)
        trainer.calibration_progress = _progress(say)
    last = get_last_checkpoint(str(scratch)) if scratch.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
