"""A teacher that learns before it teaches."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback

from bitcore.errors import ArgumentError, CheckpointError, ConfigError
from bitlab_hf.train import RECIPES, Recipe, precompute_logits
from tests.bitlab_hf.models import make_float_model, taught, training_data
from tests.bitlab_hf.test_trainer import assert_equal_states, state_of
from tests.bitlab_hf.train.test_trainer import load, make

TAUGHT = Recipe(0.0, 1.0, teacher_share=2.0, teacher_rate=3.0, calibration_samples=8)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows nothing of its text."""
    return make_float_model("llama", tmp_path_factory.mktemp("float"))


def read(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def loss(model: Any) -> float:
    ids = torch.stack([row["input_ids"] for row in training_data()])
    with torch.no_grad():
        return float(model.eval()(input_ids=ids, labels=ids).loss)


class Kill(TrainerCallback):
    """Ends a training after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_it_is_a_run_of_full_precision_first(source: Path, tmp_path: Path) -> None:
    """The same as fine-tuning the float model, and making that ternary by itself."""
    options: dict[str, Any] = {
        "max_steps": 3, "learning_rate": 1e-3, "eval_dataset": training_data(),
    }  # fmt: skip
    make(source, tmp_path / "in-one", recipe=TAUGHT, teacher=read(source), **options).train()
    tuned = read(source)
    more = {**options, "max_steps": 6, "learning_rate": 3e-3}
    make(source, tmp_path / "tuned", model=tuned, recipe="plain", **more).train()
    found = read(tmp_path / "in-one" / "teacher" / "model")
    assert_equal_states(state_of(found), state_of(tuned))
    assert loss(found) < loss(read(source)) - 0.01
    tuned.save_pretrained(tmp_path / "start")
    plain = Recipe(0.0, 1.0, calibration_samples=8)
    after = make(tmp_path / "start", tmp_path / "after", recipe=plain, teacher=tuned, **options)
    after.train()
    in_one = make(source, tmp_path / "in-one", recipe=TAUGHT, teacher=read(source), **options)
    in_one.train()
    assert_equal_states(state_of(in_one.model), state_of(after.model))
    assert_equal_states(state_of(in_one._teacher), state_of(tuned))
    assert not any(parameter.requires_grad for parameter in in_one._teacher.parameters())


SAVING: dict[str, Any] = {
    "recipe": TAUGHT, "max_steps": 4, "save_strategy": "steps", "save_steps": 1,
    "eval_dataset": training_data(),
}  # fmt: skip


@pytest.fixture(scope="module")
def straight(source: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """The model and the teacher that are trained in one go."""
    folder = tmp_path_factory.mktemp("straight")
    trainer = make(source, folder, teacher=read(source), **SAVING)
    trainer.train()
    return [state_of(one) for one in (trainer.model, trainer._teacher)]


@pytest.mark.parametrize("killed_at", ["the teacher", "calibration", "a step"])
def test_resumed_is_straight(
    source: Path, straight: list[dict[str, Tensor]], tmp_path: Path, killed_at: str
) -> None:
    calls = [Kill(2)] if killed_at == "a step" else []
    folder = tmp_path / "killed"
    killed = make(source, folder, teacher=read(source), callbacks=calls, **SAVING)
    if killed_at == "the teacher":
        killed.teacher_callbacks = [Kill(5)]

    def kill(done: int, _total: int, _name: str) -> None:
        if done == 3 and killed_at == "calibration":
            raise KeyboardInterrupt

    killed.calibration_progress = kill
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    left = [one.name for one in (folder / "teacher").glob("checkpoint-*")]
    assert left == (["checkpoint-4"] if killed_at == "the teacher" else [])
    again = make(source, folder, teacher=read(source), **SAVING)
    again.train(resume_from_checkpoint=True)
    for one, wanted in zip((again.model, again._teacher), straight, strict=True):
        assert_equal_states(wanted, state_of(one))


def test_text_that_teaches_nothing(source: Path, tmp_path: Path, caplog: Any) -> None:
    """Told by the evaluation's examples, or by some of the training data, which it leaves out."""
    options: dict[str, Any] = {"max_steps": 2, "learning_rate": 1e-3}
    noise = [{"input_ids": row["input_ids"], "labels": row["input_ids"] * 0} for row in
             training_data(16)]  # fmt: skip
    trainer = make(source, tmp_path / "kept", recipe=TAUGHT, teacher=read(source),
                   eval_dataset=training_data(), train_dataset=noise, **options)  # fmt: skip
    trainer.train()
    said = re.search(r"stays as it was: .* from ([\d.]+) to ([\d.]+)", caplog.text)
    assert said is not None
    assert float(said[1]) < float(said[2])
    assert_equal_states(state_of(trainer._teacher), state_of(read(source)))
    plain = make(source, tmp_path / "plain", recipe=Recipe(0.0, 1.0, calibration_samples=8),
                 teacher=read(source), train_dataset=noise, **options)  # fmt: skip
    plain.train()
    assert_equal_states(state_of(trainer.model), state_of(plain.model))


@pytest.mark.parametrize("kind", ["list", "datasets", "stream", "few"])
def test_what_is_held_out(source: Path, tmp_path: Path, kind: str) -> None:
    rows = training_data(19 if kind == "few" else 45)
    data: Any = rows
    if kind == "datasets":
        columns = {key: [row[key].tolist() for row in rows] for key in rows[0]}
        data = Dataset.from_dict({**columns, "title": ["none"] * len(rows)})
    if kind == "stream":
        data = Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in rows])
        data = data.to_iterable_dataset()
    trainer = make(source, tmp_path, recipe=TAUGHT, teacher=read(source), train_dataset=data,
                   max_steps=1)  # fmt: skip
    learned, held = trainer._split()
    trainer.train()
    if kind in ("stream", "few"):
        assert held is None
        return
    assert (len(learned), len(held)) == (43, 2)
    for index, at in ((0, 19), (1, 39)):
        assert torch.as_tensor(held[index]["input_ids"]).equal(rows[at]["input_ids"])


def test_another_training_teaches_anew(source: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "max_steps": 2, "learning_rate": 1e-3, "recipe": TAUGHT, "eval_dataset": training_data(),
    }  # fmt: skip
    make(source, tmp_path, teacher=read(source), **options).train()
    model = tmp_path / "teacher" / "model"
    first, other = state_of(read(model)), training_data(40)[8:]

    def stop(_done: int, _total: int, _name: str) -> None:
        raise KeyboardInterrupt

    def again(**changes: Any) -> dict[str, Tensor]:
        trainer = make(source, tmp_path, teacher=read(source), **{**options, **changes})
        # The teacher has been taught once the model is calibrated.
        trainer.calibration_progress = stop
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        return state_of(read(model))

    assert_equal_states(again(), first)
    masked = [{**row, "labels": row["labels"].index_fill(0, torch.arange(8), -100)} for row in
              training_data()]  # fmt: skip
    for changes in (
        {"train_dataset": other},
        {"train_dataset": masked},
        {"learning_rate": 2e-3},
        {"max_steps": 3},
        {"adam_epsilon": 1e-3},
    ):
        found = again(**changes)
        assert any(not torch.equal(found[name], first[name]) for name in first)
    for damaged in ("{", "3"):
        (tmp_path / "teacher" / "taught.json").write_text(damaged)
        assert_equal_states(again(), first)


def test_the_same_training_elsewhere_goes_on(source: Path, tmp_path: Path) -> None:
    """With other threads, another dtype of the same teacher, examples that lie elsewhere."""
    options: dict[str, Any] = {"max_steps": 1, "recipe": TAUGHT, "eval_dataset": training_data()}
    coarse = read(source).to(torch.bfloat16)
    facts = []
    for threads, teacher in ((1, coarse), (2, copy.deepcopy(coarse).float())):
        torch.set_num_threads(threads)
        rows = [{**row, "image": object()} for row in training_data()]
        trainer = make(source, tmp_path, teacher=teacher, train_dataset=rows, **options)
        facts.append(trainer._facts(teacher))
    assert facts[0] == facts[1]
    for kind in (np.int64, np.asarray, str, np.str_):
        texts = set()
        for one in (1, 2):
            rows = [{"input_ids": [3, 4], "labels": [kind(one)], "more": np.array(["x", None])}]
            trainer.train_dataset = rows
            texts.add(trainer._facts(teacher)["text"])
        assert len(texts) == 2, kind


def test_a_teacher_of_its_own_kind(source: Path, tmp_path: Path) -> None:
    """A model with other weights learns from the teacher, and keeps its start."""
    other = taught(make_float_model("llama", tmp_path / "other"))
    recipe = Recipe(0.0, 1.0, teacher_share=1.0)
    trainer = make(other, tmp_path / "run", recipe=recipe, teacher=read(source), max_steps=1,
                   learning_rate=1e-3)  # fmt: skip
    trainer.train()
    own, theirs = (read(one).lm_head.weight for one in (other, source))
    assert (own - theirs).abs().max() > 0.05
    assert (trainer.model.lm_head.weight - own).abs().max() < 0.002
    adapted = get_peft_model(load(source), LoraConfig(target_modules=["q_proj"]))
    trainer = make(source, tmp_path / "adapter", model=adapted, recipe=recipe,
                   teacher=read(source), max_steps=1)  # fmt: skip
    before = adapted.base_model.model.lm_head.weight.clone()
    trainer.train()
    assert torch.equal(adapted.base_model.model.lm_head.weight, before)


def test_a_teacher_in_half_precision(source: Path, tmp_path: Path) -> None:
    """It learns in float32, and teaches in its own dtype."""
    teacher = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    trainer = make(source, tmp_path, recipe=TAUGHT, teacher=teacher, max_steps=1,
                   eval_dataset=training_data())  # fmt: skip
    trainer.train()
    assert teacher.dtype == torch.bfloat16
    kept = json.loads((tmp_path / "teacher" / "model" / "config.json").read_text())
    assert kept["dtype"] == "float32"
    found = read(tmp_path / "teacher" / "model")
    assert not torch.equal(found.lm_head.weight, read(source).lm_head.weight)
    loaded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    # All that computes, whether a file has it or not: rotary frequencies stay in float32.
    assert {name: one.dtype for name, one in teacher.named_buffers()} == {
        name: one.dtype for name, one in loaded.named_buffers()
    }
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "teacher" / "model", dtype=torch.bfloat16
    )
    ids = training_data()[0]["input_ids"][None]
    with torch.no_grad():
        assert torch.equal(teacher(input_ids=ids).logits, again.eval()(input_ids=ids).logits)
    assert_equal_states(state_of(teacher), state_of(again))


def test_bad_input(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="teacher must be given"):
        make(source, tmp_path, recipe="teach")
    with pytest.raises(ArgumentError, match="teacher must be a float model"):
        make(source, tmp_path, recipe=TAUGHT)
    stored = precompute_logits(read(source), training_data(), tmp_path / "logits", k=4)
    with pytest.raises(ArgumentError, match="stored logits and 8 bits cannot"):
        make(source, tmp_path, recipe=TAUGHT, teacher=stored)
    make(source, tmp_path, recipe=TAUGHT, teacher=read(source), max_steps=2, save_steps=1,
         save_strategy="steps").train()  # fmt: skip
    (tmp_path / "teacher").rename(tmp_path / "elsewhere")
    trainer = make(source, tmp_path, recipe=TAUGHT, teacher=read(source), max_steps=3)
    with pytest.raises(CheckpointError, match="must hold the teacher that the run has taught"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher_share": -1.0}, "teacher_share must be a finite number of at least 0"),
        ({"teacher_share": 1.0}, "teacher_share must be 0 without a term from a teacher"),
        ({"teacher_share": 1.0, "logits_weight": 1.0, "teacher_8bit": True}, "0 for a teacher in"),
        ({"teacher_rate": 0.0}, "teacher_rate must be a finite number above 0"),
    ],
)
def test_fields_of_the_recipe(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**fields)


def test_in_words() -> None:
    words = "the teacher learns first, for 1 times the steps, calibrated on 128 examples "
    assert RECIPES["teach"].in_words(2e-4).startswith(words)
