"""Warms the quantization strength up during training, for any Trainer."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from bitcore.errors import ArgumentError, CheckpointError
from bitlayers import set_quant_strength

SCHEDULES = ("linear", "cosine")


def strength_at(step: int, steps: int, schedule: str = "linear") -> float:
    """Returns the quantization strength of a training step.

    With ``t = step / steps``: ``t`` (linear), ``(1 - cos(pi t)) / 2`` (cosine), and 1 from
    ``steps`` on.

    Args:
        step: How many optimizer steps came before; the first one trains with strength 0.
        steps: The warm-up's length in optimizer steps.
        schedule: ``"linear"`` or ``"cosine"``.
    """
    if step >= steps:
        return 1.0
    share = step / steps
    return share if schedule == "linear" else (1 - math.cos(math.pi * share)) / 2


def is_length(value: Any) -> bool:
    """Tells whether a value is a length: steps as an int, or a share of the run from 0 to 1."""
    if isinstance(value, bool):
        return False
    return (isinstance(value, int) and value >= 0) or (isinstance(value, float) and 0 <= value <= 1)


def saved_attributes(callback: ExportableState, state: Any) -> dict[str, Any]:
    """Returns what a checkpoint keeps of a callback, which has to have the same arguments.

    Args:
        callback: The one of the run that resumes.
        state: The Trainer's, as the checkpoint has it.

    Raises:
        CheckpointError: The checkpoint was made with other arguments, or without such a callback.
    """
    name, given = type(callback).__name__, callback.state()["args"]
    found = state.stateful_callbacks.get(name)
    saved = found[0] if isinstance(found, list) else found
    if saved is None or saved["args"] != given:
        was = "none" if saved is None else saved["args"]
        raise CheckpointError(
            f"{name}: the arguments must be the checkpoint's, {was}, got {given}\n"
            "Resume with the checkpoint's, or start anew from its weights."
        )
    attributes: dict[str, Any] = saved["attributes"]
    return attributes


class QuantStrengthWarmup(TrainerCallback, ExportableState):
    """Trains from no quantization to full quantization over the first steps of a run.

    ::

        Trainer(model=model, ..., callbacks=[QuantStrengthWarmup(0.2, "cosine")])

    The strength is a function of the optimizer step, so a resumed run goes on exactly as one that
    was not stopped, whatever the number of accumulated batches. Evaluation and `deploy` always
    quantize fully. After training the strength is 1 again. Source: "Fine-tuning LLMs to 1.58bit:
    extreme quantization made easy", Hugging Face blog, 2024.

    Args:
        length: Optimizer steps (an int), or a share of the run (a float up to 1.0).
        schedule: ``"linear"`` or ``"cosine"``; see `strength_at`.

    Attributes:
        steps: The length in steps, once training has begun.
        strength: What the step at hand is trained with.

    Raises:
        ArgumentError: An argument has a value that is not allowed; when training begins: the
            warm-up is longer than the run, or the model has no quantized layer.
        CheckpointError: When training resumes: the checkpoint was made with another warm-up, or
            with none.
    """

    def __init__(self, length: int | float, schedule: str = "linear") -> None:
        if not is_length(length) or length == 0:
            raise ArgumentError(
                "QuantStrengthWarmup: length must be a number of steps (an int) or a share of the "
                f"run (a float up to 1.0), above 0, got {length!r}"
            )
        if schedule not in SCHEDULES:
            raise ArgumentError(
                f"QuantStrengthWarmup: schedule must be one of {SCHEDULES}, got {schedule!r}"
            )
        self.length, self.schedule = length, schedule
        self.steps: int | None = None
        self.strength = 1.0

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of the warm-up."""
        return {
            "args": {"length": self.length, "schedule": self.schedule},
            "attributes": {"steps": self.steps},
        }

    def steps_of(self, max_steps: int) -> int:
        """Returns the warm-up's length in steps for a run of ``max_steps``.

        Raises:
            ArgumentError: It is longer than the run.
        """
        if isinstance(self.length, float):
            return max(1, math.ceil(self.length * max_steps))
        if self.length > max_steps:
            raise ArgumentError(
                f"QuantStrengthWarmup: length must be at most the run's {max_steps} steps, got "
                f"{self.length}\nGive a share of the run, such as 0.2, or train for longer."
            )
        return self.length

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuses a run that is too short as soon as its length is known."""
        if args.max_steps > 0:
            self.steps_of(args.max_steps)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Fixes the length in steps; on resuming it is the checkpoint's."""
        steps = self.steps_of(state.max_steps)
        if state.global_step > 0:
            # A share is one of the run as it began, also where it is now trained for longer.
            steps = int(saved_attributes(self, state)["steps"])
        self.steps = steps
        self._set(model, state.global_step)

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Sets the strength of the step."""
        if self.strength < 1:
            self._set(model, state.global_step)

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Leaves the model at full strength."""
        set_quant_strength(model, 1.0)
        self.strength = 1.0

    def _set(self, model: Any, step: int) -> None:
        assert self.steps is not None
        strength = strength_at(step, self.steps, self.schedule)
        set_quant_strength(model, strength)
        self.strength = strength
