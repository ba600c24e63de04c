"""The calibrated start: of which model it is, and on which device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import operations

from bitcore.errors import ArgumentError
from bitlab_hf.train import BitLabTrainer, Recipe
from tests.bitlab_hf.models import make_float_model, training_data
from tests.bitlab_hf.train.test_trainer import arguments, load, make


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_float_model("llama", tmp_path_factory.mktemp("float"))


def test_where_the_trainer_moves_the_model_late(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batches and the model are on one device when the first loss is computed."""
    for late in (True, False):
        trainer = make(source, tmp_path, recipe=Recipe(calibration_samples=4), max_steps=1,
                       learning_rate=0.0, bf16_full_eval=late)  # fmt: skip
        moved: list[Any] = []
        monkeypatch.setattr(
            trainer, "_move_model_to_device", lambda *told, to=moved: to.append(told)
        )
        assert trainer._calibrate(trainer.model) is not None
        assert moved == ([(trainer.model, torch.device("cpu"))] if late else [])
    trainer.is_fsdp_enabled = True
    monkeypatch.setattr(trainer, "_prepare_inputs", dict)
    monkeypatch.setattr(operations, "send_to_device", lambda _part, device: device)
    assert trainer._calibration_batches(64) == [torch.device("cpu")]


def test_a_model_made_anew_behind_the_start_is_refused(source: Path, tmp_path: Path) -> None:
    def make_trainer(recipe: Any) -> BitLabTrainer:
        return BitLabTrainer(model_init=lambda: load(source), args=arguments(tmp_path),
                             train_dataset=training_data(), recipe=recipe)  # fmt: skip

    for recipe in (Recipe(calibration_samples=4), Recipe(0.0, 1.0, teacher_share=1.0)):
        with pytest.raises(ArgumentError, match="model_init must be None for a recipe that"):
            make_trainer(recipe)
    make_trainer("plain").train()
