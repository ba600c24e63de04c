"""Ternary GGUF files read back: what `export_gguf` wrote, and files that are refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from bitcore import unpack_ternary
from bitcore.errors import ArgumentError, CheckpointError
from bitlab_hf import BitLabConfig, export_gguf, import_gguf, load_gguf
from bitlab_hf.cli import main
from bitlab_hf.interop import q2_0
from bitlab_hf.interop.gguf_file import read_gguf
from bitlab_hf.model.tree import quantized_layers
from tests.bitlab_hf.interop.test_gguf import DEMO, LLAMA3, build

TEXT = "def main():\n    x = 'h\u00e9llo'  # 12345 don't\n\n\n   y\t=2 \u4e16\u754c"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def good(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole file."""
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    export_gguf(build("qwen2"), path, tokenizer=tokenizer)
    return path


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = torch.arange(3, 35).view(2, 16)
    result: Tensor = model(input_ids=ids).logits
    return result


def with_rounded_scales(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    for found in quantized_layers(model):
        scale = found.module.qweight_scale
        found.module.qweight_scale = scale.to(dtype).float()
    return model


@pytest.mark.parametrize(
    ("name", "qtype", "granularity"),
    [
        ("llama", "TQ2_0", "per_tensor"),
        ("llama", "TQ1_0", "per_channel"),
        ("qwen2", "TQ2_0", "per_channel"),
        ("qwen3", "TQ1_0", "per_tensor"),
        ("bitnet", "TQ2_0", "per_tensor"),
        ("qwen2", "BF16", "per_group"),
        ("llama", "Q2_0", "per_group"),
        ("qwen3", "Q2_0", "per_channel"),
    ],
)
def test_round_trip(
    name: str, qtype: str, granularity: str, tokenizer: Any, tmp_path: Path
) -> None:
    size = 64 if granularity == "per_group" else None
    changes = {"rope_parameters": LLAMA3} if name == "llama" else {}
    scheme = BitLabConfig(
        weight_granularity=granularity, group_size=size, group_scale_dtype="float32"
    )
    model = build(name, scheme, **changes)
    export_gguf(model, tmp_path / "model.gguf", qtype, tokenizer=tokenizer)
    change = import_gguf(tmp_path / "model.gguf", tmp_path / "again", activation_dtype="int8")
    assert change == 0
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    rounded = with_rounded_scales(model, torch.bfloat16 if qtype == "BF16" else torch.float16)
    layers = {found.names[0]: found.module for found in quantized_layers(again)}
    assert len(layers) == len(quantized_layers(rounded)) == 14
    for found in quantized_layers(rounded):
        layer, other = found.module, layers[found.names[0]]
        assert torch.equal(other.qweight, layer.qweight)
        assert torch.equal(other.qweight_scale, layer.qweight_scale)
    assert torch.equal(logits(again), logits(rounded))
    # Beside a Qwen2 model AutoTokenizer takes Qwen2's own way of splitting, whatever is saved.
    rebuilt = PreTrainedTokenizerFast.from_pretrained(tmp_path / "again")
    assert rebuilt(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert rebuilt.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    assert (rebuilt.bos_token, rebuilt.eos_token) == (tokenizer.bos_token, tokenizer.eos_token)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["again", "model.gguf"]


@pytest.mark.parametrize("size", [64, 128])
def test_two_levels_come_back(size: int, tokenizer: Any, tmp_path: Path) -> None:
    """float16 rounds a scale by 2^-11 of itself, far less than half a step of its multiplier."""
    scheme = BitLabConfig(weight_granularity="per_group", group_size=size)
    model = build("llama", scheme)
    export_gguf(model, tmp_path / "model.gguf", tokenizer=tokenizer)
    options: dict[str, Any] = {"group_scale_dtype": "uint8", "activation_dtype": "int8"}
    change = import_gguf(tmp_path / "model.gguf", tmp_path / "again", **options)
    assert 0 < change < 2**-10
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    layers = {found.names[0]: found.module for found in quantized_layers(again)}
    for found in quantized_layers(model):
        layer, other = found.module, layers[found.names[0]]
        assert other.quant_config == layer.quant_config
        assert torch.equal(other.qweight, layer.qweight)
        assert torch.equal(other.qweight_multiplier, layer.qweight_multiplier)
        torch.testing.assert_close(
            other.qweight_scale, layer.qweight_scale, rtol=2**-11 + 2**-20, atol=0
        )
    config = json.loads((tmp_path / "again/config.json").read_text())["quantization_config"]
    assert config["format_version"] == 2
    loaded = load_gguf(tmp_path / "model.gguf", **options)
    assert torch.equal(logits(loaded), logits(again))
    exact = load_gguf(tmp_path / "model.gguf", activation_dtype="int8")
    layer = quantized_layers(exact)[0].module
    assert layer.quant_config.group_scale_dtype == "float32"
    assert layer.qweight_scale.shape == (256, 256 // size)


def test_scales_of_another_dtype(good: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="group_scale_dtype must be one of"):
        import_gguf(good, tmp_path / "out", group_scale_dtype="int8")
    assert not (tmp_path / "out").exists()


def test_the_code_for_two_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    scheme = BitLabConfig(weight_granularity="per_group", group_size=64)
    export_gguf(build("qwen2", scheme), tmp_path / "model.gguf", tokenizer=tokenizer)
    item = read_gguf(tmp_path / "model.gguf").tensors["blk.0.attn_q.weight"]
    at = item.data.ctypes.data - item.data.base.ctypes.data  # type: ignore[union-attr]
    content = bytearray((tmp_path / "model.gguf").read_bytes())
    # Behind the first block's scale.
    content[at + 2] |= 3
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match="q_proj.weight must have finite scales and codes of"):
        load_gguf(tmp_path / "model.gguf")


def test_q2_0_in_blocks_of_128(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same number as that of 64; which it is, shows by the size of the file."""
    scheme = BitLabConfig(weight_granularity="per_group", group_size=128)
    model = build("qwen3", scheme)
    with monkeypatch.context() as other:
        other.setattr(q2_0, "BLOCK", q2_0.WIDE_BLOCK)
        other.setattr(q2_0, "SIZE", q2_0.WIDE_SIZE)
        export_gguf(model, tmp_path / "model.gguf", "Q2_0", tokenizer=tokenizer)
    item = read_gguf(tmp_path / "model.gguf").tensors["blk.0.attn_q.weight"]
    assert (item.kind, 8 * item.data.nbytes) == ("Q2_0 of 128", 2.125 * 512 * 256)
    again = load_gguf(tmp_path / "model.gguf", group_scale_dtype="uint8")
    for ours, theirs in zip(quantized_layers(model), quantized_layers(again), strict=True):
        assert theirs.module.quant_config.group_size == 128
        assert torch.equal(ours.module.qweight, theirs.module.qweight)
        assert torch.equal(ours.module.qweight_multiplier, theirs.module.qweight_multiplier)
    content = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(content[:-40])
    with pytest.raises(CheckpointError, match="must be a whole GGUF file"):
        load_gguf(tmp_path / "model.gguf")


def test_blocks_of_different_scale_become_groups(tokenizer: Any, tmp_path: Path) -> None:
    """A file that other tools wrote: a scale for each 256 inputs becomes two equal ones for 128."""
    model = build("qwen2")
    export_gguf(model, tmp_path / "model.gguf", tokenizer=tokenizer)
    reader = gguf.GGUFReader(tmp_path / "model.gguf", "r+")
    item = next(item for item in reader.tensors if item.name == "blk.1.ffn_down.weight")
    # The scale is the last two bytes of a block of 66.
    scales = item.data.reshape(-1, 66)[:, 64:].view(np.float16)
    scales[:] = np.arange(1, len(scales) + 1, dtype=np.float16)[:, None] / 1024
    expected = gguf.quants.dequantize(item.data, item.tensor_type)
    reader.data.flush()
    loaded = load_gguf(tmp_path / "model.gguf")
    layers = {found.names[0]: found.module for found in quantized_layers(loaded)}
    layer = layers["model.layers.1.mlp.down_proj"]
    assert layer.quant_config.group_size == 128
    assert torch.equal(layer.qweight_scale[:, ::2], layer.qweight_scale[:, 1::2])
    values = layer.dequantized_weight(torch.float32)
    assert torch.equal(values, torch.from_numpy(np.array(expected)))
    assert layers["model.layers.0.mlp.down_proj"].quant_config.group_size is None
    source = model.get_submodule("model.layers.1.mlp.down_proj")
    codes = unpack_ternary(source.qweight, source.out_features)
    assert torch.equal(values.sign().to(torch.int8), codes)


def test_command_line(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for source, code in ((good, 0), (tmp_path / "none.gguf", 1)):
        monkeypatch.setattr(sys, "argv", ["bitlab", "import", str(source), str(tmp_path / "out")])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == code
    assert (tmp_path / "out/model.safetensors").exists()
    assert (tmp_path / "out/tokenizer.json").exists()


def test_activations_follow_the_type(tokenizer: Any, tmp_path: Path) -> None:
    model = build("qwen3")
    for qtype, expected in (("TQ2_0", "int8"), ("BF16", "float32")):
        export_gguf(model, tmp_path / "model.gguf", qtype, tokenizer=tokenizer)
        import_gguf(tmp_path / "model.gguf", tmp_path / "again")
        config = json.loads((tmp_path / "again/config.json").read_text())
        assert config["quantization_config"]["activation_dtype"] == expected


def rewritten(source: Path, target: Path, changes: dict[str, Any], drop: str = "") -> Path:
    """A copy of a file with other fields or tensors; an int8 tensor stands for another type."""
    reader = gguf.GGUFReader(source)
    fields, key = reader.fields, "general.architecture"
    writer = gguf.GGUFWriter(target, changes.get(key, fields[key].contents()))
    for name, field in fields.items():
        if name.startswith("GGUF.") or name == key:
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, changes.get(name, field.contents()), kind, sub)
    for item in reader.tensors:
        if item.name != drop:
            writer.add_tensor(item.name, np.array(item.data), raw_dtype=item.tensor_type)
    for name, values in changes.items():
        if isinstance(values, np.ndarray):
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize(
    ("changes", "drop", "message"),
    [
        ({"general.architecture": "gemma"}, "", "general.architecture must be one of"),
        ({"../../escape": np.zeros(4, np.float32)}, "", "got '../../escape'"),
        ({"extra": np.zeros(4, np.int8)}, "", "extra must be of a type among .*, got I8"),
        ({"qwen2.block_count": 2**31 - 1}, "", "block_count must fit the"),
        ({"qwen2.embedding_length": 0}, "", "embedding_length must be a positive integer, got 0"),
        ({"qwen2.rope.dimension_count": 32}, "", "rope.dimension_count must be 64, got 32"),
        ({"tokenizer.ggml.bos_token_id": 9999}, "", "must be one of the 2048 tokens, got 9999"),
        ({"tokenizer.ggml.merges": ["a"]}, "", "tokenizer must be whole"),
        ({"qwen2.attention.head_count": 63, "qwen2.attention.key_length": 63}, "", "must be even"),
        ({}, "blk.1.attn_k.bias", "blk.1.attn_k.bias must be in the file, got none"),
        ({"qwen2.feed_forward_length": 512}, "", "must be of shape"),
    ],
)
def test_refused(
    changes: dict[str, Any], drop: str, message: str, good: Path, tmp_path: Path
) -> None:
    bad = rewritten(good, tmp_path / "bad.gguf", changes, drop)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=message):
        import_gguf(bad, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_damaged_files(good: Path, tmp_path: Path) -> None:
    content = good.read_bytes()
    bad = tmp_path / "bad.gguf"
    for kept in (
        content[:0],
        content[:3],
        content[:30],
        content[: 2**12],
        content[:-1000],
        b"x" * 99,
    ):
        bad.write_bytes(kept)
        with pytest.raises(CheckpointError, match=r"bad.gguf must be a whole GGUF file, got"):
            import_gguf(bad, tmp_path / "out")
    with pytest.raises(ArgumentError, match="path must be a GGUF file"):
        import_gguf(tmp_path / "none.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_scale_that_is_not_finite(good: Path, tmp_path: Path) -> None:
    shutil.copyfile(good, tmp_path / "model.gguf")
    reader = gguf.GGUFReader(tmp_path / "model.gguf", "r+")
    item = next(item for item in reader.tensors if item.name == "blk.0.attn_q.weight")
    item.data.reshape(-1, 66)[0, 64:].view(np.float16)[0] = np.inf
    reader.data.flush()
    with pytest.raises(CheckpointError, match="q_proj.weight must have finite scales"):
        load_gguf(tmp_path / "model.gguf")


def test_a_float_file_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    model = build("qwen2")
    export_gguf(model, tmp_path / "model.gguf", "BF16", tokenizer=tokenizer)
    reader = gguf.GGUFReader(tmp_path / "model.gguf", "r+")
    generator = np.random.default_rng(0)
    for item in reader.tensors:
        if item.name.startswith("blk.") and item.tensor_type.name == "BF16":
            noise = torch.from_numpy(generator.standard_normal(item.n_elements)).bfloat16()
            item.data[:] = noise.view(torch.uint8).numpy().reshape(item.data.shape)
    reader.data.flush()
    with pytest.raises(CheckpointError, match="at least one linear layer must be ternary"):
        load_gguf(tmp_path / "model.gguf")
