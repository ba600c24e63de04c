"""Every command on every kind of damage: one line that names the file, exit code 1, and JSON."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

import bitlab_hf.cli.text
from bitcore.errors import ArgumentError, CheckpointError
from bitlab_hf.cli.errors import CommandError, describe, doing
from tests.bitlab_hf.cli.damage import (
    COMMANDS,
    FOLDERS,
    LOADING,
    UP,
    WEIGHTS,
    change,
    commands,
    set_config,
)

Run = Callable[..., Any]


def check_failure(done: Any, *told: str) -> None:
    assert done.code == 1, done
    found = json.loads(done.out)
    assert set(found) == {"error", "type"}
    # Above it stands what the demo or the training has told by then, and nothing else.
    lines = [line for line in done.err.splitlines() if line.strip()]
    assert len(lines) == 1 or lines[0].startswith(("Model: ", "scales of the weights: ")), done.err
    assert lines[-1] == f"error: {found['error']}"
    assert "Traceback" not in done.err
    for part in told:
        assert part in found["error"]


@pytest.mark.parametrize("kind", FOLDERS)
def test_damaged_folders(bitlab: Run, states: dict[str, Path], tmp_path: Path, kind: str) -> None:
    damage, told = FOLDERS[kind]
    model = shutil.copytree(states["deployed"], tmp_path / "model")
    damage(model)
    for command in COMMANDS:
        done = bitlab(*commands(model, tmp_path / "out")[command], "--json")
        check_failure(done, told, str(model))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", WEIGHTS)
def test_damaged_weights(bitlab: Run, states: dict[str, Path], tmp_path: Path, kind: str) -> None:
    edit, told = WEIGHTS[kind]
    model = shutil.copytree(states["float"], tmp_path / "model")
    change(model, edit)
    for command in LOADING:
        done = bitlab(*commands(model, tmp_path / "out")[command], "--json")
        check_failure(done, told, str(model))
    assert not (tmp_path / "out/model.safetensors").exists()


@pytest.mark.parametrize("state", ["latent", "deployed"])
def test_ours_without_an_embedding(
    bitlab: Run, states: dict[str, Path], tmp_path: Path, state: str
) -> None:
    model = shutil.copytree(states[state], tmp_path / "model")
    change(model, lambda held: held.pop("model.embed_tokens.weight"))
    for command in ("eval", "generate", "chat", "export", *(("deploy",) * (state == "latent"))):
        done = bitlab(*commands(model, tmp_path / "out")[command], "--json")
        check_failure(done, "model.embed_tokens.weight", str(model))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"hidden_size": "big"}, "hidden_size"),
        ({"hidden_size": 10**30}, "hidden_size"),
        ({"model_type": 7}, "model type"),
        ({"dtype": "float3"}, "float3"),
    ],
)
def test_damaged_fields(
    bitlab: Run, states: dict[str, Path], tmp_path: Path, fields: dict[str, Any], told: str
) -> None:
    model = shutil.copytree(states["float"], tmp_path / "model")
    set_config(model, **fields)
    for command in ("eval", "deploy", "convert", "train"):
        done = bitlab(*commands(model, tmp_path / "out")[command], "--json")
        check_failure(done, str(model))
        assert told in done.err or "Overflow" in done.err


def test_patterns_and_layer_lists(bitlab: Run, states: dict[str, Path], tmp_path: Path) -> None:
    model = shutil.copytree(states["deployed"], tmp_path / "model")
    scheme = json.loads((model / "config.json").read_text())["quantization_config"]
    set_config(model, quantization_config={**scheme, "modules_to_not_convert": ["("]})
    for command in ("eval", "generate", "export"):
        check_failure(bitlab(*commands(model, tmp_path / "out")[command], "--json"), str(model))


def test_usage_is_json_too(bitlab: Run, states: dict[str, Path]) -> None:
    for arguments in (
        ("eval",),
        ("nonsense",),
        ("eval", states["float"], "--text", "/nowhere"),
        ("generate", states["float"], "x", "--max-tokens", "many"),
        ("bench", "--nonsense"),
    ):
        done = bitlab(*arguments, "--json")
        assert done.code == 2
        assert json.loads(done.out)["type"] == "UsageError"
        assert done.err.startswith("error: ")
        assert bitlab(*arguments).out == ""


def test_interrupted(bitlab: Run, states: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bitlab_hf.cli.text, "read_texts", interrupt)
    done = bitlab("eval", states["float"], "--text", __file__, "--json")
    assert (done.code, json.loads(done.out)["type"]) == (130, "KeyboardInterrupt")
    assert bitlab("eval", states["float"], "--text", __file__).code == 130


@pytest.mark.parametrize(
    "error", [RecursionError("too deep"), MemoryError(), KeyError("x"), BaseException("panic")]
)
def test_the_last_resort(
    bitlab: Run,
    states: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    """Whatever is raised where nothing was foreseen."""

    def fail(*_given: Any) -> None:
        raise error

    monkeypatch.setattr(bitlab_hf.cli.text, "read_texts", fail)
    arguments = ("eval", states["float"], "--text", __file__)
    done = bitlab(*arguments)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: ")
    assert type(error).__name__ in done.err
    assert len(done.err.splitlines()) == 1
    if isinstance(error, Exception):
        assert f"bitlab eval {states['float']} --text" in done.err
    done = bitlab(*arguments, "--debug", "--json")
    assert "Traceback" in done.err
    assert "error" in json.loads(done.out)


def test_doing() -> None:
    told = r"^reading a must work, got KeyError: 'b'\nFetch it\.$"
    with pytest.raises(CommandError, match=told), doing("reading a", "Fetch it."):
        raise KeyError("b")
    named = pytest.raises(ArgumentError, match="^file: x must be y$")
    with named, doing("reading", name="file"):
        raise ArgumentError("x must be y")
    for error in (CheckpointError("of file"), typer.BadParameter("x"), typer.Exit(3)):
        with pytest.raises(type(error)) as raised, doing("reading", name="file"):
            raise error
        assert raised.value is error


def test_one_line() -> None:
    error = ArgumentError("a must be b,\n  got c\n\nDo d.")
    assert describe(error) == "a must be b, got c. Do d."
    assert describe(ValueError("\x1b[2Jx\r\u202ey")) == r"ValueError: \x1b[2Jx. \u202ey"
    assert describe(OSError()) == "OSError: (no message)"
    assert len(describe(ValueError("x" * 10_000))) < 2100


def test_nothing_of_a_file_steers_the_terminal(
    bitlab: Run, states: dict[str, Path], tmp_path: Path
) -> None:
    evil = "\x1b]0;owned\x07[bold]x[/nonsense]"
    shown = r"\x1b]0;owned\x07[bold]x[/nonsense]"
    model = shutil.copytree(states["deployed"], tmp_path / "model")
    set_config(model, architectures=[evil])
    leaves = ("qweight", "qweight_scale")
    change(
        model, lambda held: held.update({f"{evil}.{one}": held[f"{UP}.{one}"] for one in leaves})
    )
    done = bitlab("info", model, "--layers")
    assert done.code == 0, done.err
    assert f"{shown}: bitlab, packed" in done.out
    assert f"\n{shown} " in done.out
    assert "\x1b" not in done.out
    assert bitlab("info", model, "--json").json["architecture"] == evil
    set_config(model, model_type=evil)
    for state in ("deployed", "float"):
        model = shutil.copytree(states[state], tmp_path / state)
        set_config(model, model_type=evil)
        done = bitlab("eval", model, "--text", __file__)
        assert done.code == 1
        assert shown in done.err
        assert "\x1b" not in done.err


def test_warnings_do_not_steer_the_terminal(bitlab: Run) -> None:
    assert bitlab("info", "/nowhere").code == 1
    assert logging.lastResort is not None
    record = logging.LogRecord("bitlab", logging.WARNING, "", 0, "of \x1b[31mx", None, None)
    bitlab("generate", "/nowhere", "x")
    assert logging.lastResort.format(record) == r"of \x1b[31mx"
