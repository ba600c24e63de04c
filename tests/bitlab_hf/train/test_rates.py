"""Learning rates of scales, norms and biases: the recipe's, on every schedule and resuming."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from bitcore.errors import ArgumentError, CheckpointError, ConfigError
from bitlab_hf import BitLabConfig
from bitlab_hf.train import BitLabTrainer, Recipe
from bitlab_hf.train.rates import check_shards, rates_of
from tests.bitlab_hf.models import make_float_model, training_data
from tests.bitlab_hf.test_trainer import assert_equal_states, state_of

RECIPE = Recipe(scale_rate=3.0, vector_rate=10.0)
RELATIVE = replace(RECIPE, rate_magnitude=0.1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_float_model("qwen2", tmp_path_factory.mktemp("float"))


def make(source: Path, folder: Path, recipe: Recipe = RECIPE, **changes: Any) -> BitLabTrainer:
    config = BitLabConfig(weight_quantizer="lsq", weight_granularity="per_group", group_size=64)
    values = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 4,
        "learning_rate": 1e-3, "lr_scheduler_type": "cosine", "warmup_steps": 1, "use_cpu": True,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "weight_decay": 0.1,
    }  # fmt: skip
    return BitLabTrainer(
        model=AutoModelForCausalLM.from_pretrained(source, quantization_config=config),
        args=TrainingArguments(**{**values, **changes}),
        train_dataset=training_data(),
        recipe=recipe,
    )


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_every_parameter_has_its_rate(source: Path, tmp_path: Path, optim: str) -> None:
    trainer = make(source, tmp_path, optim=optim)
    trainer.create_optimizer_and_scheduler(4)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    rates, decays = {}, {}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            name = names.pop(id(parameter))
            rates[name], decays[name] = group["initial_lr"], group["weight_decay"]
    assert not names
    kinds = {"learned_scale": 3e-3, "norm.weight": 1e-2, "bias": 1e-2}
    seen = set()
    for name, rate in rates.items():
        kind = next((kind for kind in kinds if name.endswith(kind)), "")
        seen.add(kind)
        assert rate == pytest.approx(kinds.get(kind, 1e-3)), name
        assert decays[name] == (0.0 if kind else 0.1), name
    assert seen == {"", *kinds}
    # What is logged is the run's.
    assert trainer.lr_scheduler.base_lrs[0] == pytest.approx(1e-3)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_rates_follow_magnitudes(source: Path, tmp_path: Path, optim: str) -> None:
    trainer = make(source, tmp_path, RELATIVE, optim=optim)
    model = trainer.model
    with torch.no_grad():
        model.model.norm.weight.fill_(40)
        model.model.layers[0].input_layernorm.weight.zero_()
    trainer.create_optimizer_and_scheduler(4)
    rates = {
        id(parameter): group["initial_lr"]
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }
    assert rates.keys() == {id(parameter) for parameter in model.parameters()}
    kinds = {"learned_scale": 3e-3, "norm.weight": 1e-2, "bias": 1e-2}
    for name, parameter in model.named_parameters():
        wanted = next((rate for kind, rate in kinds.items() if name.endswith(kind)), 1e-3)
        magnitude = parameter.abs().mean().item()
        if not name.endswith("bias") and magnitude:
            wanted *= magnitude / 0.1
        assert rates[id(parameter)] == pytest.approx(wanted, rel=1e-3), name
    assert rates[id(model.model.norm.weight)] == pytest.approx(4.0)
    assert trainer._get_learning_rate() == pytest.approx(
        trainer.lr_scheduler.get_last_lr()[0] * 1e-3 / trainer.lr_scheduler.base_lrs[0]
    )
    assert all(group["params"] for group in trainer.optimizer.param_groups)


def test_the_logged_rate_is_the_runs(source: Path, tmp_path: Path) -> None:
    logged = []
    for recipe in (Recipe(), RECIPE, RELATIVE):
        trainer = make(source, tmp_path, recipe, logging_steps=1, logging_strategy="steps")
        trainer.train()
        logged.append([one["learning_rate"] for one in trainer.state.log_history if "loss" in one])
    assert max(logged[0]) == pytest.approx(1e-3)
    assert logged[1] == pytest.approx(logged[0])
    assert logged[2] == pytest.approx(logged[0])


def test_parameters_that_others_hold_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = torch.nn.Linear(4, 4, bias=False)
    model.weight = torch.nn.Parameter(torch.empty(0))
    with caplog.at_level("WARNING", logger="bitlab"):
        assert rates_of(model, replace(RELATIVE, vector_rate=1.0)) == {id(model.weight): 1.0}
    assert "the magnitudes of 1 parameters are not known here" in caplog.text


def test_a_partitioned_matrix_is_no_vector() -> None:
    """DeepSpeed's ZeRO-3 says what shape a parameter has whose parts are elsewhere."""
    model = torch.nn.Linear(4, 4)
    for one, shape in ((model.weight, (4, 4)), (model.bias, (4,))):
        one.data = torch.empty(0)
        one.ds_shape = torch.Size(shape)
    assert rates_of(model, RECIPE) == {id(model.weight): 1.0, id(model.bias): 10.0}


def test_flat_shards_are_refused() -> None:
    """Of FSDP's first version, where a shard of a matrix has one dimension, as a norm has."""
    flat, whole = SimpleNamespace(fsdp_version=1), SimpleNamespace(fsdp_version=2)
    for recipe in (RECIPE, replace(Recipe(), rate_magnitude=0.1)):
        with pytest.raises(ArgumentError, match="fsdp must be of version 2"):
            check_shards(recipe, flat)
        check_shards(recipe, whole)
        check_shards(recipe, None)
    check_shards(Recipe(), flat)


def test_adapters_do_not_follow_magnitudes(source: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    trainer = make(source, tmp_path, RELATIVE)
    adapters = peft.LoraConfig(target_modules=["q_proj"], r=2)
    trainer.model.add_adapter(adapters)
    trained = [one for one in trainer.model.parameters() if one.requires_grad]
    rates = rates_of(trainer.model, RELATIVE)
    assert len(trained) == 4
    assert {rates[id(one)] for one in trained} == {1.0}


@pytest.mark.parametrize("recipe", [RECIPE, RELATIVE])
def test_the_schedule_and_resuming_hold(source: Path, tmp_path: Path, recipe: Recipe) -> None:
    whole = make(source, tmp_path / "whole", recipe)
    whole.train()
    assert all(group["lr"] == pytest.approx(0, abs=1e-9) for group in whole.optimizer.param_groups)
    make(source, tmp_path / "cut", recipe, save_strategy="steps", save_steps=2).train()
    again = make(source, tmp_path / "cut", recipe, save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "cut/checkpoint-2"))
    assert_equal_states(state_of(again.model), state_of(whole.model))
    other = make(source, tmp_path / "cut", Recipe(scale_rate=2.0, vector_rate=10.0))
    with pytest.raises(CheckpointError, match=r"scale_rate=2\.0 \(was 3\.0\)"):
        other.train(resume_from_checkpoint=str(tmp_path / "cut/checkpoint-2"))


def test_an_optimizer_that_is_given_stays(source: Path, tmp_path: Path) -> None:
    trainer = make(source, tmp_path)
    given = torch.optim.SGD(trainer.model.parameters(), lr=0.5)
    trainer.optimizer = given
    trainer.create_optimizer()
    assert trainer.optimizer is given
    assert len(given.param_groups) == 1


@pytest.mark.parametrize("value", [0, -1.0, math.nan, "fast", True])
@pytest.mark.parametrize("field", ["scale_rate", "vector_rate"])
def test_rates_are_checked(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"Recipe: {field} must be a finite number above 0"):
        Recipe(**{field: value})


@pytest.mark.parametrize("value", [-1.0, math.inf, "small", True])
def test_the_magnitude_is_checked(value: Any) -> None:
    with pytest.raises(ConfigError, match="Recipe: rate_magnitude must be a finite number of at"):
        Recipe(rate_magnitude=value)


def test_a_recipe_in_words() -> None:
    recipe = Recipe(0.0, 1.0, calibration_samples=8, scale_rate=3.0, vector_rate=10.0)
    assert recipe.in_words(2e-4) == (
        "calibrated on 8 examples, learns from the teacher's next tokens, rates 0.0002, "
        "scales 0.0006, norms and biases 0.002"
    )
    assert (
        replace(recipe, rate_magnitude=0.15)
        .in_words(2e-4)
        .endswith("norms and biases 0.002 for a mean magnitude of 0.15, others by theirs")
    )
