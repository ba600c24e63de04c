"""What BitLabTrainer calls back: the warm-up of the quantization strength, and statistics."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from bitcore.errors import ArgumentError, CheckpointError, ConfigError, NonFiniteError
from bitlab_hf.model.tree import quantized_layers
from bitlab_hf.train import BitLabTrainer, QuantStrengthWarmup, Recipe, TernaryStatistics
from bitlab_hf.train.schedule import strength_at
from bitlab_hf.train.statistics_files import read_statistics
from tests.bitlab_hf.models import make_float_model, training_data
from tests.bitlab_hf.test_trainer import assert_equal_states, state_of
from tests.bitlab_hf.train.test_trainer import arguments, load, make


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_float_model("llama", tmp_path_factory.mktemp("float"))


def strengths_of(model: Any) -> set[float]:
    return {one.module.quant_strength for one in quantized_layers(model)}


class Seen(TrainerCallback):
    """Notes with which strength each optimizer step ran, and each of its batches ended."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.batches = 0

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.batches += 1
        self._note(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note(kwargs["model"])

    def _note(self, model: Any) -> None:
        (strength,) = strengths_of(model)
        self.steps.append(strength)


def test_values() -> None:
    assert [strength_at(step, 4) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    cosine = [strength_at(step, 4, "cosine") for step in range(6)]
    assert cosine == pytest.approx([0, 0.5 - math.sqrt(0.125), 0.5, 0.5 + math.sqrt(0.125), 1, 1])
    assert [QuantStrengthWarmup(length).steps_of(10) for length in (3, 10, 0.25, 1.0, 1e-9)] == [
        3, 10, 3, 10, 1,
    ]  # fmt: skip


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_plain_trainer_warms_up(source: Path, tmp_path: Path, accumulate: int) -> None:
    model, seen = load(source), Seen()
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, gradient_accumulation_steps=accumulate, max_steps=5),
        train_dataset=training_data(),
        callbacks=[QuantStrengthWarmup(4), seen],
    )
    trainer.train()
    expected = [strength for strength in (0, 0.25, 0.5, 0.75, 1) for _ in range(accumulate)]
    assert seen.steps == expected
    assert seen.batches == 5 * (accumulate - 1)
    assert strengths_of(model) == {1.0}


def test_the_first_step_is_the_float_models(source: Path, tmp_path: Path) -> None:
    """At strength 0 nothing is quantized: the loss of step 1 is the original model's."""
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        rows = torch.stack([row["input_ids"] for row in training_data(4)])
        expected = float(model(input_ids=rows, labels=rows).loss)
    recipe = Recipe(quant_warmup=2)
    trainer = make(source, tmp_path, recipe=recipe, train_dataset=training_data(4), max_steps=3)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[0]["loss"] == pytest.approx(expected, abs=1e-4)
    assert [entry["quant_strength"] for entry in logs] == [0, 0.5, 1]


def test_resuming_is_bit_exact(source: Path, tmp_path: Path) -> None:
    recipe = Recipe(logits_weight=1.0, quant_warmup=0.5, quant_warmup_schedule="cosine")
    options: dict[str, Any] = {
        "recipe": recipe, "teacher": source, "max_steps": 6, "gradient_accumulation_steps": 2,
        "train_dataset": training_data(24), "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    straight = load(source)
    make(source, tmp_path, model=straight, **options).train()
    # Within the warm-up, and after it.
    for step in (2, 4):
        resumed = load(source)
        trainer = make(source, tmp_path, model=resumed, **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_equal_states(state_of(straight), state_of(resumed))


def test_resuming_with_another_warmup_is_refused(source: Path, tmp_path: Path) -> None:
    def trainer(*callbacks: Any, **changes: Any) -> Trainer:
        args = arguments(tmp_path, save_strategy="steps", save_steps=2, **changes)
        data = training_data()
        return Trainer(load(source), args, train_dataset=data, callbacks=[*callbacks])

    trainer(QuantStrengthWarmup(0.5)).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(CheckpointError, match=r"0\.5, .*linear.*, got .*0\.5, .*cosine"):
        trainer(QuantStrengthWarmup(0.5, "cosine")).train(resume_from_checkpoint=checkpoint)
    # Trained for longer, the warm-up stays what it was.
    seen, again = Seen(), QuantStrengthWarmup(0.5)
    trainer(again, seen, max_steps=6).train(resume_from_checkpoint=checkpoint)
    assert seen.steps == [1, 1, 1, 1]
    trainer().train()
    with pytest.raises(CheckpointError, match=r"the checkpoint's, none, got"):
        trainer(QuantStrengthWarmup(3)).train(resume_from_checkpoint=checkpoint)
    ours = make(source, tmp_path, recipe=Recipe(quant_warmup=3))
    ours.recipe.save(checkpoint)
    other = make(source, tmp_path, recipe=Recipe(quant_warmup=4))
    with pytest.raises(CheckpointError, match=r"quant_warmup=4 \(was 3\)"):
        other.train(resume_from_checkpoint=checkpoint)


def test_evaluation_is_quantized_in_full(source: Path, tmp_path: Path) -> None:
    data = training_data(8)
    expected = Trainer(load(source), arguments(tmp_path), eval_dataset=data).evaluate()
    model = load(source)
    trainer = BitLabTrainer(
        model=model,
        args=arguments(tmp_path, eval_strategy="steps", eval_steps=1, learning_rate=0.0),
        train_dataset=data,
        eval_dataset=data,
        recipe=Recipe(quant_warmup=1.0),
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses == [pytest.approx(expected["eval_loss"])] * 4
    assert strengths_of(model) == {1.0}


def test_a_failed_run_ends_at_full_strength(source: Path, tmp_path: Path) -> None:
    model = load(source)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError):
        make(source, tmp_path, model=model, recipe=Recipe(quant_warmup=2)).train()
    assert strengths_of(model) == {1.0}


def test_bad_warmups(source: Path, tmp_path: Path) -> None:
    for length in (0, 0.0, -1, 1.5, True, "3", None):
        with pytest.raises(ArgumentError, match="length must be a number of steps"):
            QuantStrengthWarmup(length)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"schedule must be one of \('linear', 'cosine'\)"):
        QuantStrengthWarmup(3, "quadratic")
    longer = "length must be at most the run's 4 steps, got 5\nGive a share"
    with pytest.raises(ArgumentError, match=longer):
        make(source, tmp_path, recipe=Recipe(quant_warmup=5))
    # A run by epochs is as long as its data: 16 rows make 4 steps.
    by_epochs = make(
        source, tmp_path, recipe=Recipe(quant_warmup=5), max_steps=-1, num_train_epochs=1,
        train_dataset=training_data(16),
    )  # fmt: skip
    before = state_of(by_epochs.model)
    with pytest.raises(ArgumentError, match=longer):
        by_epochs.train()
    assert_equal_states(before, state_of(by_epochs.model))
    with pytest.raises(ArgumentError, match="hold no QuantStrengthWarmup beside"):
        make(source, tmp_path, recipe=Recipe(quant_warmup=2), callbacks=[QuantStrengthWarmup(2)])
    for fields in ({"quant_warmup": 1.5}, {"quant_warmup_schedule": "none"}):
        with pytest.raises(ConfigError, match=f"Recipe: {next(iter(fields))} must be"):
            Recipe.from_dict(fields)
    plain = AutoModelForCausalLM.from_pretrained(source)
    with pytest.raises(ArgumentError, match="must hold quantized layers, got none"):
        make(source, tmp_path, model=plain, recipe=Recipe(quant_warmup=2)).train()


def test_statistics_are_logged_unless_turned_off(source: Path, tmp_path: Path) -> None:
    for folder, options in (("on", {}), ("off", {"statistics": False}),
                            ("quiet", {"logging_strategy": "no"})):  # fmt: skip
        trainer = make(source, tmp_path / folder, recipe="plain", max_steps=2, **options)
        trainer.train()
        _, entries = read_statistics(tmp_path / folder)
        counted = [entry["step"] for entry in entries if "flipped" in entry]
        assert counted == ([1, 2] if folder == "on" else [])
        shown = ["ternary/flipped" in entry for entry in trainer.state.log_history]
        assert sum(shown) == len(counted)
    # One given replaces it; a float model has none.
    given = TernaryStatistics()
    for trainer in (
        make(source, tmp_path, callbacks=[given]),
        make(source, tmp_path, model=AutoModelForCausalLM.from_pretrained(source)),
    ):
        held = [c for c in trainer.callback_handler.callbacks if isinstance(c, TernaryStatistics)]
        assert held in ([given], [])
    trainer = make(source, tmp_path)
    given.attach(trainer)
    held = [c for c in trainer.callback_handler.callbacks if isinstance(c, TernaryStatistics)]
    assert held == [given]
