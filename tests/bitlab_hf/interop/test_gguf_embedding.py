"""Ternary embeddings in GGUF files: in the layers' type, there and back, and run by llama.cpp."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitcore import unpack_ternary
from bitcore.errors import ArgumentError, CheckpointError
from bitlab_hf import (
    convert_ternary,
    export_bitnet,
    export_compressed_tensors,
    export_gguf,
    load_gguf,
)
from bitlab_hf.interop.gguf_file import read_gguf
from bitlayers import BitLinear, TernaryEmbedding
from tests.bitlab_hf.interop.test_gguf import DEMO
from tests.bitlab_hf.interop.test_gguf_architectures import latent
from tests.bitlab_hf.interop.test_ternary import ternary

IDS = torch.arange(3, 60).view(1, -1)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


def build(name: str, kind: str, folder: Path, **changes: Any) -> Any:
    """A deployed weight-only model of which every matrix is ternary, in scales that float16 has."""
    model = latent(name, num_hidden_layers=2, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(ternary(tuple(parameter.shape), kind, torch.float16))
    model.save_pretrained(folder / "floats")
    convert_ternary(folder / "floats", folder / "packed")
    return AutoModelForCausalLM.from_pretrained(folder / "packed", dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize(
    ("name", "kind", "qtype", "tied"),
    [
        ("LlamaForCausalLM", "per_tensor", "TQ2_0", True),
        ("LlamaForCausalLM", "per_channel", "Q2_0", False),
        ("LlamaForCausalLM", "64", "Q2_0", True),
        ("Gemma3ForCausalLM", "128", "Q2_0", True),
        ("Qwen3ForCausalLM", "per_channel", "TQ1_0", False),
        ("Qwen3ForCausalLM", "64", "BF16", True),
    ],
)
def test_there_and_back(
    name: str, kind: str, qtype: str, tied: bool, tokenizer: Any, tmp_path: Path
) -> None:
    model = build(name, kind, tmp_path, tie_word_embeddings=tied)
    file = tmp_path / "model.gguf"
    change = export_gguf(model, file, qtype, tokenizer=tokenizer)
    assert (change == 0) == (qtype != "BF16")
    items = read_gguf(file).tensors
    assert items["token_embd.weight"].kind == qtype
    assert ("output.weight" in items) != tied
    again: Any = load_gguf(file, activation_dtype="float32")
    config = again.config.quantization_config
    if qtype == "BF16":
        # Scales that bfloat16 rounds are still one a group.
        assert config.embedding == "ternary"
        return
    embedding, head = again.get_input_embeddings(), again.get_output_embeddings()
    assert type(embedding) is TernaryEmbedding
    assert type(head) is BitLinear
    assert (head.qweight is embedding.qweight) == tied
    before = model.get_input_embeddings()
    assert torch.equal(embedding.qweight, before.qweight)
    assert torch.equal(embedding.dequantized_weight(), before.dequantized_weight())
    assert torch.equal(logits(again), logits(model))
    assert (config.embedding, config.head, config.format_version) == ("ternary", "ternary", 4)
    # llama.cpp quantizes activations for such a file, the head's too.
    quantized: Any = load_gguf(file)
    assert quantized.get_output_embeddings().quant_config.activation == "int8_per_token"


@pytest.mark.parametrize("tied", [True, False])
def test_a_code_that_is_not_ternary(tied: bool, tokenizer: Any, tmp_path: Path) -> None:
    model = build("LlamaForCausalLM", "64", tmp_path, tie_word_embeddings=tied)
    file = tmp_path / "model.gguf"
    export_gguf(model, file, "Q2_0", tokenizer=tokenizer)
    row = bytes(read_gguf(file).tensors["token_embd.weight"].data[5])
    content = bytearray(file.read_bytes())
    # Behind the scale of the row's first block.
    content[content.index(row) + 2] |= 3
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape("load_gguf: model.embed_tokens.weight")):
        load_gguf(file)


def test_a_float_embedding_that_is_ternary_is_packed(tokenizer: Any, tmp_path: Path) -> None:
    model = build("LlamaForCausalLM", "per_channel", tmp_path)
    codes = unpack_ternary(model.model.embed_tokens.qweight, 2048)
    scale = model.model.embed_tokens.qweight_scale.clone()
    model.dequantize()
    # Layers stay packed, the embedding is written in floats.
    deployed: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    deployed.set_input_embeddings(model.get_input_embeddings())
    export_gguf(deployed, tmp_path / "model.gguf", "TQ2_0", tokenizer=tokenizer)
    assert read_gguf(tmp_path / "model.gguf").tensors["token_embd.weight"].kind == "F32"
    again: Any = load_gguf(tmp_path / "model.gguf")
    assert torch.equal(unpack_ternary(again.model.embed_tokens.qweight, 2048), codes)
    assert torch.equal(again.model.embed_tokens.qweight_scale, scale)


@pytest.mark.parametrize("tied", [True, False])
def test_formats_without_a_place_for_it(tied: bool, tmp_path: Path) -> None:
    model = build("LlamaForCausalLM", "per_tensor", tmp_path, tie_word_embeddings=tied)
    for export in (export_bitnet, export_compressed_tensors):
        expected = "model.embed_tokens must be a BitLinear or a plain module, got TernaryEmbedding"
        with pytest.raises(ArgumentError, match=expected):
            export(model, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.ci
@pytest.mark.parametrize(
    ("name", "kind", "qtype", "tied"),
    [
        ("LlamaForCausalLM", "64", "Q2_0", True),
        ("LlamaForCausalLM", "per_tensor", "TQ2_0", True),
        ("Gemma3ForCausalLM", "64", "Q2_0", True),
        ("Qwen3ForCausalLM", "per_channel", "Q2_0", False),
    ],
)
def test_what_llama_cpp_makes_of_it(
    name: str, kind: str, qtype: str, tied: bool, tokenizer: Any, tmp_path: Path
) -> None:
    import numpy as np
    from llama_cpp import Llama

    model = build(name, kind, tmp_path, tie_word_embeddings=tied)
    file = tmp_path / "model.gguf"
    export_gguf(model, file, qtype, tokenizer=tokenizer)
    running = Llama(str(file), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    running.eval(IDS[0].tolist())
    found = torch.from_numpy(np.array(running.scores[: IDS.shape[1]]))
    running.close()
    expected = logits(model)[0]
    # Activations are quantized in blocks there; another row, or another scale, is far off.
    assert float((found - expected).std() / expected.std()) < 0.05
    same = (found.argmax(-1) == expected.argmax(-1)).float().mean()
    assert float(same) > 0.9
