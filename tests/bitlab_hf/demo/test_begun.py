"""A run of the demo that was killed goes on as it was begun, or not at all: the shipped model."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

import bitlab_hf.demo.run
from bitcore.errors import ArgumentError, CheckpointError
from bitlab_hf import BitLabConfig
from bitlab_hf.cli.loading import load_model
from bitlab_hf.demo.begun import BEGUN_FILE, forget, read_begun, text_mark, write_begun
from bitlab_hf.demo.corpus import source_files
from bitlab_hf.demo.probe import Answer
from bitlab_hf.demo.run import Demo, Settings
from bitlab_hf.train import BitLabTrainer

MODEL = str(files("bitlab_hf.demo") / "model")
OPTIONS = {"model": "a", "tokens": 600_000, "text": "articles 1f"}


class Killed(BaseException):
    """What a process does not survive."""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    text = tmp_path / "text"
    text.mkdir()
    for part, side in (("fit", "train"), ("test", "heldout")):
        articles = list(source_files(side))[:4]  # type: ignore[arg-type]
        lines = [json.dumps({"title": one.path, "text": one.text}) for one in articles]
        (text / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    return Settings(
        model=MODEL, output=tmp_path / "out", tokens=512, eval_tokens=128, length=32, generate=2,
        text=text, resume=True,
    )  # fmt: skip


def demo(settings: Settings) -> Demo:
    return Demo(settings, Console(file=io.StringIO()), load_model)


def never(*_given: Any, **_options: Any) -> Any:
    raise AssertionError("it has been done already")


def probe_here(
    model: Path, ids: torch.Tensor, prompts: list[str], *_: Any
) -> tuple[Answer, torch.Tensor]:
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model)(input_ids=ids).logits
    return Answer(1.0, 1, 1.0, ["x"] * len(prompts)), logits


@pytest.mark.slow
def test_killed_after_training(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step is trained again while there is no report, nor does the dtype change; the model is
    the one that the first start would have saved.
    """
    run = settings.output / "run"
    meant: dict[str, torch.Tensor] = {}

    def killed_saving(model: Any, *_given: Any, **_options: Any) -> None:
        meant.update({name: value.clone() for name, value in model.state_dict().items()})
        raise Killed

    def killed_probing(*_given: Any) -> Any:
        raise Killed

    monkeypatch.setattr(bitlab_hf.demo.run, "bf16_is_faster", lambda: False)
    with monkeypatch.context() as patched:
        patched.setattr(bitlab_hf.demo.run, "save", killed_saving)
        with pytest.raises(Killed):
            demo(settings).run()
    (kept,) = run.glob("checkpoint-*")
    assert kept.name == "checkpoint-16"
    # A machine that is busy now answers otherwise.
    monkeypatch.setattr(bitlab_hf.demo.run, "bf16_is_faster", lambda: True)
    monkeypatch.setattr(BitLabTrainer, "training_step", never)
    monkeypatch.setattr(BitLabTrainer, "_calibrate", never)
    with monkeypatch.context() as patched:
        patched.setattr(bitlab_hf.demo.run, "probe", killed_probing)
        with pytest.raises(Killed):
            demo(settings).run()
    assert (settings.output / "model.safetensors").is_file()
    assert list(run.glob("checkpoint-*")) == [kept]
    assert not (settings.output / "report.json").exists()
    monkeypatch.setattr(bitlab_hf.demo.run, "probe", probe_here)
    last = demo(settings)
    assert last._bf16 is False
    report = last.run()
    assert report.logits_identical
    assert json.loads((settings.output / "report.json").read_text())["ratio"] == report.ratio
    saved = AutoModelForCausalLM.from_pretrained(settings.output).state_dict()
    assert saved.keys() == meant.keys()
    assert all(torch.equal(saved[name], value) for name, value in meant.items())
    # A finished run is nothing to go on with.
    assert not list(run.glob("checkpoint-*"))
    assert not (run / BEGUN_FILE).exists()
    assert (run / "trainer_state.json").is_file()
    # Who begins anew while another run is left leaves none of it.
    write_begun(run, settings.trains(), True)
    (run / "checkpoint-99").mkdir()
    anew = replace(settings, tokens=256, resume=False)
    with pytest.raises(AssertionError, match="done already"):
        demo(anew).run()
    assert not (run / "checkpoint-99").exists()
    assert read_begun(run, anew.trains()) is True


def test_a_run_of_something_else_is_refused(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bitlab_hf.demo.run, "bf16_is_faster", lambda: False)
    run = settings.output / "run"
    write_begun(run, settings.trains(), True)
    assert demo(settings)._bf16 is True
    for other, message in (
        ({"tokens": 1024}, "tokens 512, got tokens 1024\nAsk for that, name another --output"),
        ({"model": "b"}, "got model 'b'"),
        ({"text": None}, 'got text "the standard library\'s sources"'),
        ({"config": BitLabConfig(head="int8")}, "head 'keep', got head 'int8'"),
    ):
        with pytest.raises(ArgumentError) as raised:
            demo(replace(settings, **other))  # type: ignore[arg-type]
        assert message in str(raised.value)
        assert f"what {run} was begun with" in str(raised.value)
        # Who does not ask to go on begins anew, in what is faster now.
        assert demo(replace(settings, **other, resume=False))._bf16 is False  # type: ignore[arg-type]
    # Steps of two blocks, as an earlier version took them.
    write_begun(run, {**settings.trains(), "batch": 2}, True)
    with pytest.raises(ArgumentError, match=r"begun with, batch 2, got batch 1\n.*name another"):
        demo(settings)
    write_begun(run, settings.trains(), True)
    # The same text elsewhere is the same; another one in its place is not.
    assert settings.text is not None
    moved = settings.text.rename(tmp_path / "moved")
    assert demo(replace(settings, text=moved))._bf16 is True
    with (moved / "fit.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(ArgumentError, match=r"begun with, text 'articles \w+', got text 'articles"):
        demo(replace(settings, text=moved))


def test_the_record(tmp_path: Path) -> None:
    run = tmp_path / "out" / "run"
    assert read_begun(run, OPTIONS) is None
    write_begun(run, OPTIONS, False)
    assert read_begun(run, OPTIONS) is False
    # An option that a later version has.
    assert read_begun(run, {**OPTIONS, "new": 1}) is False
    for damaged in ("{", "[]", '{"options": 1, "bf16": true}', '{"options": {}}'):
        (run / BEGUN_FILE).write_text(damaged)
        with pytest.raises(CheckpointError, match="must say what the run was begun with, got"):
            read_begun(run, OPTIONS)
    (run / "checkpoint-7").mkdir()
    (run / "checkpoint-7" / "trainer_state.json").write_text("{}")
    (run / "checkpoint-8").mkdir()
    (run / "trainer_state.json").write_text("{}")
    forget(run)
    assert [file.name for file in run.iterdir()] == ["trainer_state.json"]
    assert text_mark(None) != text_mark_of(tmp_path, "a") != text_mark_of(tmp_path, "b")


def text_mark_of(folder: Path, text: str) -> str:
    (folder / "fit.jsonl").write_text(text)
    return text_mark(folder)
