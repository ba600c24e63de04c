"""DeepSpeed's ZeRO-3 as transformers' loading sees it: without DeepSpeed, which is no dependency.

docs/training.md says what was run with DeepSpeed itself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from transformers.integrations import deepspeed

from bitlab_hf.train import Recipe
from tests.bitlab_hf.models import make_float_model
from tests.bitlab_hf.test_trainer import assert_equal_states, state_of
from tests.bitlab_hf.train.test_trainer import load, make


class ZeRO3:
    """What transformers asks of the configuration that DeepSpeed would have given it."""

    @staticmethod
    def is_zero3() -> bool:
        return True


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_float_model("llama", tmp_path_factory.mktemp("float"))


@contextmanager
def zero3() -> Iterator[None]:
    # transformers holds it weakly.
    config = ZeRO3()
    deepspeed.set_hf_deepspeed_config(config)
    try:
        yield
        assert deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()
        del config


def test_a_teacher_is_loaded_whole(source: Path, tmp_path: Path) -> None:
    model, expected = load(source), AutoModelForCausalLM.from_pretrained(source)
    with zero3():
        trainer = make(source, tmp_path, model=model, recipe="distill", teacher=str(source))
    assert_equal_states(state_of(trainer._teacher), state_of(expected))


def test_partitions_are_not_calibrated(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(source, tmp_path, recipe=Recipe(calibration_samples=4))
    before = {name: tensor.clone() for name, tensor in state_of(trainer.model).items()}
    with zero3(), caplog.at_level(logging.WARNING, logger="bitlab"):
        assert trainer._calibrate(trainer.model) is None
    assert "ZeRO-3 holds the weights in partitions" in caplog.text
    assert_equal_states(state_of(trainer.model), before)
