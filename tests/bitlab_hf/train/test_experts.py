"""Mixtures in a Trainer: the loss that balances their experts, and a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from bitlab_hf import BitLabConfig, deploy
from bitlab_hf.train import BitLabTrainer, Recipe
from tests.bitlab_hf.experts import load, make_moe
from tests.bitlab_hf.models import logits_of, token_ids, training_data


def test_a_trainer_with_the_models_own_balancing_loss(tmp_path: Path) -> None:
    source = make_moe("mixtral", tmp_path, output_router_logits=True)
    model = load(source, quantization_config=BitLabConfig())
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "expert" in name}
    args = TrainingArguments(
        tmp_path / "run", max_steps=3, per_device_train_batch_size=4, report_to=[],
        learning_rate=1e-2, use_cpu=True, save_strategy="no",
    )  # fmt: skip
    model.gradient_checkpointing_enable()
    trainer = Trainer(model, args, train_dataset=training_data())
    trainer.train()
    after = dict(model.named_parameters())
    assert all(not torch.equal(weight, after[name]) for name, weight in before.items())
    with torch.no_grad():
        output = model(input_ids=token_ids(), labels=token_ids())
    assert output.aux_loss > 0


@pytest.mark.parametrize("recipe", ["default", Recipe(logits_weight=1.0)])
def test_distillation_balances_experts_too(recipe: Any, tmp_path: Path) -> None:
    """Whether or not the labels' loss, which transformers adds the routers' to, is part of it."""
    source = make_moe("mixtral", tmp_path, output_router_logits=True)
    batch = {"input_ids": token_ids(), "labels": token_ids()}
    losses, gradients = [], []
    for weight in (0.0, 1.0):
        model = load(source, quantization_config=BitLabConfig())
        model.config.router_aux_loss_coef = model.router_aux_loss_coef = weight
        args = TrainingArguments(tmp_path / "run", report_to=[], use_cpu=True)
        trainer = BitLabTrainer(model, args, recipe=recipe, teacher=str(source))
        trainer.current_gradient_accumulation_steps = 1
        loss = trainer.compute_loss(model.train(), batch)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(model.model.layers[0].mlp.gate.weight.grad)
    with torch.no_grad():
        balancing = model(**batch).aux_loss
    assert balancing > 0
    torch.testing.assert_close(losses[1] - losses[0], balancing)
    assert not torch.equal(*gradients)


def test_distillation_teaches_experts(tmp_path: Path) -> None:
    source = make_moe("qwen3_moe", tmp_path)
    model = load(source, quantization_config=BitLabConfig())
    experts = {n: p.detach().clone() for n, p in model.named_parameters() if "experts" in n}
    args = TrainingArguments(
        tmp_path / "run", max_steps=30, per_device_train_batch_size=4, report_to=[],
        learning_rate=3e-3, use_cpu=True, save_strategy="no", logging_steps=5,
    )  # fmt: skip
    trainer = BitLabTrainer(
        model, args, train_dataset=training_data(), recipe="distill", teacher=str(source)
    )
    trainer.train()
    losses = [one["loss_logits"] for one in trainer.state.log_history if "loss_logits" in one]
    assert losses[-1] < 0.9 * losses[0]
    after = dict(model.named_parameters())
    assert experts
    assert all(not torch.equal(weight, after[name]) for name, weight in experts.items())
    latent = logits_of(model.eval())
    assert torch.equal(logits_of(deploy(model)), latent)
