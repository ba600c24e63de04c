"""Models that the commands cannot take: each one clear message, before anything is loaded."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitcore.errors import ArgumentError, CheckpointError, ConfigError
from bitlab_hf.cli.loading import find_scheme
from tests.bitlab_hf.checkpoint.test_files import lead_out
from tests.bitlab_hf.interop.stock import build

Cli = Callable[..., Any]


def commands(model: Path, output: Path) -> dict[str, tuple[object, ...]]:
    """Every command that reads a model, on this one."""
    return {
        "info": ("info", model),
        "eval": ("eval", model, "--text", __file__),
        "generate": ("generate", model, "def"),
        "chat": ("chat", model),
        "export": ("export", model, output),
        "deploy": ("deploy", model, output),
        "train": ("train", model, output, "--text", __file__),
        "demo": ("demo", "--model", model, "--output", output),
        "push": ("push", model, "me/model"),
    }


COMMANDS = sorted(commands(Path(), Path()))


@pytest.fixture
def model(states: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(states["deployed"], tmp_path / "model")


def set_scheme(folder: Path, scheme: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = scheme
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_schemes(cli: Cli, model: Path, tmp_path: Path, command: str) -> None:
    for scheme, told in (
        ({"quant_method": "wibble", "weight_format": "packed"}, "got 'wibble'"),
        ({"quant_method": "gptq", "bits": 4}, "got 'gptq'"),
        ({"bits": 4}, "got None"),
        ("bitlab", "got None"),
    ):
        set_scheme(model, scheme)
        done = cli(*commands(model, tmp_path / "out")[command])
        assert done.code == 1
        assert isinstance(done.error, ConfigError)
        assert f"{model}: quant_method must be 'bitlab' or 'bitnet'" in str(done.error)
        assert told in str(done.error)
        assert "Take the float model" in str(done.error)
    set_scheme(model, {"quant_method": "bitlab", "format_version": 99})
    done = cli(*commands(model, tmp_path / "out")[command])
    assert "format_version must be at most 4, got 99" in str(done.error)
    assert not (tmp_path / "out").exists()


def test_a_teacher_may_be_of_any_scheme(model: Path) -> None:
    set_scheme(model, {"quant_method": "gptq", "bits": 4})
    assert find_scheme(str(model))["quant_method"] == "gptq"


@pytest.mark.parametrize("command", COMMANDS)
def test_damaged_configuration(cli: Cli, model: Path, tmp_path: Path, command: str) -> None:
    file = model / "config.json"
    for content, told in (
        (b'{\n "a": 1,,}', "line 2 column 9"),
        (b"[]", "must hold a JSON object, got []"),
        (b'{"a": "\xff"}', "position 7"),
    ):
        file.write_bytes(content)
        done = cli(*commands(model, tmp_path / "out")[command])
        assert done.code == 1
        assert isinstance(done.error, CheckpointError)
        assert str(done.error).startswith(f"{file}: the file must hold")
        assert told in str(done.error)


@pytest.mark.parametrize("state", ["deployed", "float"])
@pytest.mark.parametrize("command", COMMANDS)
def test_weights_outside_of_the_folder(
    cli: Cli, states: dict[str, Path], tmp_path: Path, command: str, state: str
) -> None:
    model = shutil.copytree(states[state], tmp_path / "model")
    lead_out(model, "../outside.safetensors")
    done = cli(*commands(model, tmp_path / "out")[command])
    assert done.code == 1
    if command != "push" or state == "deployed":
        assert "must name files of its own folder, got '../outside" in str(done.error)


@pytest.mark.parametrize("command", ["train", "demo", "deploy"])
def test_packed_models(cli: Cli, model: Path, tmp_path: Path, command: str) -> None:
    fix = "It is packed already" if command == "deploy" else "Train the latent model"
    stock = build("llama", tmp_path / "stock")
    for source, told in ((model, f"got a deployed one\n{fix}"), (stock, "bitlab import")):
        done = cli(*commands(source, tmp_path / "out")[command])
        assert isinstance(done.error, ArgumentError)
        assert f"{command}: the model must be latent or float, got" in str(done.error)
        assert told in str(done.error)
    assert not (tmp_path / "out").exists()


def test_info_of_other_models(cli: Cli, states: dict[str, Path], tmp_path: Path) -> None:
    assert "float" in cli("info", states["float"]).out
    done = cli("info", build("llama", tmp_path / "stock"), "--json")
    assert done.json["scheme"]["quant_method"] == "bitnet"


def test_out_of_reach(
    cli: Cli, states: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    out = tmp_path / "out"
    for arguments in (
        ("eval", "nope/nope", "--text", __file__),
        ("demo", "--model", "nope/nope", "--output", out),
        ("train", states["float"], out, "--text", __file__, "--teacher", "nope/nope"),
    ):
        done = cli(*arguments)
        assert isinstance(done.error, ArgumentError)
        assert "nope/nope: the model must be a folder, or on the hub" in str(done.error)
        assert "Check the name and the connection" in str(done.error)
        # Where the client tells of its retries.
        assert not logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING)
    assert not out.exists()
