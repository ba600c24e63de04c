"""BitLabTrainer: transformers' Trainer with a recipe, a teacher and guards."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from transformers import Trainer

from bitcore.errors import ArgumentError
from bitlab_hf.model.groups import advise_groups
from bitlab_hf.model.tree import quantized_layers
from bitlab_hf.train.distill import DistillationMixin
from bitlab_hf.train.guarded import GuardMixin
from bitlab_hf.train.memory import kept_memory
from bitlab_hf.train.rates import RatesMixin
from bitlab_hf.train.recipe import Recipe
from bitlab_hf.train.schedule import QuantStrengthWarmup
from bitlab_hf.train.start import CalibratedStartMixin
from bitlab_hf.train.statistics import TernaryStatistics
from bitlab_hf.train.taught import TaughtTeacherMixin

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class CallbacksMixin(_Base):
    """Put before a Trainer class with a ``recipe``: warms the quantization strength up, and logs
    ternary statistics where the Trainer logs and there are latent layers.
    """

    recipe: Recipe

    def __init__(self, *args: Any, statistics: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.recipe.quant_warmup:
            self._add_warmup()
        logs = str(getattr(self.args.logging_strategy, "value", self.args.logging_strategy)) != "no"
        given = any(isinstance(one, TernaryStatistics) for one in self.callback_handler.callbacks)
        model: Any = self.model
        latent = any(not one.module.is_deployed for one in quantized_layers(model))
        if statistics and logs and latent and not given:
            TernaryStatistics().attach(self)

    def _add_warmup(self) -> None:
        if self._warmup() is not None:
            raise ArgumentError(
                "BitLabTrainer: callbacks must hold no QuantStrengthWarmup beside a recipe's "
                "quant_warmup, got one\nLeave one of them out."
            )
        recipe = self.recipe
        warmup = QuantStrengthWarmup(recipe.quant_warmup, recipe.quant_warmup_schedule)
        warmup.on_init_end(self.args, self.state, self.control)
        self.add_callback(warmup)

    def _warmup(self) -> QuantStrengthWarmup | None:
        callbacks = self.callback_handler.callbacks
        return next((one for one in callbacks if isinstance(one, QuantStrengthWarmup)), None)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Trains; a run that fails leaves the model at full quantization strength too.

        Where it begins with a calibration, for scales that lose more than others would, says so.
        On a CPU what a step frees is kept for the next one.
        """
        begins = self.recipe.calibration_samples and not resume_from_checkpoint
        if begins and self.is_world_process_zero():
            advise_groups(self.accelerator.unwrap_model(self.model))
        memory = kept_memory() if self.args.device.type == "cpu" else nullcontext()
        try:
            with memory:
                return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            warmup = self._warmup()
            if warmup is not None and warmup.strength < 1:
                warmup.on_train_end(self.args, self.state, self.control, self.model)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the quantization strength to a training log, while something sets it."""
        warmup = self._warmup()
        if warmup is not None and "loss" in logs:
            logs["quant_strength"] = warmup.strength
        super().log(logs, *args, **kwargs)


class BitLabTrainer(
    CallbacksMixin,
    GuardMixin,
    RatesMixin,
    TaughtTeacherMixin,
    CalibratedStartMixin,
    DistillationMixin,
    Trainer,
):
    """transformers' Trainer for quantization-aware training.

    Takes everything that a Trainer takes, and:

    Args:
        recipe: A `Recipe` or its name; written into each checkpoint, and checked on resuming.
        teacher: The full-precision model, or its path.
        statistics: Whether to log `TernaryStatistics`, where the Trainer logs at all and the model
            has latent layers.
    """


@functools.cache
def sft_trainer() -> type[Any]:
    """Returns the same for TRL's ``SFTTrainer``; imports trl."""
    from trl import SFTTrainer  # type: ignore[attr-defined]

    bases = (*BitLabTrainer.__bases__[:-1], SFTTrainer)
    return type("BitLabSFTTrainer", bases, {})
