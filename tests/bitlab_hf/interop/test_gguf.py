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
from bitcore.quantize import dequantize
from bitlab_hf import BitLabConfig, deploy, export_gguf, replace_linear
from bitlab_hf.interop import q2_0
from bitlab_hf.interop.gguf_file import read_gguf
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
        ("llama", {"intermediate_size": 650}, "a multiple of 64 inputs for Q2_0, got 650"),
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


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_groups(name: str, size: int, dtype: str, tokenizer: Any, tmp_path: Path) -> None:
    """Codes as they are, and each group's scale rounded to float16 once."""
    scheme = BitLabConfig(
        weight_granularity="per_group", group_size=size, group_scale_dtype=dtype,
        # One scale a row is repeated.
        overrides={"*.up_proj": {"weight_granularity": "per_channel", "group_size": None}},
    )  # fmt: skip
    model = build(name, scheme, intermediate_size=640)
    change = export_gguf(model, tmp_path / "model.gguf", tokenizer=tokenizer)
    file = read_gguf(tmp_path / "model.gguf")
    assert file.fields["general.file_type"] == 41
    heads, worst = {"q_proj": 4, "k_proj": 2}, 0.0
    for found in quantized_layers(model):
        _, _, block, *parts = found.names[0].split(".")
        layer = found.module
        scale = scales_of_groups(layer)
        worst = max(worst, float((scale.half().double() / scale.double() - 1).abs().max()))
        codes = unpack_ternary(layer.qweight, layer.out_features)
        expected = dequantize(codes, scale.half().float(), torch.float32)
        if name == "llama" and parts[-1] in heads:
            expected = rotated(expected, heads[parts[-1]])
        item = file.tensors[f"blk.{block}.{NAMES['.'.join(parts)]}.weight"]
        assert (item.kind, item.shape) == ("Q2_0", tuple(expected.shape))
        # 18 bytes for 64 inputs: 2.25 bits a weight.
        assert 8 * item.data.nbytes == 2.25 * expected.numel()
        assert torch.equal(q2_0.decode(np.array(item.data)), expected)
    assert change == worst
    assert 0 < change <= 2**-11
    with pytest.raises(ArgumentError, match=f"got groups of {size}") as error:
        export_gguf(model, tmp_path / "other.gguf", "TQ2_0", tokenizer=tokenizer)
    assert 'Pass qtype="Q2_0"' in str(error.value)
    change = export_gguf(model, tmp_path / "other.gguf", "BF16", tokenizer=tokenizer)
    assert 2**-11 < change <= 2**-8
    tensors, _ = read(tmp_path / "other.gguf")
    layer = quantized_layers(model)[2].module
    expected = layer.dequantized_weight(torch.bfloat16).float()
    assert torch.equal(tensors["blk.0.attn_v.weight"], expected)


def scales_of_groups(layer: Any) -> Tensor:
    """float32 [N], or [N, K / G] in whichever form they are kept."""
    _, scale, *multiplier = layer.packed()
    return multiplier[0].float() * scale.unsqueeze(1) if multiplier else scale


@pytest.mark.parametrize(
    ("row", "multiplier", "said"),
    [
        (6e2, 127, "got 0.1 to 7.62e+04"),
        (5e-6, 1, "got 5e-06 to 0.1"),
        (float("nan"), 1, "got nan"),
    ],
)
def test_scales_out_of_range(
    row: float, multiplier: int, said: str, tokenizer: Any, tmp_path: Path
) -> None:
    scheme = BitLabConfig(weight_granularity="per_group", group_size=64)
    model = build("qwen2", scheme)
    found = quantized_layers(model)[4]
    layer = found.module
    layer.qweight_scale = torch.full_like(layer.qweight_scale, 1e-3)
    layer.qweight_multiplier[:] = 100
    layer.qweight_scale[7] = row
    layer.qweight_multiplier[7, 1] = multiplier
    with pytest.raises(ArgumentError, match="must have scales from") as error:
        export_gguf(model, tmp_path / "model.gguf", tokenizer=tokenizer)
    assert f"{found.names[0]} must have scales from 7.63e-06 to 65504 for Q2_0" in str(error.value)
    assert said in str(error.value)
    assert not list(tmp_path.iterdir())


def test_type_by_default(tokenizer: Any, tmp_path: Path) -> None:
    """TQ2_0 where it can hold every layer."""
    for changes, expected in (({}, "TQ2_0"), ({"intermediate_size": 576}, "Q2_0")):
        export_gguf(build("qwen2", **changes), tmp_path / "model.gguf", tokenizer=tokenizer)
        kinds = {item.kind for item in read_gguf(tmp_path / "model.gguf").tensors.values()}
        assert kinds == {"F32", expected}


@pytest.mark.parametrize("shape", [(1, 64), (5, 192), (64, 576), (33, 11008)])
def test_q2_0(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    codes = torch.randint(-1, 2, shape, dtype=torch.int8)
    scale = torch.rand(shape[0], shape[1] // 64) + 1e-3
    data = q2_0.encode(codes, scale)
    assert data.shape == (shape[0], shape[1] // 64 * 18)
    expected = dequantize(codes, scale.half().float(), torch.float32)
    assert torch.equal(q2_0.decode(data.numpy()), expected)
    # Value j of a block lies in bits 2 (j % 4) and the next of byte j // 4 behind the scale.
    for at in (0, 1, 37, 63):
        field = int(data[0, 2 + at // 4]) >> 2 * (at % 4) & 3
        assert field == codes[0, at] + 1


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
    with pytest.raises(MissingExtraError, match=r"pip install \"\.\[gguf\]\""):
        export_gguf(model, file, tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "WordPiece"}}, "must be a BPE, got WordPiece"),
        (
            {"model": {"type": "BPE", "byte_fallback": True}},
            "pre_tokenizer must be SentencePiece's",
        ),
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
