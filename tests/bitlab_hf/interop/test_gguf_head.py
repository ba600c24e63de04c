"""What is int8 in a GGUF file: rounded to the model's dtype, which it does hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bitcore.errors import ArgumentError
from bitlab_hf import (
    BitLabConfig,
    deploy,
    export_bitnet,
    export_compressed_tensors,
    export_gguf,
    load_gguf,
    replace_linear,
)
from bitlab_hf.interop.gguf_file import read_gguf
from bitlayers.int8 import Int8Embedding, Int8Linear
from tests.bitlab_hf.interop.test_gguf import DEMO, SIZES, read
from tests.bitlab_hf.interop.test_gguf_import import logits


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


def build(tied: bool, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied)).to(dtype)
    replace_linear(model, BitLabConfig(head="int8"))
    return deploy(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_rows(tied: bool, dtype: torch.dtype, tokenizer: Any, tmp_path: Path) -> None:
    model = build(tied, dtype)
    assert isinstance(model.lm_head, Int8Linear)
    assert isinstance(model.model.embed_tokens, Int8Embedding) == tied
    export_gguf(model, tmp_path / "model.gguf", tokenizer=tokenizer)
    items = read_gguf(tmp_path / "model.gguf").tensors
    name = "token_embd.weight" if tied else "output.weight"
    assert ("output.weight" in items) == (not tied)
    kinds = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    assert items[name].kind == kinds[dtype]
    values = model.lm_head.dequantized_weight(dtype).float()
    assert torch.equal(read(tmp_path / "model.gguf")[0][name], values)
    # The int8 values are within half a step of the float ones, and rounded once after.
    step = model.lm_head.qweight_scale.unsqueeze(1)
    exact = model.lm_head.dequantized_weight(torch.float32)
    assert bool(((values - exact).abs() <= 2**-8 * exact.abs() + 1e-7).all())
    assert bool((values.abs() <= 127.5 * step).all())
    assert isinstance(model.lm_head, Int8Linear)
    again = load_gguf(tmp_path / "model.gguf", dtype=torch.float32)
    if tied:
        ids = torch.arange(64)
        assert torch.equal(again.model.embed_tokens(ids), model.model.embed_tokens(ids).float())
    # The head's int8 activations are what differs most.
    close = (logits(again) - logits(model)).std() / logits(model).std()
    assert float(close) < 0.03


def test_layers(tokenizer: Any, tmp_path: Path) -> None:
    """Their rows are in llama.cpp's order, as those of ternary ones are."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES))
    asked = BitLabConfig(int8_layers=["layers.1.self_attn.q_proj", "layers.1.mlp.down_proj"])
    deploy(replace_linear(model, asked))
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    assert isinstance(attention.q_proj, Int8Linear)
    export_gguf(model, tmp_path / "model.gguf", tokenizer=tokenizer)
    values = read(tmp_path / "model.gguf")[0]
    assert torch.equal(values["blk.1.ffn_down.weight"], mlp.down_proj.dequantized_weight())
    rows = attention.q_proj.dequantized_weight()
    assert torch.equal(values["blk.1.attn_q.weight"].sort(0).values, rows.sort(0).values)
    assert not torch.equal(values["blk.1.attn_q.weight"], rows)
    again = load_gguf(tmp_path / "model.gguf", dtype=torch.float32)
    assert torch.equal(again.model.layers[1].self_attn.q_proj.weight, rows)
    assert torch.equal(again.model.layers[1].mlp.down_proj.weight, mlp.down_proj.weight)


def test_formats_of_ternary_weights_alone_refuse_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES))
    deploy(replace_linear(model, BitLabConfig(int8_layers=["layers.1.mlp.down_proj"])))
    for export in (export_bitnet, export_compressed_tensors):
        with pytest.raises(ArgumentError, match=r"layers\.1\.mlp\.down_proj must be .*Int8Linear"):
            export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
