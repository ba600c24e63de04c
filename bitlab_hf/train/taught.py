"""A teacher that learns first: text that is there to be learned, not to keep a model by."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from bitcore.errors import ArgumentError, CheckpointError
from bitlab_hf.checkpoint.atomic import write_atomically
from bitlab_hf.checkpoint.saving import save
from bitlab_hf.fit.kept import bytes_of
from bitlab_hf.train.guard import last_checkpoint, teacher_folder
from bitlab_hf.train.guarded import GuardMixin
from bitlab_hf.train.rates import RatesMixin
from bitlab_hf.train.recipe import RECIPES, Recipe

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object

logger = logging.getLogger("bitlab")

_FACTS = "taught.json"
# Examples of the training data that tell one text from another.
_COMPARED = 64
# What of the Trainer's arguments the teacher's training hangs on; what it computes in and on, which
# changes roundings alone, is no reason to lose what has been taught.
_ARGUMENTS = (
    "max_steps", "num_train_epochs", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps",
    "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha",
    "seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last",
)  # fmt: skip
# Without an evaluation's examples: one in so many is held out, about so many at most.
_HELD_OUT, _JUDGED = 20, 64


class _TeacherTrainer(GuardMixin, RatesMixin, Trainer):
    """Trains the teacher, guarded as a ternary model's training is, and as fast for its sizes."""

    recipe = RECIPES["plain"]


class TaughtTeacherMixin(_Base):
    """Put before a Trainer class with a ``recipe`` and a teacher: trains the teacher on the labels
    first, where the recipe asks for it, in full precision.

    The teacher learns for ``teacher_share`` of the run's steps, which are steps beside the run's
    own, with the Trainer's arguments and data. A model that has the teacher's weights, as one made
    of it has, goes on from what the teacher has learned; another one only learns from it. The
    taught teacher stays in ``teacher/model`` below the output directory, an ordinary float model.

    Where the teacher has become no better on examples held out (the evaluation's, or a twentieth
    of the training data, at most 64 or so), the text teaches nothing: it stays as it was, with a
    warning.
    A run that was killed goes on to the same bits, within the teacher's training too.

    Attributes:
        teacher_callbacks: Of the teacher's training.

    Raises:
        ArgumentError: There is no teacher that could learn: none, stored logits, one in 8 bits; or
            the run is one of FSDP or DeepSpeed.
    """

    recipe: Recipe
    teacher_callbacks: Sequence[TrainerCallback] = ()
    _teacher: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.recipe.teacher_share:
            return
        learns = self._teacher is not None and not getattr(self._teacher, "is_quantized", False)
        if not learns:
            raise ArgumentError(
                "BitLabTrainer: teacher must be a float model, or the path of one, for a recipe "
                "with teacher_share\nIt is trained itself; stored logits and 8 bits cannot be."
            )
        in_parts = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if in_parts or self.is_distributed_loading_by_transformers:
            raise ArgumentError(
                "BitLabTrainer: recipe must have teacher_share 0 under FSDP, DeepSpeed and "
                f"distributed_config, got {self.recipe.teacher_share}\nFine-tune the float model "
                "in a run of its own, then make it ternary with itself as the teacher."
            )

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Teaches the teacher, unless it has been; then trains."""
        if self.recipe.teacher_share:
            self._teach(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _teach(self, checkpoint: Any) -> None:
        model, teacher = self.accelerator.unwrap_model(self.model), self._teacher
        place = teacher_folder(self.args)
        taught = place / "model"
        # Not one for all: what an architecture keeps in float32 stays so.
        dtypes = {name: value.dtype for name, value in _named_tensors(teacher)}
        is_its_own = _has_weights_of(model, teacher)
        if checkpoint:
            if not taught.is_dir():
                raise CheckpointError(
                    f"BitLabTrainer: {taught} must hold the teacher that the run has taught, got "
                    "none\nPut it back, or start anew from the checkpoint's weights."
                )
        else:
            self._begin(place, teacher)
            if not taught.is_dir():
                self._train_teacher(place, teacher.float())
        # What was saved, also where it has just been: a run that goes on has no other.
        state = type(teacher).from_pretrained(taught, dtype=torch.float32).state_dict()
        teacher.float().load_state_dict(state)
        if not checkpoint and is_its_own:
            model.load_state_dict(state, strict=False)
        for name, value in _named_tensors(teacher):
            value.data = value.data.to(dtypes[name])
        teacher.eval().requires_grad_(False)
        # Whether the teacher learned in this process or in one before, the rest is the same.
        set_seed(self.args.seed)

    def _begin(self, place: Path, teacher: nn.Module) -> None:
        """Leaves what an earlier start of the same training has kept, and nothing else."""
        facts = self._facts(teacher)
        file = place / _FACTS
        held: Any = None
        # What cannot be read is of no training that could go on.
        with suppress(OSError, TypeError, ValueError):
            held = dict(json.loads(file.read_text(encoding="utf-8")))
        # All have seen it before it goes.
        self.accelerator.wait_for_everyone()
        if held != facts and self.is_world_process_zero():
            if held is not None:
                other = [name for name in facts if held.get(name) != facts[name]]
                logger.info("the teacher is taught anew: other %s", ", ".join(other))
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            write_atomically(file, json.dumps(facts, indent=2) + "\n")
        self.accelerator.wait_for_everyone()

    def _facts(self, teacher: nn.Module) -> dict[str, Any]:
        """Returns what makes two trainings of a teacher the same."""
        args, recipe, data = self.args.to_dict(), self.recipe, self.train_dataset
        weights, text = 0, hashlib.sha256()
        # As float32, exactly: a teacher that is loaded in another dtype is still the same.
        for name, value in teacher.state_dict().items():
            weights = zlib.crc32(name.encode(), weights)
            weights = zlib.crc32(bytes_of(value.float()), weights)
        if not isinstance(data, torch.utils.data.IterableDataset):
            rows: Any = data
            for index in range(0, len(rows), max(1, len(rows) // _COMPARED)):
                _add(text, rows[index])
            text.update(str(len(rows)).encode())
        facts = {
            **{name: args[name] for name in _ARGUMENTS},
            "batch": self.args.train_batch_size * self.args.gradient_accumulation_steps,
            "share": recipe.teacher_share,
            "rate": args["learning_rate"] * recipe.teacher_rate,
            "magnitude": recipe.rate_magnitude,
            "processes": self.accelerator.num_processes,
            "held_out": self._judges() is None,
            "weights": weights,
            "text": text.hexdigest(),
        }
        # As it is read again.
        return dict(json.loads(json.dumps(facts)))

    def _train_teacher(self, place: Path, teacher: Any) -> None:
        given, share = self.args, self.recipe.teacher_share
        args = copy.copy(given)
        args.output_dir = str(place)
        if given.max_steps > 0:
            args.max_steps = max(1, round(share * given.max_steps))
        args.num_train_epochs = share * given.num_train_epochs
        args.learning_rate = given.learning_rate * self.recipe.teacher_rate
        args.eval_strategy, args.load_best_model_at_end = IntervalStrategy.NO, False
        if given.save_strategy == SaveStrategy.BEST:
            args.save_strategy = SaveStrategy.NO
        args.save_total_limit, args.push_to_hub, args.report_to = 1, False, []
        args.prediction_loss_only = True
        logger.info("the teacher learns first, in full precision")
        data, held = self._split()
        trainer = _TeacherTrainer(
            model=teacher.requires_grad_(True),
            args=args,
            data_collator=self.data_collator,
            train_dataset=data,
            eval_dataset=held,
            callbacks=list(self.teacher_callbacks),
        )
        trainer.recipe = replace(trainer.recipe, rate_magnitude=self.recipe.rate_magnitude)
        # What this Trainer hands to its collator, which may be more than the model takes.
        self._set_signature_columns_if_needed()
        trainer._signature_columns = self._signature_columns
        if not any(isinstance(one, PrinterCallback) for one in self.callback_handler.callbacks):
            trainer.remove_callback(PrinterCallback)
        original = {name: value.cpu().clone() for name, value in teacher.state_dict().items()}
        before = math.inf if held is None else trainer.evaluate()["eval_loss"]
        trainer.train(resume_from_checkpoint=last_checkpoint(place))
        after = -math.inf if held is None else trainer.evaluate()["eval_loss"]
        told = f"learning took the loss of held-out examples from {before:.4f} to {after:.4f}"
        if after < before:
            logger.info(told)
        else:
            logger.warning("BitLabTrainer: the teacher stays as it was: %s", told)
            teacher.load_state_dict(original)
        if self.is_world_process_zero():
            save(teacher, place / "model")
            for folder in place.glob("checkpoint-*"):
                shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _judges(self) -> Any:
        """Returns the examples for evaluation; None where some of the training data have to do."""
        return None if isinstance(self.eval_dataset, dict) else self.eval_dataset

    def _split(self) -> tuple[Any, Any]:
        """Returns what the teacher learns from, and what tells whether it has learned: examples
        for evaluation, or else some of the training data; None for data that cannot be split.
        """
        data: Any = self.train_dataset
        if (judges := self._judges()) is not None:
            return data, judges
        if isinstance(data, torch.utils.data.IterableDataset):
            return data, None
        every = max(len(data) // _JUDGED, _HELD_OUT)
        parts: list[Any] = []
        for wanted in (False, True):
            indices = [at for at in range(len(data)) if (at % every == every - 1) is wanted]
            selects = hasattr(data, "select")
            part = data.select(indices) if selects else torch.utils.data.Subset(data, indices)
            parts.append(part)
        return parts[0], parts[1] if len(parts[1]) else None


def _add(digest: Any, value: Any) -> None:
    """Adds an example to a digest: what it holds, labels and masks too, and not where it lies."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            digest.update(f"{name}:".encode())
            _add(digest, part)
    elif isinstance(value, (list, tuple)):
        digest.update(f"{len(value)}".encode())
        for part in value:
            _add(digest, part)
    elif isinstance(value, (np.ndarray, np.generic)):
        # Of strings and objects too, which no tensor holds.
        _add(digest, value.tolist())
    elif isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype} {list(value.shape)}".encode())
        digest.update(bytes_of(value))
    elif isinstance(value, (str, bytes, int, float, type(None))):
        digest.update(repr(value).encode(errors="surrogateescape"))
    else:
        digest.update(type(value).__name__.encode())


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _has_weights_of(model: nn.Module, teacher: nn.Module) -> bool:
    """Tells whether a model has all of a teacher's weights under the same names, at their values
    in the coarser dtype of the two.
    """
    held = dict(model.named_parameters())
    for name, theirs in teacher.named_parameters():
        ours = held.get(name)
        if ours is None or ours.shape != theirs.shape:
            return False
        coarser = min(ours.dtype, theirs.dtype, key=lambda dtype: torch.finfo(dtype).bits)
        if not torch.equal(ours.to(coarser), theirs.to(ours.device, coarser)):
            return False
    return True
