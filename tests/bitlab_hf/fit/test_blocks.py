"""Calibration of some decoder layers, the others in full precision or ternary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bitcore.errors import ArgumentError
from bitlab_hf.model.tree import quantized_layers
from bitlab_hf.train import calibrate
from bitlayers import set_quant_strength
from tests.bitlab_hf.models import make_float_model, taught, training_data
from tests.bitlab_hf.test_trainer import assert_equal_states, state_of
from tests.bitlab_hf.train.test_trainer import load


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
