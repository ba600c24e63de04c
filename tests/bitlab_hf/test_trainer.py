"""The Trainer from start to reload: evaluate, checkpoint, resume, load the best, deploy, save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from bitlab_hf import BitLabConfig, deploy, save
from tests.bitlab_hf.models import logits_of, make_float_model, token_ids, training_data


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_float_model("llama", tmp_path)


def load(path: Path, **fields: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=BitLabConfig(**fields))


def make_trainer(model: Any, folder: Path, **changes: Any) -> Trainer:
    values = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    data = training_data()
    return Trainer(
        model=model,
        args=TrainingArguments(**{**values, **changes}),
        train_dataset=data,
        eval_dataset=data[:4],
    )


def state_of(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal_states(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_resuming_is_bit_equal_to_not_stopping(source: Path, tmp_path: Path) -> None:
    straight = load(source)
    make_trainer(straight, tmp_path / "straight").train()
    stopped = load(source)
    make_trainer(stopped, tmp_path / "run", save_strategy="steps", save_steps=3).train()
    assert_equal_states(state_of(straight), state_of(stopped))
    resumed = load(source)
    trainer = make_trainer(resumed, tmp_path / "run", save_strategy="steps", save_steps=3)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert_equal_states(state_of(straight), state_of(resumed))
    # A checkpoint is a latent model with the float model's keys, and loads like any other.
    checkpoint = tmp_path / "run" / "checkpoint-6"
    assert set(load_file(checkpoint / "model.safetensors")) == set(
        load_file(source / "model.safetensors")
    )
    again = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert torch.equal(logits_of(again), logits_of(straight.eval()))


def test_best_model_is_loaded_deployed_and_saved(source: Path, tmp_path: Path) -> None:
    model = load(source)
    trainer = make_trainer(
        model,
        tmp_path / "run",
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        # Turned round, so that the best is not the last.
        greater_is_better=True,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert best.endswith("checkpoint-2")
    expected = logits_of(AutoModelForCausalLM.from_pretrained(best))
    assert torch.equal(logits_of(model.eval()), expected)
    save(deploy(model), tmp_path / "deployed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "deployed")
    assert torch.equal(logits_of(again), expected)


def test_training_lowers_the_loss(source: Path, tmp_path: Path) -> None:
    trainer = make_trainer(load(source), tmp_path, max_steps=40)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * before


def test_gradient_checkpointing_changes_nothing(source: Path, tmp_path: Path) -> None:
    states = []
    for enabled in (False, True):
        model = load(source)
        make_trainer(model, tmp_path, max_steps=2, gradient_checkpointing=enabled).train()
        states.append(state_of(model))
    assert_equal_states(*states)


def test_gradient_accumulation(source: Path, tmp_path: Path) -> None:
    """Four batches of one are one batch of four: sums of float32 in another order."""
    losses = []
    for size, parts in ((4, 1), (1, 4)):
        trainer = make_trainer(
            load(source), tmp_path, per_device_train_batch_size=size,
            gradient_accumulation_steps=parts, max_grad_norm=1.0,
        )  # fmt: skip
        trainer.train()
        logs = [log for log in trainer.state.log_history if "grad_norm" in log]
        losses.append([(log["loss"], log["grad_norm"]) for log in logs])
    assert len(losses[0]) == 6
    for one, four in zip(*losses, strict=True):
        assert four == pytest.approx(one, rel=1e-3)
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-5)


def test_eight_bit_adamw_resumes(source: Path, tmp_path: Path) -> None:
    """bitsandbytes' optimizer, on the CPU, in a plain Trainer."""
    saving = {"optim": "adamw_bnb_8bit", "save_strategy": "steps", "save_steps": 3}
    straight = load(source)
    trainer = make_trainer(straight, tmp_path / "run", **saving)
    trainer.train()
    optimizer: Any = trainer.optimizer
    assert type(optimizer.optimizer).__module__.startswith("bitsandbytes")
    # Weights of 4096 elements and more have states of 8 bits.
    kept = optimizer.optimizer.state[straight.model.layers[0].mlp.up_proj.weight]
    assert kept["state1"].dtype == torch.uint8
    resumed = load(source)
    make_trainer(resumed, tmp_path / "again", **saving).train(
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3")
    )
    assert_equal_states(state_of(straight), state_of(resumed))


@pytest.mark.ci
def test_compiled_training_is_eager_training(tmp_path: Path) -> None:
    """One graph, no breaks, no recompiles; losses of float32 sums in another order."""
    source = make_float_model("llama", tmp_path, num_hidden_layers=1)
    eager = make_trainer(load(source), tmp_path)
    eager.train()
    torch._dynamo.utils.counters.clear()
    compiled = make_trainer(load(source), tmp_path, torch_compile=True, eval_strategy="no")
    compiled.train()
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
    losses = [
        [log["loss"] for log in trainer.state.log_history if "loss" in log]
        for trainer in (eager, compiled)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_bf16_autocast(source: Path, tmp_path: Path) -> None:
    model = load(source)
    make_trainer(model, tmp_path, max_steps=2, bf16=True).train()
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    model = load(source)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model.train()(token_ids()).logits, model.eval()(token_ids()).logits
    assert outputs[0].dtype == torch.bfloat16
    assert torch.equal(*outputs)


def test_autocast_outputs_are_within_one_rounding(source: Path) -> None:
    layer = load(source).model.layers[0].mlp.up_proj.eval()
    x = torch.randn(7, 64)
    full = layer(x)
    for dtype, relative in ((torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)):
        with torch.autocast("cpu", dtype=dtype):
            half = layer(x)
        assert half.dtype == dtype
        assert bool(((half.float() - full).abs() <= full.abs() * relative).all())


def test_a_deployed_model_does_not_train_without_adapters(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="attach trainable adapters"):
        make_trainer(load(source, mode="infer"), tmp_path)
    with pytest.raises(ValueError, match="attach trainable adapters"):
        make_trainer(deploy(load(source)), tmp_path)


def test_frozen_parts_stay_as_they_were(source: Path, tmp_path: Path) -> None:
    model = load(source)
    frozen = model.model.layers[0]
    frozen.requires_grad_(False)
    before = state_of(frozen)
    make_trainer(model, tmp_path).train()
    assert_equal_states(before, state_of(frozen))
