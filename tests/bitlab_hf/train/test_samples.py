"""How many examples a calibrated start reads: more of them for wider layers."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset

from bitlab_hf.model.tree import quantized_layers
from bitlab_hf.train import Recipe
from tests.bitlab_hf.models import make_float_model, taught, training_data
from tests.bitlab_hf.train.test_start import Stream, report_of, start
from tests.bitlab_hf.train.test_trainer import load


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows its text: rounding costs it a lot."""
    return taught(make_float_model("llama", tmp_path_factory.mktemp("float")))


@pytest.mark.parametrize("streamed", [True, False])
def test_more_examples_for_wider_layers(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, streamed: bool
) -> None:
    """Until there are so many tokens for each input, or no more examples."""
    data: Any = Stream() if streamed else training_data()
    length = len(training_data()[0]["input_ids"])
    model = load(source)
    widest = max(found.module.in_features for found in quantized_layers(model))
    wanted = -(-2 * widest // length)
    assert 8 < wanted < len(training_data())
    recipe = Recipe(calibration_samples=8, calibration_tokens=2)
    with caplog.at_level(logging.WARNING, "bitlab"):
        trainer = start(source, tmp_path / "more", recipe=recipe, train_dataset=data, model=model)
    assert trainer.calibration.samples == wanted
    said = f"calibrates on {wanted} examples instead of 8: with {wanted * length} tokens they hold"
    assert said in caplog.text
    assert report_of(tmp_path / "more")["tokens"] == wanted * length
    plain = Recipe(calibration_samples=wanted)
    same = start(source, tmp_path / "same", recipe=plain, train_dataset=data)
    assert same.calibration.layers == trainer.calibration.layers
    # As much as there is.
    most = Recipe(calibration_samples=8, calibration_tokens=1000)
    all_of_it = start(source, tmp_path / "all", recipe=most, train_dataset=data)
    assert all_of_it.calibration.samples == len(training_data())


class Words(IterableDataset):  # type: ignore[type-arg]
    """Examples without an end, that a collator makes tokens of."""

    def __iter__(self) -> Any:
        return ({"words": index % 32} for index in itertools.count())


def tokenized(rows: list[Any]) -> dict[str, torch.Tensor]:
    ids = torch.stack([training_data()[row["words"]]["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids}


def test_examples_that_are_no_token_ids_yet(source: Path, tmp_path: Path) -> None:
    """What they hold cannot be counted, and there is no end of them."""
    recipe = Recipe(calibration_samples=8, calibration_tokens=20)
    options = {"data_collator": tokenized, "remove_unused_columns": False}
    trainer = start(source, tmp_path, recipe=recipe, train_dataset=Words(), **options)
    assert trainer.calibration.samples == 8


def test_padding_is_not_counted(source: Path, tmp_path: Path) -> None:
    """Half of each example: so twice as many are wanted."""
    rows = training_data()
    length = len(rows[0]["input_ids"])
    mask = (torch.arange(length) < length // 2).long()
    model = load(source)
    widest = max(found.module.in_features for found in quantized_layers(model))
    recipe = Recipe(calibration_samples=4, calibration_tokens=1)
    data = [{**row, "attention_mask": mask} for row in rows]
    trainer = start(source, tmp_path, recipe=recipe, train_dataset=data, model=model)
    assert trainer.calibration.samples == -(-widest // (length // 2))
    assert widest <= trainer.calibration.tokens == report_of(tmp_path)["tokens"]
