"""Decoder layers that become ternary in stages, in the midst of training."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from bitcore.errors import ArgumentError, CheckpointError, ConfigError
from bitlab_hf import BitLabConfig, deploy
from bitlab_hf.model.tree import quantized_layers
from bitlab_hf.train import Recipe, calibrate
from bitlab_hf.train.stages import stage_blocks, stage_starts
from bitlayers import set_quant_strength
from tests.bitlab_hf.models import make_float_model, taught, token_ids, training_data
from tests.bitlab_hf.test_trainer import assert_equal_states, state_of
from tests.bitlab_hf.train.test_trainer import load, make

STAGED = Recipe(calibration_samples=8, stages=2, stage_share=0.5)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows its text: rounding costs it a lot."""
    return taught(make_float_model("llama", tmp_path_factory.mktemp("float")))


def strengths(model: Any) -> list[float]:
    """Returns the strength of each decoder layer, all of its layers having the same."""
    found = []
    for block in model.model.layers:
        inside = {one.module.quant_strength for one in quantized_layers(block)}
        assert len(inside) == 1
        found.append(inside.pop())
    return found


class Watch(TrainerCallback):
    """Notes the strengths of each step; ends with an error after some step."""

    def __init__(self, last: int | None = None) -> None:
        self.seen: list[list[float]] = []
        self.last = last

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(strengths(kwargs["model"]))
        if state.global_step == self.last:
            raise KeyboardInterrupt


def test_when_and_which() -> None:
    assert stage_starts(1, 0.8, 100) == [0]
    assert stage_starts(5, 0.8, 100) == [0, 20, 40, 60, 80]
    assert stage_starts(3, 0.5, 4) == [0, 1, 2]
    assert stage_blocks(4, 30) == [range(8), range(8, 15), range(15, 22), range(22, 30)]
    assert stage_blocks(1, 2) == [range(2)]


def test_stages_of_a_run(source: Path, tmp_path: Path) -> None:
    watch, seen = Watch(), list[tuple[int, int]]()
    trainer = make(source, tmp_path, recipe=STAGED, max_steps=6, callbacks=[watch])
    trainer.calibration_progress = lambda done, total, _name: seen.append((done, total))
    trainer.train()
    assert watch.seen == [[1, 0]] * 3 + [[1, 1]] * 3
    assert strengths(trainer.model) == [1, 1]
    assert seen == [(done, 14) for done in range(1, 15)]
    names = [layer.name for layer in trainer.calibration.layers]
    assert names == [found.names[0] for found in quantized_layers(trainer.model)]
    ids = token_ids()
    with torch.no_grad():
        latent = trainer.model.eval()(input_ids=ids).logits
        assert torch.equal(deploy(trainer.model)(input_ids=ids).logits, latent)


def test_evaluation_waits_for_the_last_stage(source: Path, tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": training_data()[:4]}
    trainer = make(source, tmp_path, recipe=STAGED, max_steps=6, **options)
    trainer.train()
    evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluated == [4, 5, 6]


def test_more_stages_than_layers_or_steps(source: Path, tmp_path: Path) -> None:
    many = Recipe(calibration_samples=8, stages=9)
    trainer = make(source, tmp_path / "layers", recipe=many, max_steps=4)
    trainer.train()
    assert len(trainer.calibration.layers) == 14
    # One step, one stage: what is calibrated before it is what calibrate makes of the whole model.
    once = make(source, tmp_path / "steps", recipe=many, max_steps=1, learning_rate=0.0)
    once.train()
    order = torch.randperm(32, generator=torch.Generator().manual_seed(once.args.seed))
    data, model = training_data(), load(source)
    calibrate(model, [data[index] for index in order[-8:].tolist()])
    assert_equal_states(state_of(once.model), state_of(model))


SAVING = {"recipe": STAGED, "max_steps": 6, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def straight(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What is trained in one go."""
    trainer = make(source, tmp_path_factory.mktemp("straight"), **SAVING)
    trainer.train()
    return state_of(trainer.model)


@pytest.mark.parametrize("killed_at", ["a step", "a stage", "the first stage"])
def test_resumed_is_straight(
    source: Path, straight: dict[str, torch.Tensor], tmp_path: Path, killed_at: str
) -> None:
    watch = Watch(last=4 if killed_at == "a step" else None)
    killed = make(source, tmp_path / "killed", callbacks=[watch], **SAVING)

    def kill(done: int, _total: int, _name: str) -> None:
        if done == {"a stage": 10, "the first stage": 3}.get(killed_at):
            raise KeyboardInterrupt

    killed.calibration_progress = kill
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    assert strengths(killed.model) == [1, 1]
    folder = tmp_path / "killed"
    kept = len(list((folder / "calibration").glob("*.safetensors")))
    assert kept == {"a step": 14, "a stage": 10, "the first stage": 3}[killed_at]
    watch = Watch()
    again = make(source, folder, callbacks=[watch], **SAVING)
    again.train(resume_from_checkpoint=True)
    assert_equal_states(straight, state_of(again.model))
    done = {"a step": 3, "a stage": 3, "the first stage": 0}[killed_at]
    assert watch.seen == ([[1, 0]] * 3 + [[1, 1]] * 3)[done:]
    assert not (folder / "calibration").exists()


def test_resumed_with_other_stages(source: Path, tmp_path: Path) -> None:
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    make(source, tmp_path, recipe=STAGED, **options).train()
    other = Recipe(calibration_samples=8, stages=2, stage_share=0.25)
    trainer = make(source, tmp_path, recipe=other, **options)
    with pytest.raises(CheckpointError, match="stage_share"):
        trainer.train(resume_from_checkpoint=True)


def test_weights_that_are_ternary_already(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What was trained ternary is worth less in full precision: nothing is staged then."""
    learned = BitLabConfig(weight_quantizer="lsq")
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=learned)
    calibrate(model, training_data()[:8])
    with torch.no_grad():
        for found in quantized_layers(model):
            weight, scale = found.module.weight, found.module.learned_scale
            # Further from their thresholds: the codes stay, as floats they mean nothing.
            factors = 1 + 9 * torch.rand(weight.shape)
            weight.mul_(torch.where(weight.abs() > scale / 2, factors, 1.0))
    watch = Watch()
    with caplog.at_level(logging.WARNING, "bitlab"):
        make(source, tmp_path, model=model, recipe=STAGED, max_steps=2, callbacks=[watch]).train()
    assert watch.seen == [[1, 1]] * 2
    said = re.search(r"8 examples is ([\d.]+) in full precision and ([\d.]+) ternary", caplog.text)
    assert said is not None
    assert float(said[1]) > 1.5 * float(said[2])


def test_blocks_of_calibrate(source: Path) -> None:
    """All blocks in one go are the whole model; one after another see what is float and ternary."""
    whole, staged, both = load(source), load(source), load(source)
    report = calibrate(whole, training_data()[:8])
    set_quant_strength(both, 0.0)
    assert calibrate(both, training_data()[:8], blocks=range(2)).layers == report.layers
    assert_equal_states(state_of(whole), state_of(both))
    set_quant_strength(staged, 0.0)
    first = calibrate(staged, training_data()[:8], blocks=range(1))
    assert strengths(staged) == [1, 0]
    assert first.layers == report.layers[:7]
    second = calibrate(staged, training_data()[:8], blocks=range(1, 2))
    assert [layer.name for layer in second.layers] == [layer.name for layer in report.layers[7:]]
    assert strengths(staged) == [1, 1]


@pytest.mark.parametrize("blocks", [range(2, 3), range(1, 1), range(-1, 1), range(0, 2, 2)])
def test_blocks_that_are_not_there(source: Path, blocks: range) -> None:
    model = load(source)
    before = state_of(model)
    with pytest.raises(ArgumentError, match="blocks must be of the 2 decoder layers"):
        calibrate(model, training_data()[:8], blocks=blocks)
    assert_equal_states(state_of(model), before)


def test_blocks_that_do_not_run_one_after_another(source: Path) -> None:
    model = load(source)
    layers = model.model.layers
    # Each block is given what the one before gave, and something on top.
    layers[0].register_forward_hook(lambda _module, _args, output: output + 1)
    layers[1].register_forward_pre_hook(lambda _module, args: (args[0] * 2, *args[1:]))
    before = state_of(model)
    with pytest.raises(ArgumentError, match="do not run one after another"):
        calibrate(model, training_data()[:8], blocks=range(1, 2))
    assert_equal_states(state_of(model), before)


def test_a_recipe_in_words() -> None:
    assert STAGED.in_words(1e-3) == (
        "calibrated on 8 examples in 2 stages, learns from labels, rates 0.001, scales 0.001, "
        "norms and biases 0.001"
    )
    at_once = Recipe(0.0, 1.0, calibration_samples=8, scale_rate=3.0, vector_rate=10.0)
    assert at_once.in_words(2e-4) == (
        "calibrated on 8 examples at once, learns from the teacher's next tokens, rates 0.0002, "
        "scales 0.0006, norms and biases 0.002"
    )
    assert (
        replace(at_once, rate_magnitude=0.15)
        .in_words(2e-4)
        .endswith("norms and biases 0.002 for a mean magnitude of 0.15, others by theirs")
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stages": 0}, "stages must be an int of at least 1, got 0"),
        ({"stages": 2}, "stages must be 1 without calibration_samples, got 2"),
        ({"stages": 2, "calibration_samples": 8, "quant_warmup": 0.5}, "1 beside quant_warmup"),
        ({"stage_share": 1.0}, r"stage_share must be a number from 0, below 1, got 1\.0"),
    ],
)
def test_fields_of_the_recipe(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**fields)
