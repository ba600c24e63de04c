"""What an earlier run has left in a folder is not gone on with, nor told as the present one's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bitcore.errors import ArgumentError, CheckpointError
from bitlab_hf import BitLabConfig
from bitlab_hf.report.run import read_run
from bitlab_hf.train import last_checkpoint
from bitlab_hf.train.begun import read_begun, scheme_fields, write_begun
from tests.bitlab_hf.models import make_float_model
from tests.bitlab_hf.test_trainer import assert_equal_states, state_of
from tests.bitlab_hf.train.test_taught import Kill
from tests.bitlab_hf.train.test_trainer import make


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_float_model("llama", tmp_path_factory.mktemp("float"))


def test_a_run_goes_on_from_its_own_checkpoints(source: Path, tmp_path: Path) -> None:
    saving: dict[str, Any] = {"recipe": "plain", "save_strategy": "steps", "save_steps": 1}
    first = make(source, tmp_path / "run", max_steps=4, learning_rate=1e-2, **saving)
    first.train()
    first.save_state()
    assert str(last_checkpoint(tmp_path / "run")).endswith("checkpoint-4")
    options: dict[str, Any] = {**saving, "max_steps": 3, "learning_rate": 1e-4}
    straight = make(source, tmp_path / "straight", **options)
    straight.train()
    killed = make(source, tmp_path / "run", callbacks=[Kill(1)], **options)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    assert last_checkpoint(tmp_path / "run") is None
    again = make(source, tmp_path / "run", **options)
    # None of its own yet, and not the other's.
    with pytest.raises(CheckpointError, match="must hold a checkpoint to resume"):
        again.train(resume_from_checkpoint=True)
    killed = make(source, tmp_path / "run", callbacks=[Kill(3)], **options)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    assert str(last_checkpoint(tmp_path / "run")).endswith("checkpoint-2")
    # It may be moved.
    shutil.move(tmp_path / "run", tmp_path / "moved")
    again = make(source, tmp_path / "moved", **options)
    again.train(resume_from_checkpoint=True)
    assert_equal_states(state_of(again.model), state_of(straight.model))
    assert str(last_checkpoint(tmp_path / "moved")).endswith("checkpoint-3")


@pytest.mark.parametrize("saves", [True, False])
def test_a_report_tells_of_the_present_run(source: Path, tmp_path: Path, saves: bool) -> None:
    saving: dict[str, Any] = {"recipe": "plain", "save_strategy": "steps", "save_steps": 1}
    first = make(source, tmp_path, max_steps=4, learning_rate=1e-2, **saving)
    first.train()
    first.save_state()
    assert read_run(tmp_path).steps == 4
    if not saves:
        saving["save_strategy"] = "no"
    make(source, tmp_path, max_steps=2, learning_rate=1e-4, **saving).train()
    found = read_run(tmp_path)
    assert (found.steps, found.max_steps) == (2, 2)
    assert max(step for step, _ in found.logs) == 2
    assert {logs["learning_rate"] <= 1e-4 for _, logs in found.logs if "loss" in logs} == {True}


def test_an_option_that_is_left_out_is_another_one(tmp_path: Path) -> None:
    """Also one that a configuration on disk does not hold where nothing was asked for."""
    for fields in ({"int8_layers": ["model.layers.0.mlp"]}, {"experts": "keep"},
                   {"modules_to_not_convert": ["head"]}):  # fmt: skip
        begun, other = (scheme_fields(BitLabConfig(**one)) for one in (fields, {}))
        write_begun(tmp_path / "begun.json", begun)
        assert read_begun("op", tmp_path / "begun.json", begun, "") == {"options": begun}
        with pytest.raises(
            ArgumentError, match=f"{next(iter(fields))} .*, got {next(iter(fields))}"
        ):
            read_begun("op", tmp_path / "begun.json", other, "")
        write_begun(tmp_path / "begun.json", other)
        with pytest.raises(ArgumentError, match="a run that goes on must be asked for what"):
            read_begun("op", tmp_path / "begun.json", begun, "")


def test_a_damaged_note_hides_nothing(source: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text("{}")
    for content in ("{", "3", "null", json.dumps({"checkpoint-1": "x"})):
        (tmp_path / "earlier_runs.json").write_text(content)
        assert str(last_checkpoint(tmp_path)).endswith("checkpoint-1")
