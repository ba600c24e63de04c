"""What a load may lack and have too much of, and that no code of a model ever runs."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from bitcore.errors import ArgumentError, CheckpointError
from bitlab_hf import BitLabConfig, load_bitnet
from bitlab_hf.cli.common import quiet
from bitlab_hf.cli.loading import load_model, load_whole, tokenizer_if_any
from tests.bitlab_hf.cli.damage import LOADING, change, commands, set_config
from tests.bitlab_hf.interop.stock import SIZES, build

Run = Callable[..., Any]


@pytest.mark.parametrize("tied", [True, False])
def test_whole_models(tied: bool, tmp_path: Path) -> None:
    """Tied weights, and those that a scheme adds, are in no file and not missing."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))
    model.save_pretrained(tmp_path)
    schemes: tuple[Any, ...] = (
        None,
        BitLabConfig(weight_quantizer="lsq", sub_norm=["o_proj"]),
        BitLabConfig(weight_quantizer="lsq", sub_norm=["o_proj"], mode="infer"),
        BitLabConfig(head="int8", mode="infer"),
        BitLabConfig(head="ternary"),
    )
    for scheme in schemes:
        options = {} if scheme is None else {"quantization_config": scheme}
        loaded = load_model(str(tmp_path), **options)
        assert not loaded.training
        assert torch.equal(loaded.model.norm.weight, model.model.norm.weight)


def test_leftovers_that_are_no_weights(tmp_path: Path) -> None:
    """Buffers of older versions, and the parts of another task, are of no layer here."""
    GPT2LMHeadModel(GPT2Config(n_embd=64, n_head=4, n_layer=2, vocab_size=97)).save_pretrained(
        tmp_path
    )
    mask, head = torch.ones(1, 1, 8, 8), torch.ones(2, 64)
    change(
        tmp_path,
        lambda held: held.update(
            {"transformer.h.0.attn.bias": mask, "transformer.h.0.attn.masked_bias": mask[0, 0, 0],
             "score.weight": head, "vision.tower.weight": head}
        ),
    )  # fmt: skip
    load_model(str(tmp_path))
    change(tmp_path, lambda held: held.update({"transformer.h.0.mlp.c_fc.weight_scale": head}))
    with pytest.raises(CheckpointError, match=r"got transformer\.h\.0\.mlp\.c_fc\.weight_scale"):
        load_model(str(tmp_path))


def test_bitnet(tmp_path: Path) -> None:
    model = build("bitnet", tmp_path)
    assert torch.equal(
        load_model(str(model)).lm_head.weight, load_bitnet(model).get_output_embeddings().weight
    )
    change(model, lambda held: held.pop("model.embed_tokens.weight"))
    with pytest.raises(CheckpointError, match=r"none of model\.embed_tokens\.weight"):
        load_model(str(model))


def test_a_conversion_that_fails(tmp_path: Path) -> None:
    """Experts that transformers stacks while loading; its error does not say which do not fit."""
    config = Qwen2MoeConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, moe_intermediate_size=64,
        shared_expert_intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    Qwen2MoeForCausalLM(config).save_pretrained(tmp_path)
    assert load_model(str(tmp_path))
    name = "model.layers.0.mlp.experts.1.down_proj.weight"
    change(tmp_path, lambda held: held.update({name: held[name][1:]}))
    level = logging.getLogger("transformers.modeling_utils").level
    with pytest.raises(CheckpointError, match="weights must fit the model, got .*experts"):
        load_model(str(tmp_path))
    assert logging.getLogger("transformers.modeling_utils").level == level


def test_errors_name_the_model(states: dict[str, Path]) -> None:
    def load(*_given: Any, **_options: Any) -> None:
        raise CheckpointError("a tensor must be whole")

    with pytest.raises(CheckpointError, match=r"^here: a tensor must be whole$"):
        load_whole(load, "here")


_CODE = "open(__file__ + '.ran', 'w').close()\nraise SystemExit('it ran')\n"


@pytest.mark.parametrize("kind", ["evil", "vit"])
def test_no_code_runs(bitlab: Run, states: dict[str, Path], tmp_path: Path, kind: str) -> None:
    model = with_code(states["float"], tmp_path / "model", kind)
    for command in (*LOADING, "convert", "import"):
        done = bitlab(*commands(model, tmp_path / "out")[command], "--json", text="y\n" * 9)
        assert not list(tmp_path.rglob("*.ran"))
        assert done.code == 1
        assert "transformers itself has, got auto_map in config.json" in done.json["error"]
    assert bitlab("info", model).code == 0


def with_code(source: Path, folder: Path, kind: str) -> Path:
    shutil.copytree(source, folder)
    own = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    set_config(folder, model_type=kind, auto_map=own)
    (folder / "code.py").write_text(_CODE)
    return folder


def test_a_class_that_transformers_has(
    bitlab: Run, states: dict[str, Path], tmp_path: Path
) -> None:
    """Code beside it is not needed, and does not run."""
    model = with_code(states["float"], tmp_path / "model", "llama")
    for command in ("deploy", "eval", "generate"):
        done = bitlab(*commands(model, tmp_path / "out")[command], text="y\n" * 9)
        assert done.code == 0, done.err
        assert not list(tmp_path.rglob("*.ran"))


def test_no_code_of_a_tokenizer_runs(bitlab: Run, states: dict[str, Path], tmp_path: Path) -> None:
    model = shutil.copytree(states["float"], tmp_path / "model")
    file = model / "tokenizer_config.json"
    fields = {"auto_map": {"AutoTokenizer": ["code.Own", None]}, "tokenizer_class": "Own"}
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    (model / "code.py").write_text(_CODE)
    for command in LOADING:
        done = bitlab(*commands(model, tmp_path / "out")[command], "--json", text="y\n" * 9)
        assert not list(tmp_path.rglob("*.ran"))
        assert done.code == 1
        if command not in ("export", "demo"):
            assert "got auto_map in tokenizer_config.json" in done.json["error"]


def test_nobody_is_asked(
    states: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where a load of another room says nothing of remote code."""
    model = shutil.copytree(states["float"], tmp_path / "model")
    set_config(model, model_type="evil", auto_map={"AutoConfig": "code.Config"})
    (model / "code.py").write_text(_CODE)
    monkeypatch.setattr("builtins.input", lambda _prompt: pytest.fail("it asked"))
    monkeypatch.setattr("transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE", 15)
    quiet()
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(model)


def test_a_tokenizer_if_any(states: dict[str, Path], tmp_path: Path) -> None:
    assert tokenizer_if_any(str(states["float"])) is not None
    assert tokenizer_if_any(str(build("llama", tmp_path))) is None
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Nonsense"}')
    with pytest.raises(ArgumentError, match="must have a tokenizer, got none"):
        tokenizer_if_any(str(tmp_path))
