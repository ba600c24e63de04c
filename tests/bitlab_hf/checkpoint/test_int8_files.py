"""head="int8": damaged and contradictory files, and heads that have no int8 form."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    Qwen2ForCausalLM,
)

from bitcore.errors import CheckpointError, ConfigError, NonFiniteError
from bitlab_hf import BitLabConfig, deploy, save
from bitlayers import BitLinear
from tests.bitlab_hf.int8 import EMBEDDING, OWNERS, assert_int8, int8, load
from tests.bitlab_hf.models import VOCABULARY, logits_of, make_float_model, rewrite

LAYER = "model.layers.1.mlp.down_proj"
DEPLOYED = {
    "head": int8(mode="infer"),
    "layer": BitLabConfig(int8_layers=[LAYER], mode="infer"),
}


@pytest.fixture(params=sorted(OWNERS))
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders that are written once: tests change copies."""

    @cache
    def of(name: str, kind: str | None = None) -> Path:
        folder = tmp_path_factory.mktemp("made")
        if kind is None:
            return make_float_model(name, folder)
        save(load(of(name), DEPLOYED[kind]), folder)
        return folder

    return of


@pytest.fixture
def source(name: str, made: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made(name), tmp_path / "source"))


@pytest.fixture
def deployed(name: str, made: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made(name, "head"), tmp_path / "deployed"))


@pytest.fixture
def tied(made: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made("qwen2", "head"), tmp_path / "tied"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_rows_are_named_and_nothing_changes(
    source: Path, name: str, value: float, tmp_path: Path
) -> None:
    weight = f"{OWNERS[name]}.weight"
    rewrite(source, lambda tensors: tensors[weight][VOCABULARY - 1].fill_(value))
    with pytest.raises(NonFiniteError, match=re.escape(f"{weight} must be finite")):
        load(source, int8(mode="infer"))
    model = load(source, int8())
    with pytest.raises(NonFiniteError, match=re.escape(f"{weight} must be finite")):
        deploy(model)
    assert type(model.lm_head) is nn.Linear
    assert not any(m.is_deployed for m in model.modules() if isinstance(m, BitLinear))
    assert not hasattr(model, "hf_quantizer")


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("leaf", ["qweight", "qweight_scale"])
@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel], ids=["causal", "base"])
def test_missing_tensors(deployed: Path, name: str, leaf: str, header: bool, auto: Any) -> None:
    key = f"{OWNERS[name]}.{leaf}"
    rewrite(deployed, lambda tensors: tensors.pop(key), header)
    if auto is AutoModel:
        key = key.removeprefix("model.")
        if name == "llama":
            # The base model has no head, and misses nothing.
            load(deployed, auto=auto)
            return
    with pytest.raises(CheckpointError, match=re.escape(f"{key} must be in the checkpoint")):
        load(deployed, auto=auto)


def test_both_tensors_missing(deployed: Path, name: str) -> None:
    owner = OWNERS[name]
    for header in (True, False):
        rewrite(
            deployed,
            lambda tensors: [tensors.pop(key, None) for key in list(tensors) if owner in key],
            header,
        )
        with pytest.raises(CheckpointError, match=re.escape(f"{owner}.qweight must be in the")):
            load(deployed)


@pytest.mark.parametrize(
    ("leaf", "tensor"),
    [
        ("qweight", torch.zeros(VOCABULARY - 1, 64, dtype=torch.int8)),
        ("qweight", torch.zeros(VOCABULARY, 64, dtype=torch.uint8)),
        ("qweight", torch.zeros(VOCABULARY * 64, dtype=torch.int8)),
        ("qweight_scale", torch.ones(1)),
        ("qweight_scale", torch.ones(VOCABULARY, dtype=torch.bfloat16)),
    ],
)
def test_another_shape_or_dtype(deployed: Path, name: str, leaf: str, tensor: Tensor) -> None:
    key = f"{OWNERS[name]}.{leaf}"
    rewrite(deployed, lambda tensors: tensors.update({key: tensor}))
    with pytest.raises(CheckpointError, match=re.escape(f"{key} must be")):
        load(deployed)


def test_values_that_no_writer_produces(deployed: Path, name: str) -> None:
    owner = OWNERS[name]
    good = load_file(deployed / "model.safetensors")
    for leaf, value, message in (
        ("qweight", -128, "must hold codes of -127 to 127, got -128"),
        ("qweight_scale", 0.0, "must be finite and positive"),
        ("qweight_scale", -1.0, "must be finite and positive"),
        ("qweight_scale", float("nan"), "must be finite and positive"),
        ("qweight_scale", float("inf"), "must be finite and positive"),
    ):
        key = f"{owner}.{leaf}"
        bad = good[key].clone()
        bad[5] = value
        rewrite(deployed, lambda tensors, new=(key, bad): tensors.update([new]))
        with pytest.raises(CheckpointError, match=re.escape(f"{key} {message}")):
            load(deployed)
        load(deployed, BitLabConfig(verify=False))
        rewrite(deployed, lambda tensors, key=key: tensors.update({key: good[key]}))
    load(deployed)


def test_a_tied_head_that_is_stored_too(tied: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.qweight"] = -tensors[f"{EMBEDDING}.qweight"]

    rewrite(tied, add)
    with pytest.raises(CheckpointError, match=r"lm_head\.qweight must not be in the checkpoint"):
        load(tied)


def test_configurations_that_contradict_the_tensors(tied: Path) -> None:
    config = json.loads((tied / "config.json").read_text())
    for change, message in (
        ({"tie_word_embeddings": False}, "lm_head.qweight must be in the checkpoint"),
        ({"head": "keep"}, f"{EMBEDDING} must not be in modules_to_not_convert"),
    ):
        changed = copy.deepcopy(config)
        (changed["quantization_config"] if "head" in change else changed).update(change)
        (tied / "config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=re.escape(message)):
            load(tied)


@pytest.mark.parametrize("equal", [True, False])
def test_float_files_that_hold_both_tied_weights(tmp_path: Path, equal: bool) -> None:
    source = make_float_model("qwen2", tmp_path)
    expected = logits_of(load(source, int8(mode="infer")))

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors[f"{EMBEDDING}.weight"].clone()
        if not equal:
            tensors["lm_head.weight"][3] += 1

    rewrite(source, add)
    if equal:
        model = load(source, int8(mode="infer"))
        assert_int8(model, is_tied=True)
        assert torch.equal(logits_of(model), expected)
        return
    with pytest.raises(CheckpointError, match="tied to, got others"):
        load(source, int8(mode="infer"))
    # Latent, transformers warns and leaves them untied, and so does deploy.
    model = deploy(load(source, int8()))
    assert type(model.get_input_embeddings()) is nn.Embedding
    save(model, tmp_path / "untied")
    assert torch.equal(logits_of(load(tmp_path / "untied")), logits_of(model))


def test_a_new_head_cannot_be_quantized_at_load(tmp_path: Path) -> None:
    source = make_float_model("llama", tmp_path)
    rewrite(source, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ConfigError, match=r"must find lm_head\.weight in the checkpoint"):
        load(source, int8(mode="infer"))


def test_another_shape_in_a_float_file(tmp_path: Path) -> None:
    source = make_float_model("llama", tmp_path)
    rewrite(source, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(5, 64)}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight must be float32"):
        load(source, int8(mode="infer"))


def test_heads_that_have_no_int8_form(tmp_path: Path) -> None:
    bert = make_float_model("bert", tmp_path)
    with pytest.raises(ConfigError, match=r"tied head without bias, got cls\.predictions\.decoder"):
        load(bert, int8(), auto=AutoModelForMaskedLM)

    class Doubled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return 2 * super().forward(input)

    model = load(make_float_model("qwen2", tmp_path), int8())
    weight = model.lm_head.weight
    model.model.embed_tokens = Doubled(VOCABULARY, 64)
    model.model.embed_tokens.weight = weight
    with pytest.raises(ConfigError, match=r"plain embedding at model\.embed_tokens.*Doubled"):
        deploy(model)
    assert model.lm_head.weight is weight
    assert not any(m.is_deployed for m in model.modules() if isinstance(m, BitLinear))


def test_a_scaled_embedding_that_does_more_is_refused(tmp_path: Path) -> None:
    model = load(make_float_model("gemma", tmp_path), int8())
    model.model.embed_tokens.extra = nn.Parameter(torch.zeros(64))
    with pytest.raises(ConfigError, match="or one that only scales"):
        deploy(model)


def test_without_bitlab_the_load_fails(tied: Path) -> None:
    config = AutoConfig.from_pretrained(tied)
    del config.quantization_config
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        Qwen2ForCausalLM.from_pretrained(tied, config=config)


@pytest.fixture
def layers(made: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made("llama", "layer"), tmp_path / "layers"))


def reconfigured(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= fields
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize(
    ("leaf", "change", "message"),
    [
        ("qweight", lambda _: None, "must be in the checkpoint"),
        ("qweight_scale", lambda _: None, "must be in the checkpoint"),
        ("qweight", lambda held: held[1:], r"must be int8 \[64, 192\]"),
        ("qweight", lambda held: held.view(torch.uint8), "must be int8"),
        ("qweight_scale", lambda held: held[:1].clone(), "must be float32"),
        ("qweight", lambda held: held.fill_(-128), "-128"),
        ("qweight_scale", lambda held: held.fill_(float("nan")), "finite and positive"),
    ],
)
def test_damaged_layers(layers: Path, header: bool, leaf: str, change: Any, message: str) -> None:
    key = f"{LAYER}.{leaf}"

    def damage(tensors: dict[str, Tensor]) -> None:
        made = change(tensors.pop(key))
        if made is not None:
            tensors[key] = made

    rewrite(layers, damage, header)
    with pytest.raises(CheckpointError, match=f"{re.escape(key)}.*{message}"):
        load(layers)


def test_layers_that_the_configuration_does_not_know(layers: Path) -> None:
    """config.json and the tensors do not belong together."""
    reconfigured(layers, int8_layers=[])
    with pytest.raises(CheckpointError, match=re.escape(f"{LAYER}.qweight must be uint8")):
        load(layers)
    # Too many: a ternary layer is not read as one in int8.
    other = "model.layers.0.mlp.down_proj"
    reconfigured(layers, int8_layers=[LAYER, other])
    with pytest.raises(CheckpointError, match=re.escape(f"{other}.qweight must be int8")):
        load(layers)


def test_names_of_a_file_are_no_patterns(layers: Path) -> None:
    """A name is that of one layer, whatever else it matches as a pattern."""
    reconfigured(layers, int8_layers=[LAYER.replace(".1.", "...")])
    with pytest.raises(CheckpointError, match=re.escape(f"{LAYER}.qweight must be uint8")):
        load(layers)


def test_a_lost_layer_of_a_latent_file(tmp_path: Path) -> None:
    source = make_float_model("llama", tmp_path)
    save(load(source, BitLabConfig(int8_layers=[LAYER])), tmp_path / "latent")
    rewrite(tmp_path / "latent", lambda tensors: tensors.pop(f"{LAYER}.weight"))
    with pytest.raises(CheckpointError, match=re.escape(f"{LAYER}.weight must be in the")):
        load(tmp_path / "latent")


def test_an_older_reader_refuses_layers_in_int8(
    layers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitlab_hf.config.FORMAT_VERSION", 3)
    with pytest.raises(ConfigError, match="format_version must be at most 3, got 4"):
        load(layers)
