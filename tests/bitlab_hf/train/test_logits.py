"""Stored logits: the loss of a teacher that runs, changed data, settings that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import bitlab_hf.train.logits as stored
from bitcore.errors import ArgumentError, CheckpointError
from bitlab_hf.train import Recipe, precompute_logits
from bitlab_hf.train.losses import logits_divergence, top_divergence
from tests.bitlab_hf.models import VOCABULARY, make_float_model, training_data
from tests.bitlab_hf.train.test_trainer import make, padded


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_float_model("llama", tmp_path_factory.mktemp("float"))


def unpadded(count: int) -> list[dict[str, Any]]:
    """The examples of `padded`, before it pads them."""
    return [
        {"input_ids": row["input_ids"], "attention_mask": padded([row])["attention_mask"][0]}
        for row in training_data(count)
    ]


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_tokens_are_a_teacher_that_runs(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """Padded, with labels left out, shuffled, over two epochs, with an evaluation between."""
    monkeypatch.setattr(stored, "_SHARD_BYTES", 20_000)
    folder = precompute_logits(
        source, unpadded(16), tmp_path / "logits", k=VOCABULARY, temperature=temperature
    )
    assert len(list(folder.glob("logits-*.safetensors"))) > 1
    recipe = Recipe(cross_entropy_weight=0.1, logits_weight=1.0, temperature=temperature)
    found = [
        losses(
            make(source, tmp_path, recipe=recipe, teacher=teacher, train_dataset=training_data(16),
                 data_collator=padded, max_steps=-1, num_train_epochs=2, statistics=False)
        )
        for teacher in (source, folder)
    ]  # fmt: skip
    assert len(found[0]) == 8
    assert found[1] == pytest.approx(found[0], rel=2e-3)


def test_fewer_tokens_are_a_lower_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 600, 30, generator=generator) * 2
    student.requires_grad_()
    p = teacher.softmax(-1)
    previous = torch.tensor(0.0)
    for k in (1, 8, 20, 30):
        top, indices = p.topk(k, -1)
        rest = 1 - top.sum(-1) if k < 30 else torch.zeros(600)
        loss = top_divergence(student, indices, top, rest)
        assert loss > previous
        previous = loss.detach()
    torch.testing.assert_close(loss, logits_divergence(student, teacher))
    top, indices = p.topk(8, -1)
    rest = 1 - top.sum(-1)
    (gradient,) = torch.autograd.grad(top_divergence(student, indices, top, rest), student)
    other = student.detach().double().requires_grad_()
    q = other.softmax(-1)
    q_top = q.gather(-1, indices)
    q_rest = 1 - q_top.sum(-1)
    slow = (top * (top / q_top).log()).sum(-1) + rest * (rest / q_rest).log()
    (expected,) = torch.autograd.grad(slow.mean(), other)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-8)


def test_changed_data_is_refused_and_can_be_added(source: Path, tmp_path: Path) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(source)
    data = training_data(8)
    folder = precompute_logits(teacher, data, tmp_path / "logits", k=8)
    before = sorted(file.name for file in folder.iterdir())
    precompute_logits(teacher, data[::-1], folder, k=8)
    assert sorted(file.name for file in folder.iterdir()) == before
    changed = [{"input_ids": row["input_ids"].clone(), "labels": row["labels"]} for row in data]
    changed[5]["input_ids"][3] += 1
    options: dict[str, Any] = {"recipe": "distill", "teacher": folder, "statistics": False}
    with pytest.raises(CheckpointError, match=r"every example of train_dataset, got one of 24"):
        make(source, tmp_path, train_dataset=changed, **options).train()
    counted: list[int] = []
    precompute_logits(teacher, changed, folder, k=8, advance=counted.append)
    assert sum(counted) == 8
    make(source, tmp_path, train_dataset=changed, **options).train()
    with torch.no_grad():
        teacher.lm_head.weight += 0.1
    for other, k, message in ((teacher, 8, "teacher"), (source, 9, r"k 9 \(was 8\)")):
        with pytest.raises(CheckpointError, match=f"settings must be those that .*{message}"):
            precompute_logits(other, data, folder, k=k)
    (folder / "logits-00001.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="must hold whole files of precompute_logits"):
        make(source, tmp_path, **options)


def test_a_full_disk_keeps_what_is_whole(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "_SHARD_BYTES", 1)
    save = stored.save_file

    def failing(tensors: Any, file: Path) -> None:
        if "00002" in file.name:
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, file)

    monkeypatch.setattr(stored, "save_file", failing)
    with pytest.raises(CheckpointError, match="No space left"):
        precompute_logits(source, training_data(8), tmp_path, k=4, batch_size=4)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {stored.SETTINGS_FILE, "logits-00001.safetensors"}
    monkeypatch.setattr(stored, "save_file", save)
    precompute_logits(source, training_data(8), tmp_path, k=4, batch_size=4)
    assert len(stored.StoredLogits(tmp_path).places) == 8


def test_what_does_not_fit(source: Path, tmp_path: Path) -> None:
    folder = precompute_logits(source, training_data(4), tmp_path / "logits", k=4)
    for recipe, message in (
        (Recipe(logits_weight=1.0, temperature=2.0), r"must be the 1\.0 of the stored logits"),
        (Recipe(logits_weight=1.0, hidden_weight=1.0), "no hidden_weight"),
        (Recipe(relation_weight=1.0), "no hidden_weight, relation_weight"),
    ):
        with pytest.raises(ArgumentError, match=message):
            make(source, tmp_path, recipe=recipe, teacher=folder)
    other = make_float_model("llama", tmp_path, vocab_size=101)
    with pytest.raises(ArgumentError, match="vocabulary of 101 tokens, got stored logits of 97"):
        make(other, tmp_path, teacher=folder)
    for k in (0, 98, 2.0):
        with pytest.raises(ArgumentError, match="k must be from 1 to 97"):
            precompute_logits(source, [], tmp_path, k=k)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="temperature must be above 0"):
        precompute_logits(source, [], tmp_path, temperature=0.0)
