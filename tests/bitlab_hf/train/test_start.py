"""The calibrated start: what it does to a model, and where it is left out or undone."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import IterableDataset
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from bitcore.quantize import group_scale
from bitlab_hf import BitLabConfig, deploy
from bitlab_hf.model.tree import quantized_layers
from bitlab_hf.train import RECIPES, Recipe, TernaryStatistics, calibrate
from bitlab_hf.train import start as module
from bitlab_hf.train.statistics_files import read_statistics
from tests.bitlab_hf.experts import make_moe
from tests.bitlab_hf.models import make_float_model, taught, token_ids, training_data
from tests.bitlab_hf.test_trainer import assert_equal_states, state_of
from tests.bitlab_hf.train.test_trainer import load, make

SAMPLES = 20


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows its text: rounding costs it a lot."""
    return taught(make_float_model("llama", tmp_path_factory.mktemp("float")))


def start(source: Path, folder: Path, **options: Any) -> Any:
    """Trains without changing a weight: what is left is the start."""
    options.setdefault("recipe", Recipe(calibration_samples=SAMPLES))
    trainer = make(source, folder, learning_rate=0.0, max_steps=1, **options)
    trainer.train()
    return trainer


def loss(model: Any) -> float:
    ids = torch.stack([row["input_ids"] for row in training_data()])
    with torch.no_grad():
        return float(model.eval()(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize("bars", [True, False])
def test_it_is_calibrate_on_the_training_data(source: Path, tmp_path: Path, bars: bool) -> None:
    if not bars:
        transformers_logging.disable_progress_bar()
    try:
        trainer = start(source, tmp_path, disable_tqdm=False)
    finally:
        transformers_logging.enable_progress_bar()
    assert trainer.calibration.samples == SAMPLES
    order = torch.randperm(32, generator=torch.Generator().manual_seed(trainer.args.seed))
    data = training_data()
    calibrated = load(source)
    report = calibrate(calibrated, [data[index] for index in order[-SAMPLES:].tolist()])
    assert report.layers == trainer.calibration.layers
    assert_equal_states(state_of(trainer.model), state_of(calibrated))
    floating = loss(AutoModelForCausalLM.from_pretrained(source))
    rounded, ours = loss(load(source)), loss(trainer.model)
    assert ours - floating < 0.6 * (rounded - floating)


@pytest.mark.parametrize("data_seed", [None, 5])
def test_training_comes_to_its_samples_last(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_seed: int | None
) -> None:
    """The first steps learn from what the layers have not been fitted to."""
    fitted: list[Any] = []
    module: Any = sys.modules["bitlab_hf.train.start"]

    def record(model: Any, samples: list[Any], *given: Any, **named: Any) -> Any:
        fitted.extend(tuple(one["input_ids"].tolist()) for one in samples)
        return calibrate(model, samples, *given, **named)

    monkeypatch.setattr(module, "calibrate", record)
    recipe = Recipe(calibration_samples=SAMPLES)
    rest = len(training_data()) - SAMPLES
    trainer = make(
        source, tmp_path, recipe=recipe, per_device_train_batch_size=1, max_steps=rest + 2,
        gradient_accumulation_steps=1, data_seed=data_seed,
    )  # fmt: skip
    trained: list[Any] = []

    def note(model: Any, _: Any, given: dict[str, Any]) -> None:
        if model.training:
            trained.extend(map(tuple, given["input_ids"].tolist()))

    trainer.model.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    assert len(set(fitted)) == SAMPLES
    assert not set(fitted) & set(trained[:rest])
    assert set(trained[rest:]) <= set(fitted)


def test_the_default_recipe_asks_for_it(source: Path, tmp_path: Path) -> None:
    assert RECIPES["default"].calibration_samples > 0
    seen: list[tuple[int, int, str]] = []
    trainer = make(source, tmp_path, recipe="default", teacher=source)
    trainer.calibration_progress = lambda *step: seen.append(step)
    trainer.train()
    assert trainer.calibration.samples == 32
    assert [done for done, _, _ in seen] == list(range(1, 15))
    assert {total for _, total, _ in seen} == {14}


def kill(done: int, _all: int, _name: str) -> None:
    if done == 10:
        raise KeyboardInterrupt


def test_a_killed_one_goes_on(source: Path, tmp_path: Path) -> None:
    straight = start(source, tmp_path / "straight")
    assert not (tmp_path / "straight" / "calibration").exists()

    options = {"recipe": Recipe(calibration_samples=SAMPLES), "learning_rate": 0.0, "max_steps": 1}
    killed = make(source, tmp_path / "killed", **options)
    killed.calibration_progress = kill
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    folder = tmp_path / "killed" / "calibration"
    found = {file: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}
    assert len(found) == 10
    again = make(source, tmp_path / "killed", **options)
    again.calibration_progress = lambda done, _all, _name: times.append(kept_since(found))
    times: list[bool] = []
    again.train()
    assert times == [True] * 14
    assert not folder.exists()
    assert_equal_states(state_of(straight.model), state_of(again.model))


def kept_since(found: dict[Path, int]) -> bool:
    return all(file.stat().st_mtime_ns == time for file, time in found.items())


def test_one_of_other_settings_begins_anew(source: Path, tmp_path: Path, caplog: Any) -> None:
    other = make(source, tmp_path, recipe=Recipe(calibration_samples=4))
    other.calibration_progress = kill
    with pytest.raises(KeyboardInterrupt):
        other.train()
    assert list((tmp_path / "calibration").glob("*.safetensors"))
    with caplog.at_level(logging.WARNING, "bitlab"):
        trainer = start(source, tmp_path)
    assert trainer.calibration.samples == SAMPLES
    (said,) = [one for one in caplog.messages if "begins anew" in one]
    assert "got one with samples" in said
    # It is removed by the Trainer itself.
    assert "Name another folder" not in said


def test_one_of_another_model_begins_anew(source: Path, tmp_path: Path, caplog: Any) -> None:
    """Another embedding: every layer's own weight is the same."""
    options: dict[str, Any] = {
        "recipe": Recipe(calibration_samples=SAMPLES), "learning_rate": 0.0, "max_steps": 1,
    }  # fmt: skip
    killed = make(source, tmp_path / "killed", **options)
    killed.calibration_progress = kill
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    states = []
    for folder in ("straight", "killed"):
        model = load(source)
        model.model.embed_tokens.weight.data *= 1.5
        caplog.clear()
        with caplog.at_level(logging.WARNING, "bitlab"):
            trainer = make(source, tmp_path / folder, model=model, **options)
            trainer.train()
        assert ("calibration begins anew" in caplog.text) == (folder == "killed")
        states.append(state_of(trainer.model))
    assert_equal_states(*states)


def report_of(folder: Path) -> Any:
    return json.loads((folder / "calibration_report.json").read_text())


def test_its_report_is_written(source: Path, tmp_path: Path) -> None:
    trainer = start(source, tmp_path)
    report = report_of(tmp_path)
    found = trainer.calibration.layers
    assert report["layers"] == [asdict(one) for one in found]
    assert report["mean_error"] == pytest.approx(sum(one.error for one in found) / 14)
    assert 0 < report["mean_error"] < 1
    assert report["rounded"] == []
    # A run without calibration leaves none of an earlier run's.
    start(source, tmp_path, recipe="plain")
    assert not (tmp_path / "calibration_report.json").exists()


def test_another_process_writes_no_report(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(source, tmp_path, recipe=Recipe(calibration_samples=SAMPLES), max_steps=1)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.train()
    assert trainer.calibration is not None
    assert not (tmp_path / "calibration_report.json").exists()


def test_experts_that_keep_their_rounding(tmp_path: Path, caplog: Any) -> None:
    source = taught(make_moe("gpt_oss", tmp_path / "source"))
    model = load(source)
    # No token reaches it.
    model.model.layers[1].mlp.router.bias.data[2] = -1e9
    with caplog.at_level(logging.WARNING, "bitlab"):
        trainer = start(source, tmp_path / "run", model=model)
    assert "model.layers.1.mlp.experts.2" in trainer.calibration.rounded
    count = len(trainer.calibration.rounded)
    assert f"{count} experts keep their rounding, such as model.layers." in caplog.text
    assert report_of(tmp_path / "run")["rounded"] == list(trainer.calibration.rounded)


@pytest.mark.parametrize("quantizer", ["absmean", "twn", "lsq"])
def test_groups_in_two_levels_to_the_end(source: Path, tmp_path: Path, quantizer: str) -> None:
    """Calibrated, distilled, watched and deployed: one forward, and scales that train."""
    config = BitLabConfig(weight_granularity="per_group", group_size=64, weight_quantizer=quantizer)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    trainer = make(source, tmp_path, model=model, recipe="default", teacher=source, logging_steps=1)
    TernaryStatistics(histograms=2).attach(trainer)
    trainer.train()
    assert trainer.calibration is not None
    layers = quantized_layers(model)
    seen = [entry["scale"] for entry in read_statistics(tmp_path)[1] if "scale" in entry]
    assert seen[0] != seen[-1]
    ids = token_ids()
    with torch.no_grad():
        trained = model.train()(input_ids=ids).logits
        scales = [layer.module.eval().packed()[1:] for layer in layers]
        assert seen[-1] == pytest.approx(
            [float(group_scale(*one).mean()) for one in scales], rel=1e-5
        )
        assert torch.equal(model.eval()(input_ids=ids).logits, trained)
        assert torch.equal(deploy(model)(input_ids=ids).logits, trained)


def test_training_draws_the_same_batches_after_it(source: Path, tmp_path: Path) -> None:
    """Undone, nothing is left of it: the run is bit-equal to one without."""
    model = load(source)
    plain = make(source, tmp_path, model=model, recipe="plain")
    plain.train()
    other = make(source, tmp_path, recipe=Recipe(calibration_samples=SAMPLES))
    other._calibrate_model = other._calibrate
    other._calibrate = lambda model: keep_state(other, model)
    other.train()
    assert_equal_states(state_of(model), state_of(other.model))


def keep_state(trainer: Any, model: Any) -> None:
    """Calibrates, and puts the weights back."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert trainer._calibrate_model(model) is not None
    model.load_state_dict(before)


def mistaken(source: Path, folder: Path) -> Path:
    """Makes a model that knows its text say the opposite: the nearer to it, the worse."""
    model: Any = AutoModelForCausalLM.from_pretrained(source)
    model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight.detach())
    model.config.tie_word_embeddings = False
    model.save_pretrained(folder)
    return folder


def test_it_is_undone_where_the_loss_rises(source: Path, tmp_path: Path, caplog: Any) -> None:
    source = mistaken(source, tmp_path / "mistaken")
    with caplog.at_level(logging.WARNING, "bitlab"):
        trainer = start(source, tmp_path)
    assert trainer.calibration is None
    assert "took the loss of 20 examples from" in caplog.text
    assert_equal_states(state_of(trainer.model), state_of(load(source)))


def test_a_part_of_the_examples_tells_whether_it_was_of_use(
    source: Path, tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 20 examples in batches of 8; all of them are calibrated on."""
    compared: list[int] = []
    own = module._loss

    def loss(model: Any, batches: list[Any], *args: Any) -> float:
        compared.append(sum(len(batch["input_ids"]) for batch in batches))
        return own(model, batches, *args)

    monkeypatch.setattr(module, "_loss", loss)
    monkeypatch.setattr(module, "_COMPARED", 2)
    trainer = start(source, tmp_path / "kept")
    assert trainer.calibration.samples == 20
    with caplog.at_level(logging.WARNING, "bitlab"):
        start(mistaken(source, tmp_path / "mistaken"), tmp_path / "undone")
    assert "took the loss of 16 examples from" in caplog.text
    assert compared == [16, 16, 16, 16]


def test_experts_are_calibrated_and_undone_with_the_rest(tmp_path: Path, caplog: Any) -> None:
    knowing = taught(make_moe("qwen3_moe", tmp_path / "source"))
    source = mistaken(knowing, tmp_path / "mistaken")
    with caplog.at_level(logging.WARNING, "bitlab"):
        trainer = start(source, tmp_path / "undone")
    assert "took the loss of 20 examples from" in caplog.text
    assert_equal_states(state_of(trainer.model), state_of(load(source)))
    source = knowing
    for recipe, total in ((Recipe(calibration_samples=SAMPLES), 28), ("default", 28)):
        seen: list[tuple[int, int, str]] = []
        trainer = make(
            source, tmp_path / "taught", recipe=recipe, teacher=source, learning_rate=0.0,
            max_steps=1,
        )  # fmt: skip
        trainer.calibration_progress = lambda *step, seen=seen: seen.append(step)
        trainer.train()
        assert [done for done, _, _ in seen] == list(range(1, total + 1))
        assert {all_ for _, all_, _ in seen} == {total}
        floating = loss(AutoModelForCausalLM.from_pretrained(source))
        rounded, ours = loss(load(source)), loss(trainer.model)
        assert ours - floating < 0.6 * (rounded - floating)


def test_a_resumed_run_goes_on(source: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"recipe": "default", "teacher": source, "max_steps": 4}
    whole = make(source, tmp_path / "a", **options, save_strategy="steps", save_steps=2)
    whole.train()
    again = make(source, tmp_path / "b", **options)
    again.train(str(tmp_path / "a" / "checkpoint-2"))
    assert whole.calibration is not None
    assert again.calibration is None
    assert_equal_states(state_of(whole.model), state_of(again.model))


def frozen(source: Path) -> Any:
    model = load(source)
    model.model.layers[0].requires_grad_(False)
    return model


def adapter(source: Path) -> Any:
    return get_peft_model(load(source), LoraConfig(r=2, target_modules="all-linear"))


@pytest.mark.parametrize("kind", [frozen, adapter])
def test_frozen_weights_stay(source: Path, tmp_path: Path, kind: Any) -> None:
    model = kind(source)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = start(source, tmp_path, model=model)
    assert trainer.calibration is None
    assert_equal_states(before, state_of(model))


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Examples without a length."""

    def __iter__(self) -> Any:
        return iter(training_data())


def test_a_stream_gives_its_first_examples(source: Path, tmp_path: Path) -> None:
    trainer = start(source, tmp_path, train_dataset=Stream())
    calibrated = load(source)
    calibrate(calibrated, training_data()[:SAMPLES])
    assert_equal_states(state_of(trainer.model), state_of(calibrated))


def test_what_cannot_be_calibrated_is_trained_as_it_is(
    source: Path, tmp_path: Path, caplog: Any
) -> None:
    model = load(source)
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with caplog.at_level(logging.WARNING, "bitlab"):
        trainer = start(source, tmp_path, model=model)
    assert trainer.calibration is None
    assert "must belong to one module" in caplog.text
