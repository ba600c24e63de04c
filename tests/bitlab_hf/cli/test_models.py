"""Commands that turn one folder into another."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitcore.errors import ArgumentError
from bitlab_hf import (
    BitLabConfig,
    Facts,
    deploy,
    export_compressed_tensors,
    load_bitnet,
    save,
)
from bitlab_hf.model.tree import quantized_layers
from tests.bitlab_hf.interop import test_ternary
from tests.bitlab_hf.interop.stock import build

Cli = Callable[..., Any]
IDS = torch.arange(3, 27).view(1, 24)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(input_ids=IDS).logits
    return result


def test_deploy_of_latent(cli: Cli, states: dict[str, Path], tmp_path: Path) -> None:
    done = cli("deploy", states["latent"], tmp_path / "out", "--json")
    assert done.code == 0, done.error
    expected = logits(deploy(AutoModelForCausalLM.from_pretrained(states["latent"])))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(model), expected)
    assert done.json["bytes_after"] < done.json["bytes_before"]
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 2048
    assert (tmp_path / "out/README.md").exists()


def test_deploy_of_float(cli: Cli, states: dict[str, Path], tmp_path: Path) -> None:
    done = cli("deploy", states["float"], tmp_path / "out", "--weight", "per_group",
               "--group-size", 64, "--activation", "float32")  # fmt: skip
    assert done.code == 0, done.error
    assert "deployed" in done.out
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.quantization_config
    assert (config.group_size, config.activation_dtype) == (64, "float32")


MADE: dict[str, Any] = {"base_model": "someone/a-model", "recipe": "default", "data": "notes"}
FACTS = Facts(**MADE, perplexities={"held out": 9.875}, speeds={"2 threads": 41.25})


def assert_told(folder: Path, measured: bool) -> None:
    """A folder and its card tell how the model was made, and with ``measured`` its perplexity."""
    perplexities = FACTS.perplexities if measured else {}
    assert Facts.load(folder) == Facts(**MADE, perplexities=perplexities)
    card = (folder / "README.md").read_text()
    assert "| data | notes |" in card
    assert ("| held out | 9.875 |" in card) == measured
    assert "41.2" not in card


@pytest.mark.parametrize(
    ("scheme", "measured"),
    [
        (None, False),
        ({}, True),
        ({"head": "int8"}, False),
        ({"int8_layers": ["down_proj"]}, False),
    ],
)
def test_deploy_tells_what_stays_true(
    cli: Cli, states: dict[str, Path], tmp_path: Path, scheme: dict[str, Any] | None, measured: bool
) -> None:
    """Nothing that was measured on other weights, and no speed."""
    source = states["float" if scheme is None else "latent"]
    if scheme:
        config = BitLabConfig(**scheme)
        model = AutoModelForCausalLM.from_pretrained(states["float"], quantization_config=config)
        source = tmp_path / "made"
        save(model, source, tokenizer=AutoTokenizer.from_pretrained(states["float"]))
    shutil.copytree(source, tmp_path / "source")
    FACTS.save(tmp_path / "source")
    done = cli("deploy", tmp_path / "source", tmp_path / "out")
    assert done.code == 0, done.error
    assert_told(tmp_path / "out", measured)


def test_convert_and_import_tell_what_stays_true(
    cli: Cli, states: dict[str, Path], tmp_path: Path
) -> None:
    source = test_ternary.build(tmp_path / "source")
    FACTS.save(source)
    for dtype in ("float32", "uint8"):
        done = cli("convert", source, tmp_path / dtype, "--group-scale-dtype", dtype)
        assert done.code == 0, done.error
        # Of rounded scales, others.
        assert_told(tmp_path / dtype, measured=dtype == "float32")
    deployed = AutoModelForCausalLM.from_pretrained(states["deployed"])
    export_compressed_tensors(deployed, tmp_path / "compressed")
    FACTS.save(tmp_path / "compressed")
    done = cli("import", tmp_path / "compressed", tmp_path / "imported")
    assert done.code == 0, done.error
    assert_told(tmp_path / "imported", measured=False)


def test_deploy_refuses(cli: Cli, states: dict[str, Path], tmp_path: Path) -> None:
    done = cli("deploy", states["latent"], tmp_path / "out", "--activation", "float32")
    assert "must be left out for a model that has a scheme" in str(done.error)
    done = cli("deploy", states["deployed"], tmp_path / "out")
    assert "must be latent or float, got a deployed one" in str(done.error)
    done = cli("deploy", states["float"], tmp_path / "out", "--weight", "per_galaxy")
    assert "weight_granularity must be one of" in str(done.error)
    done = cli("deploy", tmp_path / "nowhere", tmp_path / "out")
    assert "must be a folder or a hub name" in str(done.error)
    (tmp_path / "empty").mkdir()
    done = cli("deploy", tmp_path / "empty", tmp_path / "out")
    assert "must hold config.json" in str(done.error)
    assert done.code == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [("deploy",), ("convert",), ("import",), ("export",), ("train", "--text", __file__)],
)
def test_no_command_writes_over_its_model(
    cli: Cli, states: dict[str, Path], tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    model = shutil.copytree(states["float"], tmp_path / "model")
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    (tmp_path / "link").symlink_to(model)
    for output in (model, tmp_path / "link"):
        done = cli(arguments[0], model, output, *arguments[1:])
        assert "the output must be another folder than the model's" in str(done.error)
        assert {file.name: file.read_bytes() for file in model.iterdir()} == before


@pytest.mark.parametrize("below", ["", "model"])
@pytest.mark.parametrize("command", ["deploy", "convert", "import", "export", "train", "demo"])
def test_output_that_is_a_file(
    cli: Cli, states: dict[str, Path], tmp_path: Path, command: str, below: str
) -> None:
    (tmp_path / "out").write_text("mine")
    output = tmp_path / "out" / below
    options = ["--text", __file__] if command == "train" else []
    given = ["--output", output] if command == "demo" else [states["float"], output, *options]
    done = cli(command, *given)
    assert isinstance(done.error, ArgumentError)
    assert f"the output must be a folder or a new name, got {output}" in str(done.error)
    assert (tmp_path / "out").read_text() == "mine"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_convert(cli: Cli, tmp_path: Path) -> None:
    source = test_ternary.build(tmp_path / "source")
    done = cli("convert", source, tmp_path / "out", "--json")
    assert done.code == 0, done.error
    assert len(done.json["packed"]) == 15
    assert done.json["kept"].keys() == {"lm_head.weight"}
    test_ternary.assert_same_model(source, tmp_path / "out")
    shown = cli("convert", source, tmp_path / "out").out
    assert "15 matrices packed" in shown
    assert "kept lm_head.weight" in shown
    test_ternary.change(source, "model.layers.0.mlp.up_proj.weight", 0, 0, 0.5)
    done = cli("convert", source, tmp_path / "other")
    assert done.code == 1
    assert "--keep-inexact" in str(done.error)
    assert cli("convert", source, tmp_path / "other", "--keep-inexact").code == 0


def test_convert_to_two_levels(cli: Cli, tmp_path: Path) -> None:
    source = test_ternary.build(tmp_path / "source")
    exact = cli("convert", source, tmp_path / "out")
    assert "every value proven equal" in exact.out
    assert "--group-scale-dtype uint8 rounds them" in exact.out
    two = ("convert", source, tmp_path / "out", "--group-scale-dtype", "uint8")
    change = cli(*two, "--json").json["scale_change"]
    assert 0 < change < 0.03
    shown = cli(*two).out
    assert f"every code proven equal, scales rounded by up to {change:.2g} of" in shown
    assert "rounds them" not in shown
    done = cli("convert", source, tmp_path / "no", "--group-scale-dtype", "int8")
    assert "group_scale_dtype must be one of ('float32', 'uint8'), got 'int8'" in str(done.error)
    assert not (tmp_path / "no").exists()


def test_groups_to_gguf_and_back(cli: Cli, states: dict[str, Path], tmp_path: Path) -> None:
    scheme = ("--weight", "per_group", "--group-size", 64)
    cli("deploy", states["float"], tmp_path / "groups", *scheme)
    file = tmp_path / "groups.gguf"
    done = cli("export", tmp_path / "groups", file, "--to", "gguf", "--json")
    assert done.code == 0, done.error
    change = done.json["scale_change"]
    assert 0 < change <= 2**-11
    shown = cli("export", tmp_path / "groups", file, "--to", "gguf").out
    assert f"scales rounded by up to {change:.2g} of themselves" in shown
    shouted = shutil.copyfile(file, tmp_path / "SHOUTED.GGUF")
    exact = cli("import", shouted, tmp_path / "again", "--json").json
    assert exact["scale_change"] == 0
    assert "rounds them" in cli("import", file, tmp_path / "again").out
    rounded = cli("import", file, tmp_path / "two", "--group-scale-dtype", "uint8", "--json").json
    assert 0 < rounded["scale_change"] < 2**-10
    assert rounded["bytes_after"] < exact["bytes_after"]
    stock = build("llama", tmp_path / "stock")
    done = cli("import", stock, tmp_path / "no", "--group-scale-dtype", "uint8")
    assert "--group-scale-dtype must be left out for a bitnet checkpoint" in str(done.error)


def test_compressed_tensors_and_back(cli: Cli, states: dict[str, Path], tmp_path: Path) -> None:
    scheme = ("--weight", "per_group", "--group-size", 64)
    cli("deploy", states["float"], tmp_path / "groups", *scheme)
    to = ("--to", "compressed-tensors")
    done = cli("export", tmp_path / "groups", tmp_path / "ct", *to)
    assert done.code == 0, done.error
    assert "activations are int8 in BitLab and floats in readers" in done.out
    back = ("--activation", "int8", "--group-scale-dtype", "uint8")
    done = cli("import", tmp_path / "ct", tmp_path / "again", *back, "--json")
    assert done.code == 0, done.error
    assert done.json["scale_change"] == 0
    ours, theirs = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "groups", tmp_path / "again")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    other = cli("export", tmp_path / "again", tmp_path / "again/config.json", *to)
    assert other.code == 1


def test_import_and_export(cli: Cli, tmp_path: Path) -> None:
    source = build("bitnet", tmp_path / "source")
    done = cli("import", source, tmp_path / "ours", "--json")
    assert done.code == 0, done.error
    expected = logits(load_bitnet(source))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(logits(model), expected)
    done = cli("export", tmp_path / "ours", tmp_path / "stock")
    assert done.code == 0, done.error
    assert "exported" in done.out
    again = load_bitnet(tmp_path / "stock")
    for ours, theirs in zip(quantized_layers(model), quantized_layers(again), strict=True):
        assert torch.equal(ours.module.qweight, theirs.module.qweight)
    assert cli("export", tmp_path / "ours", tmp_path / "x", "--to", "floppy").code == 2


def test_export_of_gguf(cli: Cli, states: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "demo.gguf"
    done = cli("export", states["deployed"], file, "--to", "gguf", "--qtype", "TQ1_0", "--json")
    assert done.code == 0, done.error
    assert done.json["bytes_after"] == file.stat().st_size
    assert file.read_bytes()[:4] == b"GGUF"
    assert cli("export", states["deployed"], file, "--to", "gguf").code == 0
    (tmp_path / "notes.txt").write_text("mine")
    for output, told in (
        (tmp_path / "notes.txt", "must be new or a GGUF file, got"),
        (tmp_path, "must be a file or a new name, got"),
        (tmp_path / "notes.txt/model.gguf", "the output must be a folder or a new name, got"),
    ):
        done = cli("export", states["deployed"], output, "--to", "gguf")
        assert isinstance(done.error, ArgumentError)
        assert told in str(done.error)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    done = cli("export", states["deployed"], file, "--to", "gguf", "--qtype", "Q4_K")
    assert "qtype must be one of" in str(done.error)


@pytest.mark.parametrize("command", ["deploy", "convert", "import", "export"])
def test_usage(cli: Cli, command: str) -> None:
    assert cli(command).code == 2
    shown = cli(command, "--help")
    assert shown.code == 0
    assert f"bitlab {command} " in shown.out


def test_bars(
    cli: Cli, states: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal, what loads and what is written is shown with the time left."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    build("llama", tmp_path / "stock")
    for arguments, titles in (
        (("deploy", states["float"], tmp_path / "packed"), ("loading weights", "writing model")),
        (("import", tmp_path / "stock", tmp_path / "own"), ("loading weights", "writing model")),
        (("export", states["deployed"], tmp_path / "a.gguf", "--to", "gguf"), ("exporting",)),
    ):
        done = cli(*arguments)
        assert done.code == 0, done.error
        assert all(title in done.err for title in (*titles, "left")), done.err
        assert "left" not in done.out
