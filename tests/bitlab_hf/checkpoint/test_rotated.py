"""Checkpoints whose weights are rotated are refused: without the rotation they would run wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from bitcore.errors import CheckpointError, ConfigError
from bitlab_hf import (
    BitLabConfig,
    convert_ternary,
    import_compressed_tensors,
    load_bitnet,
    load_gguf,
    save,
)
from bitlab_hf.checkpoint.rotated import check_not_rotated
from bitlab_hf.cli.app import app
from tests.bitlab_hf.interop import stock, test_compressed, test_gguf, test_ternary
from tests.bitlab_hf.models import make_float_model
from tests.bitlab_hf.sweep.configs import small
from tests.bitlab_hf.sweep.models import architectures, config_class


def described(folder: Path, **fields: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


def deploy_command(source: Path, out: Path) -> None:
    done = CliRunner().invoke(app, ["deploy", str(source), str(out)])
    if done.exception is not None:
        raise done.exception


def load(mode: str, source: Path, out: Path) -> None:
    config = BitLabConfig(mode=mode)
    save(AutoModelForCausalLM.from_pretrained(source, quantization_config=config), out)


def load_saved(mode: str, source: Path, out: Path) -> None:
    """BitLab's own folder, latent or deployed, of a model that was rotated before."""
    config = json.loads((source / "config.json").read_text())
    added = {name: config.pop(name) for name in [*config] if name in ADDED}
    (source / "config.json").write_text(json.dumps(config))
    saved = source.with_name(f"{source.name}-{mode}")
    load(mode, source, saved)
    save(AutoModelForCausalLM.from_pretrained(described(saved, **added)), out)


ADDED = {
    "rotation": {"kind": "random", "seed": 0},
    "online_hadamard": True,
    "extra": {"spinquant_matrices": ["R1"]},
    "stages": [{"weights_rotated": 1}],
    "quarot_seed": 3,
}
# What every second model says of its position embeddings, and what says nothing.
ORDINARY: dict[str, Any] = {
    "rotary_dim": 64,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "rope_theta": 10000.0,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
    },
    "partial_rotary_factor": 0.5,
    "label2id": {"rotated": 0},
    "id2label": {"0": "rotated"},
    "hadamard": False,
    "rotation": None,
    "rotation_config": {},
    "text_config_of_another": {"rotary_dim": 64, "rotation": "none"},
}  # fmt: skip


def ternary_source(folder: Path) -> Path:
    return test_ternary.build(folder / "ternary", "per_tensor")


def float_source(folder: Path) -> Path:
    return make_float_model("llama", folder)


# Every way in: how a source of it is made, and what takes it.
WAYS: dict[str, tuple[Callable[[Path], Path], Callable[[Path, Path], Any]]] = {
    "convert": (ternary_source, convert_ternary),
    "compressed-tensors": (test_compressed.folder_of, import_compressed_tensors),
    "bitnet": (
        lambda folder: stock.build("llama", folder / "stock"),
        lambda source, out: save(load_bitnet(source), out),
    ),
    "infer": (float_source, partial(load, "infer")),
    "train": (float_source, partial(load, "train")),
    "saved latent": (float_source, partial(load_saved, "train")),
    "saved deployed": (float_source, partial(load_saved, "infer")),
    "bitlab deploy": (float_source, deploy_command),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_in_refuses_it(way: str, tmp_path: Path) -> None:
    build, take = WAYS[way]
    for number, (name, value) in enumerate(ADDED.items()):
        source = described(build(tmp_path / str(number)), **{name: value})
        with pytest.raises(ConfigError, match=r"(?s)must be empty.*do not rotate their inputs"):
            take(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("way", WAYS)
def test_every_way_in_takes_an_ordinary_one(way: str, tmp_path: Path) -> None:
    build, take = WAYS[way]
    take(described(build(tmp_path), **ORDINARY), tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").exists()


def test_what_a_bitnet_scheme_says(tmp_path: Path) -> None:
    source = stock.build("llama", tmp_path, rotation_seed=1)
    with pytest.raises(ConfigError, match="load_bitnet: rotation_seed must be empty"):
        load_bitnet(source)


def test_words_that_say_nothing() -> None:
    check_not_rotated("test", {**ORDINARY, "text_config": ORDINARY, "layers": [ORDINARY, 1]})


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.rotation", "model.R1", "model.layers.1.smooth.weight"]
)
def test_a_tensor_that_the_model_has_no_place_for(name: str, tmp_path: Path) -> None:
    source = test_ternary.build(tmp_path / "source", "per_tensor")
    tensors = load_file(source / "model.safetensors")
    left_over = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file({**tensors, **left_over}, source / "model.safetensors", {"format": "pt"})
    convert_ternary(source, tmp_path / "fine")
    save_file({**tensors, name: torch.eye(8)}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"got '{name}'"):
        convert_ternary(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_gguf_file(tmp_path: Path) -> None:
    import gguf
    from transformers import AutoTokenizer

    from bitlab_hf import export_gguf

    tokenizer = AutoTokenizer.from_pretrained(test_gguf.DEMO)
    add = gguf.GGUFWriter.add_vocab_size

    def with_rotation(writer: Any, size: int) -> None:
        add(writer, size)
        writer.add_string("llama.rotation.kind", "hadamard")

    with pytest.MonkeyPatch.context() as other:
        other.setattr(gguf.GGUFWriter, "add_vocab_size", with_rotation)
        export_gguf(test_gguf.build("llama"), tmp_path / "model.gguf", tokenizer=tokenizer)
    with pytest.raises(ConfigError, match=r"llama\.rotation\.kind must be empty"):
        load_gguf(tmp_path / "model.gguf")


def test_no_architecture_of_transformers_is_refused_for_its_own_fields() -> None:
    names = architectures()
    assert len(names) >= 450
    for name in names:
        check_not_rotated(name, small(config_class(name)).to_dict())
