"""GGUF files, read back with gguf's own reader and dequantized by its own code.

llama.cpp itself is asked by ``test_llama_cpp.py``, in CI.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitNetConfig,
    BitNetForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bitcore import unpack_ternary
from bitcore.errors import ArgumentError, ArgumentTypeError, MissingExtraError
from bitlab_hf import BitLabConfig, deploy, export_gguf, replace_linear
from bitlab_hf.interop.gguf_tokenizer import _pre_tokenizer
from bitlab_hf.model.tree import quantized_layers
from tests.bitlab_hf.interop.stock import ROOT

DEMO = ROOT / "bitlab_hf/demo/model"
SIZES: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 128,
}  # fmt: skip
# The name of a layer in the file, by the last parts of its name here.
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def build(name: str, config: BitLabConfig | None = None, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {**SIZES, **changes}
    model: Any = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**{"attention_bias": True, **sizes})),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**sizes)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**{"head_dim": 128, **sizes})),
        "bitnet": lambda: BitNetForCausalLM(
            BitNetConfig(**{"hidden_act": "silu", "tie_word_embeddings": True, **sizes})
        ),
    }[name]()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_()
    replace_linear(model, config)
    return deploy(model)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every tensor as float32, and every field."""
    reader = gguf.GGUFReader(file)
    tensors = {
        item.name: torch.from_numpy(
            np.array(gguf.quants.dequantize(item.data, item.tensor_type), dtype=np.float32)
        )
        for item in reader.tensors
    }
    return tensors, {name: field.contents() for name, field in reader.fields.items()}


def rotated(tensor: Tensor, heads: int) -> Tensor:
    """Rows in the order of llama.cpp's ``llama``: pairs of a head beside each other."""
    rows = tensor.view(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:])
    return rows.transpose(1, 2).reshape(tensor.shape)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("qtype", ["TQ2_0", "TQ1_0", "BF16"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "bitnet"])
def test_codes_and_scales(
    name: str, qtype: str, granularity: str, tokenizer: Any, tmp_path: Path
) -> None:
    model = build(name, BitLabConfig(weight_granularity=granularity))
    export_gguf(model, tmp_path / "model.gguf", qtype, tokenizer=tokenizer)
    tensors, fields = read(tmp_path / "model.gguf")
    assert fields["general.architecture"] == name
    heads = {"q_proj": 4, "k_proj": 2}
    for found in quantized_layers(model):
        _, _, block, *parts = found.names[0].split(".")
        layer = found.module
        codes = unpack_ternary(layer.qweight, layer.out_features).float()
        scale = layer.qweight_scale.expand(layer.out_features).unsqueeze(1)
        if qtype == "BF16":
            expected = (codes * scale).bfloat16().float()
        else:
            expected = codes * scale.half().float()
        bias = layer.bias
        if name == "llama" and parts[-1] in heads:
            expected = rotated(expected, heads[parts[-1]])
            bias = rotated(bias, heads[parts[-1]])
        written = f"blk.{block}.{NAMES['.'.join(parts)]}"
        assert torch.equal(tensors[f"{written}.weight"], expected)
        if bias is not None:
            assert torch.equal(tensors[f"{written}.bias"], bias)
    assert torch.equal(tensors["token_embd.weight"], model.get_input_embeddings().weight)
    assert torch.equal(tensors["output_norm.weight"], model.model.norm.weight)
    assert ("output.weight" in tensors) == (name != "bitnet")
    parameters = {id(p) for p in model.parameters()}
    assert len(tensors) == len(parameters)


def test_metadata_and_tokenizer(tokenizer: Any, tmp_path: Path) -> None:
    model = build("llama", rope_parameters=LLAMA3)
    export_gguf(model, tmp_path / "model.gguf", tokenizer=tokenizer)
    tensors, fields = read(tmp_path / "model.gguf")
    expected = {
        "llama.block_count": 2, "llama.embedding_length": 256, "llama.feed_forward_length": 768,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.context_length": 512, "llama.vocab_size": 2048, "llama.rope.dimension_count": 64,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip
    assert {name: fields[name] for name in expected} == expected
    assert fields["llama.rope.freq_base"] == 500000.0
    vocabulary = tokenizer.get_vocab()
    tokens = fields["tokenizer.ggml.tokens"]
    assert {token: index for index, token in enumerate(tokens)} == vocabulary
    types = fields["tokenizer.ggml.token_type"]
    assert types[0] == gguf.TokenType.CONTROL
    assert set(types[1:]) == {gguf.TokenType.NORMAL}
    assert len(fields["tokenizer.ggml.merges"]) > 1000
    # Llama 3's rotary frequencies: untouched where they are fast, divided by 8 where slow.
    factors = tensors["rope_freqs.weight"]
    assert factors[0] == pytest.approx(1)
    assert factors[-1] == pytest.approx(8)


def test_linear_rope(tokenizer: Any, tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    export_gguf(build("llama", rope_parameters=rope), tmp_path / "m.gguf", tokenizer=tokenizer)
    _, fields = read(tmp_path / "m.gguf")
    assert fields["llama.rope.scaling.type"] == "linear"
    assert fields["llama.rope.scaling.factor"] == 4.0


def test_demo_model_finds_its_tokenizer(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        DEMO, quantization_config=BitLabConfig(mode="infer")
    )
    export_gguf(model, tmp_path / "new/demo.gguf")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["demo.gguf"]
    reader = gguf.GGUFReader(tmp_path / "new/demo.gguf")
    kinds = {item.name: item.tensor_type.name for item in reader.tensors}
    assert kinds["token_embd.weight"] == "BF16"
    assert kinds["blk.0.attn_q.weight"] == "TQ2_0"
    assert kinds["blk.0.attn_norm.weight"] == "F32"


def test_a_larger_embedding_is_filled(tokenizer: Any, tmp_path: Path) -> None:
    model = build("qwen2", vocab_size=2100)
    export_gguf(model, tmp_path / "m.gguf", tokenizer=tokenizer)
    _, fields = read(tmp_path / "m.gguf")
    assert fields["tokenizer.ggml.tokens"][2099] == "[PAD2099]"
    assert fields["tokenizer.ggml.token_type"][2099] == gguf.TokenType.UNUSED


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"intermediate_size": 640}, "a multiple of 256 inputs for TQ2_0, got 640"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ("bitnet", {"hidden_act": "relu2"}, "computes for 'bitnet', got 'relu2'"),
        ("bitnet", {"tie_word_embeddings": False}, "tie_word_embeddings must be True"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window must be False"),
        ("qwen2", {"rope_parameters": LLAMA3}, "rope_type must be one of"),
        ("llama", {"vocab_size": 100}, "tokenizer must have at most 100 tokens"),
    ],
)
def test_models_that_gguf_cannot_express(
    name: str, changes: dict[str, Any], message: str, tokenizer: Any, tmp_path: Path
) -> None:
    model = build(name, **changes)
    with pytest.raises(ArgumentError, match=message):
        export_gguf(model, tmp_path / "model.gguf", tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


def test_groups_go_as_floats(tokenizer: Any, tmp_path: Path) -> None:
    model = build("qwen2", BitLabConfig(weight_granularity="per_group", group_size=64))
    with pytest.raises(ArgumentError, match="got groups of 64") as error:
        export_gguf(model, tmp_path / "model.gguf", tokenizer=tokenizer)
    assert 'Pass qtype="BF16"' in str(error.value)
    export_gguf(model, tmp_path / "model.gguf", "BF16", tokenizer=tokenizer)
    tensors, _ = read(tmp_path / "model.gguf")
    layer = quantized_layers(model)[0].module
    expected = layer.dequantized_weight(torch.bfloat16).float()
    assert torch.equal(tensors["blk.0.attn_q.weight"], expected)


def test_other_refusals(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    model = build("llama")
    with pytest.raises(ArgumentError, match="qtype must be one of"):
        export_gguf(model, file, "Q4_K", tokenizer=tokenizer)
    with pytest.raises(ArgumentTypeError, match="must be a transformers PreTrainedModel"):
        export_gguf(nn.Linear(4, 4), file)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="must come with a tokenizer, got none"):
        export_gguf(model, file)
    with pytest.raises(ArgumentError, match="must be a fast tokenizer"):
        export_gguf(model, file, tokenizer=object())
    gemma = GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=64))
    with pytest.raises(ArgumentError, match="got GemmaForCausalLM"):
        export_gguf(gemma, file, tokenizer=tokenizer)
    plain = LlamaForCausalLM(LlamaConfig(**SIZES))
    with pytest.raises(ArgumentError, match="must hold quantized layers"):
        export_gguf(plain, file, tokenizer=tokenizer)
    layer = quantized_layers(model)[3].module
    layer.qweight_scale = torch.tensor([1e-6])
    with pytest.raises(ArgumentError, match="must have scales from"):
        export_gguf(model, file, tokenizer=tokenizer)
    layer.qweight_scale = torch.tensor([0.1])
    model.extra = nn.Module()
    model.extra.register_buffer("qweight", torch.zeros(1))
    with pytest.raises(ArgumentError, match="extra must be a BitLinear or a plain module"):
        export_gguf(model, file, tokenizer=tokenizer)
    del model.extra
    model.extra = nn.LayerNorm(4)
    with pytest.raises(ArgumentError, match="extra.weight must be a tensor that llama.cpp knows"):
        export_gguf(model, file, tokenizer=tokenizer)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"bitlab-hf\[gguf\]"):
        export_gguf(model, file, tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "WordPiece"}}, "must be a byte-level BPE, got WordPiece"),
        ({"model": {"type": "BPE", "byte_fallback": True}}, "got BPE with byte_fallback"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "known to llama.cpp"),
    ],
)
def test_other_tokenizers(
    change: dict[str, Any], message: str, tokenizer: Any, tmp_path: Path
) -> None:
    content = {**json.loads(tokenizer.backend_tokenizer.to_str()), **change}

    class Other:
        class backend_tokenizer:  # noqa: N801
            @staticmethod
            def to_str() -> str:
                return json.dumps(content)

        def get_vocab(self) -> dict[str, int]:
            return dict(tokenizer.get_vocab())

    with pytest.raises(ArgumentError, match=message):
        export_gguf(build("llama"), tmp_path / "model.gguf", tokenizer=Other())
    assert not list(tmp_path.iterdir())


def test_ways_of_splitting_text() -> None:
    """transformers' own tokenizers of Llama 3 and Qwen2 are known."""
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import TikTokenConverter

    qwen = json.loads(Qwen2Tokenizer().backend_tokenizer.to_str())["pre_tokenizer"]
    assert _pre_tokenizer(qwen) == "qwen2"
    pattern = TikTokenConverter(None).pattern
    llama = {"type": "Split", "pattern": {"Regex": pattern}}
    parts = {"type": "Sequence", "pretokenizers": [llama, {"type": "ByteLevel"}]}
    assert _pre_tokenizer(parts) == "llama-bpe"
    llama["pattern"] = {"Regex": "[a-z]+"}
    with pytest.raises(ArgumentError, match="Pass pre_tokenizer="):
        _pre_tokenizer(parts)
