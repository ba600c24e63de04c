"""The scheme as options: every field, for every command that takes a float model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from bitcore.errors import ArgumentError, ConfigError
from bitlab_hf import BitLabConfig, deploy
from bitlab_hf.cli.loading import load_model
from bitlab_hf.cli.scheme import OPTIONS, check_same, config_of, pretrained_config
from bitlab_hf.demo.corpus import SourceFile
from bitlab_hf.demo.report import Report
from bitlab_hf.demo.text import Perplexity, make_blocks, measure_perplexity
from tests.bitlab_hf.cli.conftest import DEMO
from tests.bitlab_hf.interop.stock import build

Cli = Callable[..., Any]
SCHEMES: dict[str, dict[str, Any]] = {
    "groups": {"weight_granularity": "per_group", "group_size": 64},
    "groups of floats": {
        "weight_granularity": "per_group",
        "group_size": 128,
        "group_scale_dtype": "float32",
    },
    "rows, twn": {"weight_granularity": "per_channel", "weight_quantizer": "twn"},
    "float activations": {"activation_dtype": "float32", "head": "int8"},
    "a whole input": {"activation_granularity": "per_tensor", "weight_quantizer": "absmax"},
    "learned": {"weight_quantizer": "lsq", "sub_norm": ["o_proj", "down_proj"]},
    "a ternary head": {"head": "ternary", "modules_to_not_convert": ["v_proj"]},
    "a layer": {"layer": "RMSNormBitLinear"},
    "int8 layers": {"int8_layers": ["layers.1.mlp.down_proj", "layers.0.mlp.up_proj"]},
}


def options(scheme: dict[str, Any]) -> list[str]:
    found = []
    for name, value in scheme.items():
        for one in value if isinstance(value, list) else [value]:
            found += [f"--{name.replace('_', '-')}", str(one)]
    return found


def held(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found["quantization_config"]


def test_every_field_has_an_option() -> None:
    known = set(BitLabConfig(**SCHEMES["groups"]).to_dict())
    # One that is empty is not written.
    assert set(OPTIONS) == (known | {"int8_layers"}) - {
        "overrides", "weight_format", "format_version", "quant_method",
    }  # fmt: skip


@pytest.mark.parametrize("kind", SCHEMES)
def test_deploy_and_eval(cli: Cli, states: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """``eval`` of a float model packs it just as ``deploy`` does."""
    scheme, text = SCHEMES[kind], ("--text", __file__, "--length", 32, "--tokens", 320)
    done = cli("deploy", states["float"], tmp_path / "out", *options(scheme))
    assert done.code == 0, done.error
    found = held(tmp_path / "out")
    assert found["format_version"] == {"groups": 2, "int8 layers": 4}.get(kind, 1)
    for name, value in scheme.items():
        # Files of version 1 do not know the second.
        if name not in ("modules_to_not_convert", "group_scale_dtype", "int8_layers"):
            assert found[name] == value
    assert found.get("int8_layers", []) == sorted(
        f"model.{name}" for name in scheme.get("int8_layers", [])
    )
    assert any("v_proj" in name for name in found["modules_to_not_convert"]) == (
        "modules_to_not_convert" in scheme
    )
    at_load = cli("eval", states["float"], *text, *options(scheme), "--json").json
    stored = cli("eval", tmp_path / "out", *text, *options(scheme), "--json").json
    plain = cli("eval", states["float"], *text, "--json").json
    assert at_load["nats"] == stored["nats"] != plain["nats"]


def test_eval_is_of_the_packed_model(cli: Cli, states: dict[str, Path], tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("def main():\n    return 1\n" * 40)
    scheme = SCHEMES["groups"]
    done = cli("eval", states["float"], "--text", book, "--length", 32, *options(scheme), "--json")
    model = AutoModelForCausalLM.from_pretrained(
        states["float"], quantization_config=BitLabConfig(**scheme)
    )
    tokenizer = AutoTokenizer.from_pretrained(states["float"])
    blocks = make_blocks(tokenizer, [SourceFile("", book.read_text())], 32)
    assert done.json["nats"] == measure_perplexity(deploy(model), blocks, 4).nats


def test_train(cli: Cli, states: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "latent"
    given = ("train", states["float"], out, "--text", __file__, "--length", 16, "--batch", 2,
             "--recipe", "plain", "--save-every", 1)  # fmt: skip
    scheme = {"weight_granularity": "per_group", "group_size": 64, "weight_quantizer": "twn"}
    done = cli(*given, "--steps", 1, *options(scheme))
    assert done.code == 0, done.error
    assert {name: held(out)[name] for name in scheme} == scheme
    assert held(out)["weight_format"] == "latent"
    for other in ({}, {**scheme, "weight_quantizer": "absmean"}):
        done = cli(*given, "--steps", 2, "--resume", *options(other))
        assert isinstance(done.error, ArgumentError)
        assert "checkpoint-1" in str(done.error)
    assert cli(*given, "--steps", 2, "--resume", *options(scheme)).code == 0
    # A latent model has its scheme.
    latent = ("train", out, tmp_path / "more", *given[3:], "--steps", 1)
    assert "be its own 'twn'" in str(cli(*latent, "--estimator", "lsq").error)
    assert cli(*latent, "--estimator", "twn").code == 0
    assert held(tmp_path / "more")["group_size"] == 64


@pytest.mark.parametrize("command", ["train", "deploy", "eval", "demo"])
def test_refused(cli: Cli, states: dict[str, Path], tmp_path: Path, command: str) -> None:
    out = tmp_path / "out"

    def run(model: Path, *more: object) -> str:
        arguments = {
            "train": (model, out, "--text", __file__),
            "deploy": (model, out),
            "eval": (model, "--text", __file__),
            "demo": ("--model", model, "--output", out),
        }[command]
        done = cli(command, *arguments, *more)
        assert done.code == 1
        assert isinstance(done.error, (ArgumentError, ConfigError))
        return str(done.error)

    rows = ("--weight-granularity", "per_channel")
    unless = "must be left out unless --weight-granularity is per_group, got"
    for given, told in (
        (("--weight-granularity", "per_galaxy"), "weight_granularity must be one of"),
        ((*rows, "--group-size", 64), f"{command}: --group-size {unless} 64"),
        ((*rows, "--group-scale-dtype", "uint8"), f"--group-scale-dtype {unless} 'uint8'"),
        (("--weight", "per_group", "--group-size", 0), "group_size must be one of"),
        (
            ("--weight", "per_group", "--group-size", 64, "--group-scale-dtype", "int8"),
            "group_scale_dtype must be one of",
        ),
        (("--activation-dtype", "int4"), "activation_dtype must be one of"),
        (("--estimator", "nonsense"), "weight_quantizer must be one of"),
        (("--layer", "Nonsense"), "layer must be one of"),
        (("--head", "float"), "head must be one of"),
        (("--layer", "Nonsense", "--sub-norm", "o_proj"), "layer must be 'BitLinear'"),
        (("--modules-to-not-convert", "("), "must be names or regular expressions"),
    ):
        assert told in run(states["float"], *given)
    if command in ("deploy", "eval"):
        assert f"--group-size {unless} 64" in run(states["float"], "--group-size", 64)
        assert "--group-size must be one of (64, 128) with --weight-granularity per_group" in run(
            states["float"], "--weight", "per_group"
        )
    for given in (("--head", "int8"), ("--weight", "per_channel"), ("--sub-norm", "o_proj")):
        assert "must be left out for a model that has a scheme" in run(states["latent"], *given)
    if command == "eval":
        assert "be its own 'keep', got 'int8'" in run(states["deployed"], "--head", "int8")
        stock = build("llama", tmp_path / "stock")
        assert "of the method 'bitnet'" in run(stock, "--head", "int8")
        assert "--record: the scheme must be left out" in run(
            states["float"], "--head", "int8", "--record"
        )
    assert not out.exists()


def test_demo(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the demo is given: the scheme, and how to load."""
    given: list[Any] = []

    class Demo:
        def __init__(self, settings: Any, _console: Any, load: Any) -> None:
            given.extend((settings, load))

        def run(self) -> Any:
            return Report("x", 1, "")

    monkeypatch.setattr("bitlab_hf.demo.run.Demo", Demo)
    scheme = SCHEMES["groups"]
    done = cli("demo", "--output", tmp_path / "out", *options(scheme), "--json")
    assert done.code == 0, done.error
    assert done.json["model"] == "x"
    settings, load = given
    assert (settings.config.group_size, settings.config.mode) == (64, "auto")
    assert (settings.model, settings.folder) == (None, str(DEMO))
    assert load is load_model
    # Groups, unless others are asked for: also of the model that ships with BitLab.
    for model, expected in (
        ((), ("per_group", 128)),
        (("--model", DEMO), ("per_group", 128)),
        (("--model", DEMO, "--weight", "per_tensor"), ("per_tensor", None)),
    ):
        given.clear()
        cli("demo", *model, "--output", tmp_path / "out", "--json")
        config = given[0].config
        assert (config.weight_granularity, config.group_size) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("per_group", 128, "uint8")),
        ({"group_size": 64}, ("per_group", 64, "uint8")),
        ({"weight_granularity": "per_group"}, ("per_group", 128, "uint8")),
        ({"group_scale_dtype": "float32"}, ("per_group", 128, "float32")),
        ({"weight_granularity": "per_channel"}, ("per_channel", None, None)),
        ({"weight_granularity": "per_tensor"}, ("per_tensor", None, None)),
    ],
)
def test_groups_of_a_pretrained_model(
    given: dict[str, Any], expected: tuple[Any, ...], states: dict[str, Path]
) -> None:
    """What is given wins; without a model at hand, it is checked all the same."""
    config = pretrained_config("x", given, None, str(states["float"]))
    layer = config.layer_config("model.layers.0.mlp.up_proj")
    assert (layer.weight_granularity, layer.group_size, layer.group_scale_dtype) == expected
    assert config.overrides == {}
    # Scales of groups are learned, unless another estimator is asked for.
    assert config.weight_quantizer == ("lsq" if config.group_size else "absmean")
    asked = pretrained_config("x", {**given, "weight_quantizer": "twn"}, None, str(states["float"]))
    assert asked.weight_quantizer == "twn"
    pretrained_config("x", given, None)
    # A latent model has its scheme.
    theirs = BitLabConfig().to_dict()
    if not given:
        assert pretrained_config("x", given, theirs).weight_granularity == "per_tensor"


def test_a_model_of_no_groups(tmp_path: Path) -> None:
    sizes = {"hidden_size": 100, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 97,
             "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    LlamaConfig(**sizes, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    config = pretrained_config("x", {}, None, str(tmp_path))
    assert (config.weight_granularity, config.overrides) == ("per_channel", {})
    with pytest.raises(ConfigError, match="--group-scale-dtype must be left out unless"):
        pretrained_config("x", {"group_scale_dtype": "uint8"}, None, str(tmp_path))


def test_config_of() -> None:
    assert config_of("x", {}, None, mode="infer").mode == "infer"
    theirs = BitLabConfig(modules_to_not_convert=["lm_head", "a"]).to_dict()
    check_same("x", {"modules_to_not_convert": ["a"], "activation_granularity": "per_channel"},
               theirs)  # fmt: skip
    with pytest.raises(ArgumentError, match="modules_to_not_convert must be left out"):
        check_same("x", {"modules_to_not_convert": ["b"]}, theirs)
    check_same("x", {}, {"quant_method": "bitnet"})
    # A file has the names that the patterns matched.
    theirs = BitLabConfig(int8_layers=["layers.1.mlp.down_proj", "layers.1.mlp.up_proj"]).to_dict()
    for same in (["layers.1.mlp"], ["up_proj", "down_proj"], theirs["int8_layers"]):
        check_same("x", {"int8_layers": same}, theirs)
    for other in (["up_proj"], ["layers.1", "o_proj"], ["layers.0"]):
        with pytest.raises(ArgumentError, match="int8_layers must be left out"):
            check_same("x", {"int8_layers": other}, theirs)
    with pytest.raises(ArgumentError, match="int8_layers must be left out"):
        check_same("x", {"int8_layers": ["up_proj"]}, BitLabConfig().to_dict())


def test_what_is_not_finite_is_null(cli: Cli, states: dict[str, Path], tmp_path: Path) -> None:
    """JSON knows neither NaN nor infinity; a loss of 1e4 nats has no perplexity in a float."""
    assert Perplexity(1e4, 1.0).value == math.inf
    assert math.isnan(Perplexity(math.nan, 1.0).value)
    model = AutoModelForCausalLM.from_pretrained(states["float"])
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(states["float"]).save_pretrained(tmp_path)
    found = cli("eval", tmp_path, "--text", __file__, "--length", 32, "--json").json
    assert (found["nats"], found["perplexity"]) == (None, None)
