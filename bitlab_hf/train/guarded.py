"""A Trainer that stops at values that are not finite, and keeps checkpoints whole."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bitcore.errors import CheckpointError, NonFiniteError
from bitlab_hf.model.parallel import check_no_tensor_parallel
from bitlab_hf.train.guard import (
    Finding,
    first_non_finite,
    gradient_is_finite,
    has_begun,
    last_checkpoint,
    last_non_finite_gradient,
    leave_behind,
    non_finite_parameter,
    whole_or_nothing,
)
from bitlab_hf.train.recipe import Recipe

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class GuardMixin(_Base):
    """Put before a Trainer class with a ``recipe``: stops at values that are not finite, keeps
    checkpoints whole, resumes with the same recipe only, and lets no scale decay.

    Raises:
        ArgumentError: The arguments ask for tensor parallel.
    """

    recipe: Recipe
    # Whether the checkpoint at work is a folder that another process has made.
    _is_another_ones = False

    def __init__(self, model: Any = None, args: Any = None, *rest: Any, **kwargs: Any) -> None:
        check_no_tensor_parallel("BitLabTrainer", getattr(args, "parallelism_config", None))
        super().__init__(model, args, *rest, **kwargs)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Trains; ``resume_from_checkpoint=True`` takes the newest checkpoint that is whole, and of
        this run: not what an earlier one has left in the same folder.

        Where there is none yet, it goes on with a calibrated start, or with a teacher's training,
        that was killed.

        Raises:
            CheckpointError: There is neither, or it was made with another recipe.
            NonFiniteError: A loss or gradient was NaN or infinite; nothing was updated with it.
        """
        resumes = bool(resume_from_checkpoint)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(str(self.args.output_dir))
            if not has_begun(self.args):
                raise CheckpointError(
                    f"BitLabTrainer: {self.args.output_dir} must hold a checkpoint to resume, "
                    "got none that is whole"
                )
        if isinstance(resume_from_checkpoint, str):
            self._check_recipe(resume_from_checkpoint)
        elif not resumes and self.args.should_save:
            leave_behind(str(self.args.output_dir))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluates; before training too, which is then spread over the processes all the same."""
        model: Any = self.model
        fresh = not getattr(model, "_is_accelerate_prepared", False)
        found: Any = super().evaluate(*args, **kwargs)
        wrapped: Any = self.model_wrapped
        if fresh and self.accelerator.num_processes > 1 and wrapped is model:
            # accelerate takes a model that was readied for evaluation for one that is ready to
            # train, and each process would train a copy of its own.
            model._is_accelerate_prepared = False
            self.accelerator._models = [one for one in self.accelerator._models if one is not model]
        return found

    def _check_recipe(self, folder: str) -> None:
        saved = Recipe.load(folder)
        if saved is None or saved == self.recipe:
            return
        old, new = saved.to_dict(), self.recipe.to_dict()
        listed = ", ".join(f"{k}={new[k]!r} (was {old[k]!r})" for k in old if old[k] != new[k])
        raise CheckpointError(
            f"BitLabTrainer: recipe must be the one of {folder}, got {listed}\n"
            "Resume with recipe=Recipe.load(folder), or start anew from its weights."
        )

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Runs one forward and backward pass; stops at a loss that is not finite."""
        batch = dict(inputs)
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        if self.recipe.guard and not self._is_finite_everywhere(loss):
            inner = self.accelerator.unwrap_model(model)
            ready = self._prepare_inputs(batch)
            found = self._earliest(first_non_finite(inner, lambda: model(**ready)))
            self._stop("loss", found or "the loss alone (is every label -100?)")
        return loss

    def _is_finite_everywhere(self, value: Tensor) -> bool:
        """Tells whether a scalar is finite in every process: all stop at the same step."""
        wrong = self.accelerator.reduce((~torch.isfinite(value)).float(), reduction="sum")
        return not bool(wrong)

    def _earliest(self, found: Finding | None) -> str | None:
        """Returns the first of what the processes found; every one has to come here."""
        from accelerate.utils.operations import gather_object

        everywhere: list[Finding | None] = gather_object([found])
        return min((one for one in everywhere if one is not None), default=(0, None))[1]

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Returns what weight decay applies to: what the Trainer says, without learned scales."""
        names: list[str] = super().get_decay_parameter_names(model)
        return [name for name in names if not name.endswith("learned_scale")]

    def _clip_grad_norm(self, model: Any) -> Any:
        self._check_gradients(model)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None:
            self._check_gradients(model)
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _check_gradients(self, model: Any) -> None:
        """Stops at a gradient that is not finite, before clipping makes all of them so."""
        # A loss scaler meets infinite gradients in its normal work, and skips these steps itself.
        if not self.recipe.guard or getattr(self.accelerator, "scaler", None) is not None:
            return
        if not gradient_is_finite(model):
            inner = self.accelerator.unwrap_model(model)
            found = self._earliest(last_non_finite_gradient(inner))
            self._stop("gradient", found or "the norm alone")

    def _stop(self, what: str, where: str) -> None:
        last = last_checkpoint(str(self.args.output_dir))
        raise NonFiniteError(
            f"BitLabTrainer: {what} of step {self.state.global_step + 1} must be finite, got NaN "
            f"or infinity, first in {where}\nThe last good checkpoint is {last or 'none'}; try a "
            "lower learning rate or max_grad_norm."
        )

    def _save_checkpoint(self, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        if self.recipe.guard:
            inner = self.accelerator.unwrap_model(model)
            bad = self._earliest(non_finite_parameter(inner))
            if bad is not None:
                self._stop("weights", bad)
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        with whole_or_nothing(folder, self.args.should_save):
            if self.args.should_save:
                folder.mkdir(parents=True, exist_ok=True)
                self.recipe.save(folder)
            self.accelerator.wait_for_everyone()
            self._is_another_ones = folder.is_dir() and not self.args.should_save
            super()._save_checkpoint(model, trial, *args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        """Saves those of all processes, before the state of the Trainer says that all is there; not
        into a folder that the process which made it has given up meanwhile.
        """
        if self._is_another_ones:
            # The Trainer would make the folder anew.
            with tempfile.TemporaryDirectory() as elsewhere:
                super()._save_rng_state(elsewhere)
                for file in Path(elsewhere).iterdir():
                    shutil.copyfile(file, Path(output_dir) / file.name)
        else:
            super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()
