"""Float checkpoints that are ternary already: found, packed, proven."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from bitcore import unpack_ternary
from bitcore.errors import ArgumentError, CheckpointError, ConfigError
from bitlab_hf import BitLabConfig, convert_ternary, save
from bitlab_hf.checkpoint.files import INDEX
from bitlab_hf.interop.stream import Entry, StreamWriter
from bitlab_hf.interop.structure import find_structure
from bitlab_hf.model.tree import ternary_modules
from tests.bitlab_hf.interop.stock import SIZES

LAYER = "model.layers.1.mlp.up_proj"


def ternary(shape: tuple[int, int], scheme: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A float matrix that is exactly ternary, with zeros of both signs."""
    out_features, in_features = shape
    codes = torch.randint(-1, 2, shape)
    groups = {"per_tensor": 1, "per_channel": 1}.get(scheme) or in_features // int(scheme)
    rows = 1 if scheme == "per_tensor" else out_features
    scale = (torch.rand(rows, groups, 1) * 0.05 + 0.01).to(dtype)
    # Bits and ties of a scale survive: rounding is done once, on the scale.
    values = codes.to(dtype).view(out_features, groups, -1) * scale
    values = values.reshape(shape)
    values[(values == 0) & (torch.rand(shape) < 0.5)] = -0.0
    return values


def build(
    folder: Path, scheme: str = "64", dtype: torch.dtype = torch.bfloat16, **options: Any
) -> Path:
    torch.manual_seed(0)
    shard_size = options.pop("max_shard_size", "5GB")
    tied = options.pop("tied", False)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and name != "lm_head.weight":
                parameter.copy_(ternary(tuple(parameter.shape), scheme, dtype))
        if options.pop("ternary_head", False):
            model.lm_head.weight.copy_(ternary((97, 64), scheme, dtype))
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def change(folder: Path, key: str, row: int, column: int, factor: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[key][row, column] = tensors[key].abs().max() * factor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def assert_same_model(source: Path, converted: Path) -> Any:
    """The converted model's weights are the source's, value for value; its logits agree."""
    floats: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    packed: Any = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    originals = dict(floats.named_modules())
    for found in ternary_modules(packed):
        weight = originals[found.names[0]].weight
        assert torch.equal(found.module.dequantized_weight(), weight)
    ids = torch.arange(3, 51).view(2, 24)
    with torch.no_grad():
        torch.testing.assert_close(
            packed(input_ids=ids).logits, floats(input_ids=ids).logits, atol=1e-4, rtol=1e-4
        )
    return packed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", ["per_tensor", "per_channel", "64"])
def test_schemes(scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = build(tmp_path / "source", scheme, dtype)
    report = convert_ternary(source, tmp_path / "out")
    label = "per group of 64" if scheme == "64" else scheme.replace("_", " ")
    # K = 64: a group of 64 is a row there.
    rows = "per channel" if scheme == "64" else label
    assert report.packed[LAYER] == rows
    assert report.packed["model.layers.1.mlp.down_proj"] == label
    assert report.packed["model.embed_tokens"] == rows
    assert len(report.packed) == 15
    packed = assert_same_model(source, tmp_path / "out")
    config = packed.config.quantization_config
    assert (config.quant_method, config.activation_dtype) == ("bitlab", "float32")
    assert "neither 0 nor" in report.kept["lm_head.weight"]
    assert report.bytes_after < report.bytes_before
    assert "activations not quantized" in (tmp_path / "out/README.md").read_text()


def test_groups_of_128() -> None:
    weight = ternary((33, 256), "128")
    assert find_structure(weight).label == "per group of 128"
    weight = ternary((33, 256), "64")
    assert find_structure(weight).group_size == 64
    assert find_structure(torch.zeros(8, 64)).scale == 1e-5
    # Blocks of rows that differ only late.
    tall = torch.full((70_000, 64), 0.5)
    assert find_structure(tall).label == "per tensor"
    tall[69_999] = 0.25
    assert find_structure(tall).label == "per channel"
    tall[69_999, 0] = 0.125
    assert find_structure(tall).scheme is None


def test_shards_head_and_progress(tmp_path: Path) -> None:
    source = build(tmp_path / "source", ternary_head=True, max_shard_size="60KB")
    files = sorted(file.name for file in source.glob("*.safetensors"))
    assert len(files) > 1
    done: list[int] = []
    report = convert_ternary(source, tmp_path / "out", advance=done.append)
    assert "lm_head" in report.packed
    packed = assert_same_model(source, tmp_path / "out")
    assert packed.lm_head.is_deployed
    assert packed.config.quantization_config.head == "ternary"
    assert sorted(file.name for file in (tmp_path / "out").glob("*.safetensors")) == files
    tensors = sum(
        handle.get_tensor(key).nbytes
        for file in files
        for handle in [safe_open(source / file, "pt")]
        for key in handle.keys()  # noqa: SIM118
    )
    assert sum(done) == 2 * tensors
    # It saves and loads as any deployed model.
    save(packed, tmp_path / "again")
    assert_same_model(source, tmp_path / "again")


@pytest.mark.parametrize("names", [["model-00001-of-00001"], ["weights"], ["b", "a"]])
def test_files_have_the_names_that_a_load_looks_for(names: list[str], tmp_path: Path) -> None:
    """An index may give its files any names, and be there for a single file."""
    source = build(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    weight_map = {key: names[i % len(names)] + ".safetensors" for i, key in enumerate(tensors)}
    for name in {*weight_map.values()}:
        held = {key: tensors[key] for key, file in weight_map.items() if file == name}
        save_file(held, source / name, {"format": "pt"})
    (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    # What was there before goes only where the new one loads.
    build(tmp_path / "out", "per_tensor")
    convert_ternary(source, tmp_path / "out")
    assert_same_model(source, tmp_path / "out")
    assert len([*(tmp_path / "out").glob("*.safetensors")]) == len(names)
    assert (tmp_path / "out" / INDEX).exists() == (len(names) > 1)


def test_mixed_schemes_become_overrides(tmp_path: Path) -> None:
    source = build(tmp_path / "source", "per_tensor")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] = ternary((64, 192), "64")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    convert_ternary(source, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["overrides"] == {
        "model.layers.0.mlp.down_proj": {"weight_granularity": "per_group", "group_size": 64}
    }
    assert_same_model(source, tmp_path / "out")


@pytest.mark.parametrize("factor", [0.5, 0.75, float("nan"), float("inf")])
def test_not_exactly_ternary(factor: float, tmp_path: Path) -> None:
    source = build(tmp_path / "source", "per_tensor")
    change(source, f"{LAYER}.weight", 5, 7, factor)
    expected = f"{LAYER}.weight must be exactly ternary, got 1 values (0.01%)"
    with pytest.raises(CheckpointError, match=re.escape(expected)) as error:
        convert_ternary(source, tmp_path / "out")
    if factor == 0.75:
        assert "up to 0.2" in str(error.value)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
    report = convert_ternary(source, tmp_path / "out", keep_inexact=True)
    assert LAYER not in report.packed
    assert len(report.packed) == 14
    if abs(factor) < 1:
        packed = assert_same_model(source, tmp_path / "out")
        assert LAYER in packed.config.quantization_config.modules_to_not_convert


def test_a_float_model_is_refused(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "source")
    with pytest.raises(CheckpointError, match="must be exactly ternary, got .* values"):
        convert_ternary(tmp_path / "source", tmp_path / "out")
    with pytest.raises(CheckpointError, match="at least one linear layer"):
        convert_ternary(tmp_path / "source", tmp_path / "out", keep_inexact=True)


def test_bad_sources(tmp_path: Path) -> None:
    source = build(tmp_path / "source", max_shard_size="60KB")
    with pytest.raises(ArgumentError, match="must not be the source"):
        convert_ternary(source, source)
    deployed = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=BitLabConfig(mode="infer")
    )
    save(deployed, tmp_path / "deployed")
    with pytest.raises(ConfigError, match="must be a float one, got quant_method 'bitlab'"):
        convert_ternary(tmp_path / "deployed", tmp_path / "out")
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    key, name = next(iter(content["weight_map"].items()))
    index.write_text(json.dumps({"weight_map": {key: "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match="must name files of its own folder"):
        convert_ternary(source, tmp_path / "out")
    index.write_text(json.dumps({"weight_map": {key: "lost.safetensors"}}))
    with pytest.raises(CheckpointError, match=re.escape("lost.safetensors must be in the folder")):
        convert_ternary(source, tmp_path / "out")
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="must hold a weight_map"):
        convert_ternary(source, tmp_path / "out")
    index.unlink()
    with pytest.raises(CheckpointError, match="got neither"):
        convert_ternary(source, tmp_path / "out")
    (source / "config.json").unlink()
    with pytest.raises(ArgumentError, match=re.escape("must hold config.json")):
        convert_ternary(source, tmp_path / "out")
    assert name
    assert not (tmp_path / "out").exists()


ATTENTION = "model.layers.0.self_attn"


@pytest.mark.parametrize(
    ("key", "replacement", "message"),
    [
        (f"{LAYER}.weight", None, f"{LAYER}.weight must be in the checkpoint, got none"),
        ("model.norm.weight", None, "model.norm.weight must be in the checkpoint, got none"),
        ("model.embed_tokens.weight", None, "embed_tokens.weight must be in the checkpoint"),
        ("lm_head.weight", None, "lm_head.weight must be in the checkpoint, got none"),
        (f"{ATTENTION}.o_proj.weight", (63, 64), "must be float [64, 64] as model.layers.0.self_"),
        (f"{ATTENTION}.o_proj.weight", (4096,), "got BF16 [4096]"),
        ("lm_head.weight", (96, 64), "must be float [97, 64] as lm_head.weight, got BF16 [96, 64]"),
        ("model.norm.weight", (63,), "must be float [64] as model.norm.weight, got BF16 [63]"),
        ("model.embed_tokens.weight", (97, 63), "must be float [97, 64] as model.embed_tokens"),
    ],
)
@pytest.mark.parametrize("keep_inexact", [False, True])
def test_what_is_not_in_the_file_as_the_model_has_it(
    key: str, replacement: tuple[int, ...] | None, message: str, keep_inexact: bool, tmp_path: Path
) -> None:
    source = build(tmp_path / "source", "per_tensor")
    tensors = load_file(source / "model.safetensors")
    held = tensors.pop(key)
    if replacement is not None:
        tensors[key] = held.new_full(replacement, 0.5)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=re.escape(message)):
        convert_ternary(source, tmp_path / "out", keep_inexact=keep_inexact)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", [f"{LAYER}.weight", "model.norm.weight", "lm_head.weight"])
def test_a_tensor_of_integers(key: str, tmp_path: Path) -> None:
    source = build(tmp_path / "source", "per_tensor")
    tensors = load_file(source / "model.safetensors")
    tensors[key] = tensors[key].sign().to(torch.int8)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{key} must be float .*, got I8"):
        convert_ternary(source, tmp_path / "out")


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    source = build(tmp_path / "source", max_shard_size="60KB")
    first, second = sorted(source.glob("*.safetensors"))[:2]
    tensors = load_file(second)
    key = next(iter(load_file(first)))
    tensors[key] = torch.zeros(3)
    save_file(tensors, second, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{key} must stand in one file"):
        convert_ternary(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must fit the 21 tensors, got 1000000000"),
        ({"num_hidden_layers": 3}, "model.layers.2.* must be in the checkpoint"),
        ({"hidden_size": 63}, "config.json must describe a model|must be float"),
        ({"num_attention_heads": 0}, "config.json must describe a model"),
        ({"hidden_size": "x"}, "config.json must describe a model"),
        ({"architectures": [3]}, "config.json must describe a model"),
        ({"architectures": ["set_seed"]}, "config.json must describe a model"),
        ({"model_type": "none"}, "config.json must describe a model"),
    ],
)
def test_a_configuration_that_is_no_models(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = build(tmp_path / "source", "per_tensor")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **fields}))
    with pytest.raises(CheckpointError, match=message):
        convert_ternary(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("held", ["bitlab", 3, [], {"quant_method": "gptq"}])
def test_any_quantization_config_is_refused(held: Any, tmp_path: Path) -> None:
    source = build(tmp_path / "source", "per_tensor")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": held}))
    with pytest.raises(ConfigError, match="the checkpoint must be a float one"):
        convert_ternary(source, tmp_path / "out")


def test_what_lies_beside_the_weights(tmp_path: Path) -> None:
    """Pipes wait for nobody, and an adapter of the source would make the output unloadable."""
    source = build(tmp_path / "source", "per_tensor")
    (source / "tokenizer.model").write_text("held")
    (source / "chat_template.jinja").symlink_to("tokenizer.model")
    (source / "adapter_config.json").write_text("{}")
    (source / "pytorch_model.bin.index.json").write_text("{}")
    os.mkfifo(source / "pipe.json")
    convert_ternary(source, tmp_path / "out")
    names = {entry.name for entry in (tmp_path / "out").iterdir()}
    assert {"tokenizer.model", "chat_template.jinja"} <= names
    assert not names & {"adapter_config.json", "pytorch_model.bin.index.json", "pipe.json"}
    (source / "adapter_config.json").unlink()
    assert_same_model(source, tmp_path / "out")


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = build(tmp_path / "source")
    target = tmp_path / "out"
    convert_ternary(source, target)
    before = (target / "model.safetensors").read_bytes()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(StreamWriter, "write", full)
    with pytest.raises(OSError, match="No space left") as caught:
        convert_ternary(source, target)
    assert str(caught.value).startswith(f"convert_ternary: {target} must be written whole")
    assert "Free some space" in str(caught.value)
    assert (target / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".out*"))


def test_damage_while_writing_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof reads the file: a flipped bit on the way there is an error."""
    source = build(tmp_path / "source")
    write = StreamWriter.write

    def flipped(self: StreamWriter, name: str, part: Tensor) -> None:
        if name == f"{LAYER}.qweight":
            part = part.clone()
            part[0, 0] ^= 1
        write(self, name, part)

    monkeypatch.setattr(StreamWriter, "write", flipped)
    with pytest.raises(CheckpointError, match=f"{LAYER}.weight must come back as it was"):
        convert_ternary(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_stream_writer(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(5, 3),
        "a": torch.arange(7, dtype=torch.uint8),
        "c": torch.randn(3).to(torch.bfloat16),
        "d": torch.empty(0, dtype=torch.uint8),
    }
    names = {torch.float32: "F32", torch.uint8: "U8", torch.bfloat16: "BF16"}
    entries = [Entry(k, names[v.dtype], tuple(v.shape)) for k, v in tensors.items()]
    file = tmp_path / "file.safetensors"
    with StreamWriter(file, entries, {"format": "pt"}) as out:
        for name, tensor in tensors.items():
            for part in tensor.split(2) if len(tensor) else []:
                out.write(name, part)
    loaded = load_file(file)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(CheckpointError, match="a must be written whole"):  # noqa: SIM117
        with StreamWriter(file, entries[1:2], {}):
            pass


def test_codes_and_rows(tmp_path: Path) -> None:
    """Rows that fill no byte: 97 outputs of a packed head."""
    source = build(tmp_path / "source", ternary_head=True)
    convert_ternary(source, tmp_path / "out")
    stored = load_file(tmp_path / "out/model.safetensors")
    assert stored["lm_head.qweight"].shape == (25, 64)
    codes = unpack_ternary(stored["lm_head.qweight"], 97)
    assert torch.equal(
        codes, load_file(source / "model.safetensors")["lm_head.weight"].sign().to(torch.int8)
    )
