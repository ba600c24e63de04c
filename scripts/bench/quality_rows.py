"""The rows of the quality benchmark: ways from a pretrained model to a ternary one."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from quality_methods import auto_bitlinear, load_bitlab, load_float
from results import write_json
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from bitlab_hf.train import RECIPES, BitLabTrainer, Recipe, calibrate
from bitlab_hf.train.defaults import OPTIMIZER, batch_size
from bitlab_hf.train.memory import kept_memory

GROUPS = {"weight_granularity": "per_group", "group_size": 64}
LEARNED = {**GROUPS, "weight_quantizer": "lsq"}
LENGTH = 256
# Rows of every model read as much: 128 blocks are for a calibrated start, however wide its layers.
RECIPE = replace(RECIPES["default"], calibration_tokens=0)
SAMPLES = RECIPE.calibration_samples


class Costs(TrainerCallback):
    """What making a row has cost, with what it cost before it was killed.

    Rows that begin with the same calibrated start take it over from the first of them, at the
    price that this one paid: each would find the same one, bit for bit.

    Args:
        scratch: Where the row's checkpoints are kept.
        start: Where the calibrated start is kept.
    """

    def __init__(self, scratch: Path, start: Path) -> None:
        self.scratch = scratch
        self._start, self._taken = start, False
        self._file = scratch / "costs.json"
        self._begin(self._file)

    def _begin(self, known: Path) -> None:
        nothing = {"seconds": 0.0, "cpu_seconds": 0.0, "peak_bytes": 0}
        self._before = json.loads(known.read_text()) if known.is_file() else nothing
        self._started, self._used = time.monotonic(), time.process_time()

    def now(self) -> dict[str, float]:
        """Returns seconds, CPU seconds, and the largest resident memory."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "seconds": self._before["seconds"] + time.monotonic() - self._started,
            "cpu_seconds": self._before["cpu_seconds"] + time.process_time() - self._used,
            "peak_bytes": max(self._before["peak_bytes"], peak),
        }

    def take_start(self) -> None:
        """Puts the calibrated start that another row has found where the Trainer looks for one."""
        if (self._start / "costs.json").is_file():
            shutil.copytree(self._start, self.scratch / "calibration", dirs_exist_ok=True)
            self._taken = True

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Keeps the calibrated start, or takes its price."""
        found = self.scratch / "calibration"
        if self._taken:
            self._begin(self._start / "costs.json")
        elif found.is_dir():
            shutil.copytree(found, self._start, dirs_exist_ok=True)
            write_json(self._start / "costs.json", self.now())

    def on_save(self, *_: Any, **__: Any) -> None:
        """Keeps what has been spent up to a checkpoint."""
        write_json(self._file, self.now())


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
        batch: Blocks of a training step; None for what `bitlab train` takes.
        int8_mlp: Whether the last decoder layer's MLP is int8 instead of ternary.
    """

    title: str
    config: dict[str, Any] | None = field(default_factory=dict)
    stock: bool = False
    calibrated: bool = False
    recipe: Recipe | None = None
    tokens: int = 0
    rate: float = 0.0
    batch: int | None = None
    int8_mlp: bool = False

    def config_of(self, source: Path) -> dict[str, Any]:
        """Returns the arguments of `BitLabConfig` for a model."""
        assert self.config is not None
        if not self.int8_mlp:
            return self.config
        layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]
        return {**self.config, "int8_layers": [f"model.layers.{layers - 1}.mlp"]}

    @property
    def blocks(self) -> int:
        """How many blocks are trained on: what a calibrated start reads, and what the teacher
        learns from, is taken off.
        """
        fitted = self.recipe.calibration_samples if self.recipe is not None else 0
        taught = self.recipe.teacher_share if self.recipe is not None else 0
        return max(0, int((self.tokens // LENGTH - fitted) / (1 + taught)))

    def start(self, seed: int, bf16: bool) -> str:
        """Returns a name that rows share which begin with the same calibrated start."""
        recipe = self.recipe or Recipe()
        what = self.config, recipe.calibration_samples, recipe.teacher_share, seed, bf16
        what += ("int8_mlp",) if self.int8_mlp else ()
        return hashlib.blake2b(repr(what).encode(), digest_size=6).hexdigest()


# Its calibration was another one too, which is gone: this one has today's.
_FORMER = replace(RECIPE, scale_rate=1.0, vector_rate=1.0, rate_magnitude=0.0)
# The rates that SmolLM2's sizes make of the default's, the same for a model of other sizes.
_ABSOLUTE = replace(RECIPE, scale_rate=3.0, vector_rate=10.0, rate_magnitude=0.0)
_TEACH = replace(RECIPES["teach"], calibration_tokens=0)
_FITTED = SAMPLES * LENGTH
_DEFAULT = Row("default, 64 k tokens", LEARNED, recipe=RECIPE, tokens=65_536, rate=2e-4)
_TUNED = Row("full precision, fine-tuned, 96 k", None, rate=2e-4, batch=2)
_STOCK = Row(
    "AutoBitLinear online, Trainer, 64 k", None, stock=True, tokens=65_536, rate=1e-3, batch=2
)
_LEARNED = 3 * _FITTED
ROWS: dict[str, Row] = {
    "original": Row("full precision", None),
    "rounded-tensor": Row("rounded, per tensor"),
    "rounded": Row("rounded, groups of 64", GROUPS),
    "calibrated-tensor": Row("calibrated, per tensor", calibrated=True, tokens=_FITTED),
    "calibrated": Row("calibrated, groups of 64", GROUPS, calibrated=True, tokens=_FITTED),
    "calibrated-int8": Row(
        "calibrated, groups of 64, the last MLP in int8", GROUPS, calibrated=True, tokens=_FITTED,
        int8_mlp=True,
    ),
    "stock-64k": _STOCK,
    "stock-256k": replace(_STOCK, title="AutoBitLinear online, Trainer, 256 k", tokens=262_144),
    "former": Row(
        "the former default's training: per tensor, one rate", recipe=_FORMER,
        tokens=_FITTED + 51_200, rate=3e-4, batch=2,
    ),
    "budget": replace(
        _DEFAULT, title="default, 51,200 tokens after calibration", tokens=_FITTED + 51_200
    ),
    "budget-int8": replace(
        _DEFAULT, title="the same, the last MLP in int8", tokens=_FITTED + 51_200, int8_mlp=True
    ),
    "default-64k": _DEFAULT,
    "default-256k": replace(_DEFAULT, title="default, 256 k tokens", tokens=262_144),
    "default-1m": replace(_DEFAULT, title="default, 1 M tokens", tokens=1_048_576),
    # For a text that is to be learned: what calibration reads, and twice as much.
    "tuned-96k": replace(_TUNED, tokens=_LEARNED),
    "stock-96k": replace(_STOCK, title="AutoBitLinear online, Trainer, 96 k", tokens=_LEARNED),
    "default-96k": replace(_DEFAULT, title="default, 96 k tokens", tokens=_LEARNED),
    "teach-96k": replace(
        _DEFAULT, title="teach, 96 k tokens", recipe=_TEACH, tokens=_LEARNED
    ),
    "tuned-256k": replace(_TUNED, title="full precision, fine-tuned, 256 k", tokens=262_144),
    "teach-256k": replace(
        _DEFAULT, title="teach, 256 k tokens", recipe=_TEACH, tokens=262_144
    ),
    "weights-64k": replace(
        _DEFAULT, title="default, weights only, 64 k tokens",
        config={**LEARNED, "activation_dtype": "float32"},
    ),
}  # fmt: skip
# What `quality.py` makes where it is not told: the others take a GPU, or are of one question.
USUAL = list(ROWS)
# Steps of 16,384 tokens, which fill a GPU.
_FILLED = replace(_DEFAULT, batch=64)
ROWS |= {
    "default-10m": replace(_FILLED, title="default, 10 M tokens", tokens=10_000_000),
    "default-50m": replace(_FILLED, title="default, 50 M tokens", tokens=50_000_000),
    "short": replace(
        _DEFAULT, title="default, 12,800 tokens after calibration", tokens=_FITTED + 12_800
    ),
    "short-absolute": replace(
        _DEFAULT, title="the same, one rate whatever the size", recipe=_ABSOLUTE,
        tokens=_FITTED + 12_800,
    ),
    "quick": replace(
        _DEFAULT, title="default, a few blocks", tokens=8 * LENGTH, batch=2,
        recipe=replace(RECIPE, calibration_samples=2),
    ),
}  # fmt: skip


def make(
    row: Row, source: Path, fit: Tensor, seed: int, bf16: bool, costs: Costs,
    say: Callable[[str], None], device: str = "cpu",
) -> Any:  # fmt: skip
    """Makes a row's model from the float one; a killed training goes on from its checkpoint.

    Args:
        row: The row.
        source: The float model's folder.
        fit: Blocks to fit and train on, int64 [n, length], in the seed's order: all that there are,
            of which training takes as many as it may.
        seed: Of the training.
        bf16: Whether to compute in bfloat16 (autocast).
        costs: Of making it; they know where checkpoints are kept.
        say: Is told how far it is.
        device: ``"cpu"`` or ``"cuda"``.
    """
    torch.manual_seed(seed)
    if row.config is not None:
        model = load_bitlab(source, **row.config_of(source))
    else:
        model = load_float(source)
        model = auto_bitlinear(model) if row.stock else model
    model.to(device)
    if row.calibrated:
        samples = fit[: row.tokens // LENGTH]
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            say(str(calibrate(model, samples, progress=_progress(say))))
    if row.blocks and not row.calibrated:
        _train(row, model, source, fit, seed, bf16, costs, say, device)
    return model


def _progress(say: Callable[[str], None]) -> Callable[[int, int, str], None]:
    def progress(done: int, of: int, name: str) -> None:
        if done % 35 == 0:
            say(f"{done}/{of} layers ({name})")

    return progress


def _train(
    row: Row, model: Any, source: Path, blocks: Tensor, seed: int, bf16: bool, costs: Costs,
    say: Callable[[str], None], device: str,
) -> None:  # fmt: skip
    scratch, batch = costs.scratch, row.batch or batch_size(row.blocks)
    arguments = TrainingArguments(
        output_dir=str(scratch), per_device_train_batch_size=batch, max_steps=row.blocks // batch,
        learning_rate=row.rate, use_cpu=device == "cpu", bf16=bf16, seed=seed, report_to="none",
        save_steps=0.1, save_total_limit=1, logging_steps=0.05, disable_tqdm=True, **OPTIMIZER,
    )  # fmt: skip
    data = [{"input_ids": ids, "labels": ids} for ids in blocks]
    common: dict[str, Any] = {
        "model": model, "args": arguments, "train_dataset": data, "callbacks": [costs],
    }  # fmt: skip
    if row.recipe is None:
        trainer: Any = Trainer(**common)
    else:
        teacher = load_float(source) if row.recipe.distills else None
        trainer = BitLabTrainer(**common, recipe=row.recipe, teacher=teacher)
        trainer.calibration_progress = _progress(say)
    last = get_last_checkpoint(str(scratch)) if scratch.is_dir() else None
    if last is None:
        costs.take_start()
    # As `BitLabTrainer` does: rows of a plain Trainer would be slower for no reason of theirs.
    with kept_memory():
        trainer.train(resume_from_checkpoint=last)
