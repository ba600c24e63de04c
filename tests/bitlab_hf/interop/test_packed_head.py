"""A packed output head of a model that ties it to a float embedding, in others' formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
)

from bitcore.errors import ArgumentError
from bitlab_hf import (
    BitLabConfig,
    deploy,
    export_bitnet,
    export_compressed_tensors,
    load_bitnet,
    load_compressed_tensors,
    replace_linear,
)
from bitlab_hf.model.tree import quantized_layers
from bitlayers import BitLinear
from tests.bitlab_hf.interop.stock import SIZES, outputs, stock_outputs
from tests.processes import Elsewhere

STATES = ["latent", "deployed"]


def build(state: str, head: str = "ternary") -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, "vocab_size": 100}, tie_word_embeddings=True)
    model: Any = LlamaForCausalLM(config)
    replace_linear(model, BitLabConfig(head=head))
    return deploy(model) if state == "deployed" else model.eval()


def export(kind: str, model: Any, folder: Path) -> dict[str, Any]:
    """Writes a folder; returns its configuration. The model stays as it was."""
    fields = model.config.to_dict()
    (export_bitnet if kind == "bitnet" else export_compressed_tensors)(model, folder)
    assert model.config.to_dict() == fields
    return dict(json.loads((folder / "config.json").read_text()))


def same_layers(ours: Any, theirs: Any) -> None:
    for one, other in zip(quantized_layers(ours), quantized_layers(theirs), strict=True):
        assert one.names == other.names
        pairs = zip(one.module.packed(), other.module.packed(), strict=True)
        # In a bitnet file a scale is its reciprocal.
        assert all(torch.allclose(a, b, rtol=1e-6, atol=0) for a, b in pairs)


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found["logits"], expected["logits"], atol=1e-4, rtol=0)
    assert torch.equal(found["tokens"], expected["tokens"])


@pytest.mark.parametrize("kind", ["bitnet", "compressed-tensors"])
@pytest.mark.parametrize("state", STATES)
def test_it_is_no_longer_tied(state: str, kind: str, tmp_path: Path) -> None:
    model = build(state)
    assert export(kind, model, tmp_path / "out")["tie_word_embeddings"] is False
    if kind == "bitnet":
        again: Any = load_bitnet(tmp_path / "out")
    else:
        again = load_compressed_tensors(tmp_path / "out", activation_dtype="int8")
    assert isinstance(again.lm_head, BitLinear)
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)
    same_layers(model, again)
    close(outputs(again), outputs(model))


@pytest.mark.parametrize("kind", ["bitnet", "compressed-tensors"])
def test_a_float_head_stays_tied(kind: str, tmp_path: Path) -> None:
    assert export(kind, build("latent", "keep"), tmp_path / "out")["tie_word_embeddings"] is True


@pytest.mark.parametrize("kind", ["bitnet", "compressed-tensors"])
@pytest.mark.parametrize("state", STATES)
def test_a_model_that_ties_more_is_refused(state: str, kind: str, tmp_path: Path) -> None:
    """Without the field, a load would leave the embeddings of encoder and decoder at random."""
    model: Any = BartForConditionalGeneration(
        BartConfig(
            vocab_size=100, d_model=64, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64,
            decoder_ffn_dim=64, encoder_attention_heads=4, decoder_attention_heads=4,
        )
    )  # fmt: skip
    replace_linear(model, BitLabConfig(head="ternary"))
    if state == "deployed":
        deploy(model)
    with pytest.raises(ArgumentError, match="lm_head must not be ternary in a model that ties"):
        export(kind, model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("state", STATES)
def test_stock_transformers_reads_bitnet(state: str, stock: Elsewhere, tmp_path: Path) -> None:
    model = build(state)
    export("bitnet", model, tmp_path / "out")
    close(stock_outputs(stock, tmp_path / "out", tmp_path), outputs(model))


@pytest.mark.ci
@pytest.mark.parametrize("state", STATES)
def test_stock_transformers_reads_compressed_tensors(
    state: str, stock: Elsewhere, tmp_path: Path
) -> None:
    model = build(state)
    export("compressed-tensors", model, tmp_path / "out")
    expected = stock_outputs(stock, tmp_path / "out", tmp_path)
    # Its activations are not quantized.
    floats = (model if state == "deployed" else deploy(model)).dequantize()
    close(expected, outputs(floats))
