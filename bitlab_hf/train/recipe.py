"""Recipe: what BitLab adds to a training run, as one frozen value that a file can hold."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bitcore.config import check_fields
from bitcore.errors import ArgumentError, ConfigError
from bitlab_hf.checkpoint.atomic import write_atomically
from bitlab_hf.train.schedule import SCHEDULES, is_length

RECIPE_FILE = "bitlab_recipe.json"


@dataclass(frozen=True)
class Recipe:
    """What `BitLabTrainer` does beside an ordinary training step.

    Losses are means over the labelled tokens of an optimizer step, in nats, and are added up with
    their weights.

    Args:
        cross_entropy_weight: Weight of the loss against the labels beside a teacher's terms;
            without a teacher it is 1.
        logits_weight: Weight of the Kullback-Leibler divergence from the teacher's next-token
            distribution to the model's (Hinton et al., arXiv 1503.02531), times the square of the
            temperature.
        temperature: Divides both logits first.
        hidden_weight: Weight of the squared difference of a token's hidden states, relative to the
            teacher's square.
        hidden_layers: Which decoder layers' outputs it compares, from 0, or from the last with -1;
            None for all.
        relation_weight: Weight of the attention-relation term of BitNet Distillation
            (arXiv 2510.13998): KL between softmax(A A^T / sqrt(d)) of teacher and model, for A the
            outputs of the query, key and value projections.
        relation_layer: The layer that it compares; the paper takes one late layer.
        relation_heads: Into how many heads the projections' outputs are split for it.
        teacher_required: Whether training without a teacher is an error; else the terms that need
            one are left out.
        teacher_8bit: Load a teacher given as a path in 8 bits, through bitsandbytes.
        teacher_share: For which share of the run's steps the teacher itself learns from the labels
            first, in full precision, beside the run's own steps; 0 for a teacher that stays as it
            is. See `TaughtTeacherMixin`.
        teacher_rate: Learning rate of that, in units of the run's.
        quant_warmup: Over how much of the run the quantization strength rises from 0 to 1: a number
            of steps (an int), or a share of the run (a float up to 1.0); 0 for full strength from
            the start. See `QuantStrengthWarmup`.
        quant_warmup_schedule: ``"linear"`` or ``"cosine"``.
        calibration_samples: On how many examples of the training data to `calibrate` the model
            before the first step; 0 for none. See `CalibratedStartMixin`.
        calibration_tokens: How many tokens for each input of the widest ternary layer these are to
            hold at least; more examples are taken until they do. 0 for just so many examples.
        scale_rate: Learning rate of learned scales, in units of the run's; one steers a whole group
            of weights.
        vector_rate: That of norms and biases, likewise.
        rate_magnitude: The mean magnitude of a parameter's elements at which it learns at its rate
            as that is given; one of k times this magnitude learns k times as fast, since a step of
            Adam is as large for small elements as for large ones. 0 for rates that do not look at
            magnitudes. Biases and adapters, which begin at 0, never do.
        guard: Stop at the first loss or gradient that is not finite, naming where it came from.

    Raises:
        ConfigError: A field has a value that is not allowed.
    """

    cross_entropy_weight: float = 1.0
    logits_weight: float = 0.0
    temperature: float = 1.0
    hidden_weight: float = 0.0
    hidden_layers: tuple[int, ...] | None = None
    relation_weight: float = 0.0
    relation_layer: int = -1
    relation_heads: int = 1
    teacher_required: bool = False
    teacher_8bit: bool = False
    teacher_share: float = 0.0
    teacher_rate: float = 1.0
    quant_warmup: int | float = 0
    quant_warmup_schedule: str = "linear"
    calibration_samples: int = 0
    calibration_tokens: int = 0
    scale_rate: float = 1.0
    vector_rate: float = 1.0
    rate_magnitude: float = 0.0
    guard: bool = True

    def __post_init__(self) -> None:
        at_least_0 = ("cross_entropy_weight", "logits_weight", "hidden_weight", "relation_weight")
        for name in (*at_least_0, "rate_magnitude"):
            value = getattr(self, name)
            if not _is_number(value) or value < 0:
                raise _wrong(name, "a finite number of at least 0", value)
        for name in ("temperature", "teacher_rate", "scale_rate", "vector_rate"):
            value = getattr(self, name)
            if not _is_number(value) or value <= 0:
                raise _wrong(name, "a finite number above 0", value)
        if self.cross_entropy_weight == 0 and not self.distills:
            raise _wrong("cross_entropy_weight", "above 0 without a term from a teacher", 0)
        layers = self.hidden_layers
        if layers is not None:
            if not isinstance(layers, (tuple, list)) or not layers or not all(map(_is_int, layers)):
                raise _wrong("hidden_layers", "layer numbers, or None for all", layers)
            object.__setattr__(self, "hidden_layers", tuple(layers))
        if not _is_int(self.relation_layer):
            raise _wrong("relation_layer", "a layer number", self.relation_layer)
        if not _is_int(self.relation_heads) or self.relation_heads < 1:
            raise _wrong("relation_heads", "an int of at least 1", self.relation_heads)
        if not _is_number(self.teacher_share) or self.teacher_share < 0:
            raise _wrong("teacher_share", "a finite number of at least 0", self.teacher_share)
        if self.teacher_share and not self.distills:
            raise _wrong("teacher_share", "0 without a term from a teacher", self.teacher_share)
        if self.teacher_share and self.teacher_8bit:
            raise _wrong("teacher_share", "0 for a teacher in 8 bits", self.teacher_share)
        if not is_length(self.quant_warmup):
            requirement = "a number of steps (an int), or a share of the run (a float up to 1.0)"
            raise _wrong("quant_warmup", requirement, self.quant_warmup)
        if self.quant_warmup_schedule not in SCHEDULES:
            schedules = f"one of {SCHEDULES}"
            raise _wrong("quant_warmup_schedule", schedules, self.quant_warmup_schedule)
        for name in ("calibration_samples", "calibration_tokens"):
            if not _is_int(getattr(self, name)) or getattr(self, name) < 0:
                raise _wrong(name, "an int of at least 0", getattr(self, name))
        if self.calibration_tokens and not self.calibration_samples:
            raise _wrong(
                "calibration_tokens", "0 without calibration_samples", self.calibration_tokens
            )
        for name in ("teacher_required", "teacher_8bit", "guard"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, "true or false", getattr(self, name))

    @property
    def distills(self) -> bool:
        """Whether any term needs a teacher."""
        return max(self.logits_weight, self.hidden_weight, self.relation_weight) > 0

    def in_words(self, learning_rate: float) -> str:
        """Returns what it does, as commands say it.

        Args:
            learning_rate: Of the run.
        """
        terms = {
            "labels": self.cross_entropy_weight,
            "the teacher's next tokens": self.logits_weight,
            "its hidden states": self.hidden_weight,
            "its attention relations": self.relation_weight,
        }
        told = [f"learns from {' and '.join(name for name, weight in terms.items() if weight)}"]
        if self.calibration_samples:
            tokens = self.calibration_tokens
            more = f" (more if they hold less than {tokens} tokens an input)" * bool(tokens)
            told.insert(0, f"calibrated on {self.calibration_samples} examples{more}")
        if self.teacher_share:
            told.insert(0, f"the teacher learns first, for {self.teacher_share:g} times the steps")
        scales, vectors = (learning_rate * one for one in (self.scale_rate, self.vector_rate))
        rates = f"rates {learning_rate:g}, scales {scales:g}, norms and biases {vectors:g}"
        if self.rate_magnitude:
            rates += f" for a mean magnitude of {self.rate_magnitude:g}, others by theirs"
        told.append(rates)
        return ", ".join(told)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain values that JSON holds and `from_dict` takes back."""
        values = asdict(self)
        if self.hidden_layers is not None:
            values["hidden_layers"] = list(self.hidden_layers)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Builds a recipe from `to_dict`'s result, or from a part of it.

        Raises:
            ConfigError: A key is unknown, or a value is not allowed.
        """
        check_fields(cls, values)
        return cls(**values)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the recipe into a directory, in one step."""
        write_atomically(Path(directory) / RECIPE_FILE, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Recipe | None:
        """Returns the recipe that a directory holds, or None."""
        file = Path(directory) / RECIPE_FILE
        if not file.exists():
            return None
        return cls.from_dict(json.loads(file.read_text(encoding="utf-8")))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _wrong(name: str, requirement: str, value: object) -> ConfigError:
    return ConfigError(f"Recipe: {name} must be {requirement}, got {value!r}")


# The best of docs/quality.md: codes that fit what the layers get to see, then the original model's
# whole distribution, which says more about a token than its label does.
_DEFAULT = Recipe(
    cross_entropy_weight=0.0,
    logits_weight=1.0,
    calibration_samples=128,
    # 128 blocks of 256 tokens are 21 of them for each of SmolLM2's 1,536 inputs.
    calibration_tokens=20,
    scale_rate=2.0,
    vector_rate=7.0,
    # That of SmolLM2's weights, on which the rates were raced.
    rate_magnitude=0.15,
)
RECIPES: dict[str, Recipe] = {
    "default": _DEFAULT,
    # For text that is to be learned.
    "teach": replace(_DEFAULT, teacher_required=True, teacher_share=1.0),
    "plain": Recipe(),
    "distill": Recipe(logits_weight=1.0, cross_entropy_weight=0.0, teacher_required=True),
    # The terms of arXiv 2510.13998. Temperature and weights are a start: none is measured here.
    "bitdistill": Recipe(
        logits_weight=1.0, temperature=5.0, relation_weight=1.0, teacher_required=True
    ),
}


def get_recipe(recipe: str | Recipe) -> Recipe:
    """Returns a recipe given as itself or by its name in `RECIPES`.

    Raises:
        ArgumentError: There is none of this name.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise ArgumentError(
            f"BitLabTrainer: recipe must be a Recipe or one of {sorted(RECIPES)}, got {recipe!r}"
        )
    return RECIPES[recipe]
