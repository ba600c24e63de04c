"""A GGUF file where a float model is asked for."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from bitcore.errors import MissingExtraError
from bitlab_hf import BitLabConfig, deploy, export_gguf
from bitlab_hf.cli.gguf_source import as_folder
from bitlab_hf.interop.gguf_file import read_gguf
from bitlab_hf.model.tree import quantized_layers

Run = Callable[..., Any]
TEXT = ("--text", __file__, "--length", 16, "--tokens", 160)
IDS = torch.arange(3, 27).view(1, 24)


def rewrite(file: Path, target: Path, kind: gguf.GGMLQuantizationType | None, drop: str) -> Path:
    """Copies a GGUF file with its matrices in another type, or without a tensor."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(str(target), "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub)
    for item in reader.tensors:
        if item.name == drop:
            continue
        values = gguf.quants.dequantize(item.data, item.tensor_type).astype(np.float32)
        if kind is None or len(item.shape) < 2:
            writer.add_tensor(item.name, values)
        else:
            writer.add_tensor(item.name, in_type(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def in_type(values: Any, kind: gguf.GGMLQuantizationType) -> Any:
    """Returns a matrix in a type; of one that the package only knows by its name, zeros."""
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        return np.zeros((*values.shape[:-1], values.shape[-1] // block * size), np.uint8)


@pytest.fixture(scope="module")
def ternary(states: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "ternary.gguf"
    model = AutoModelForCausalLM.from_pretrained(states["deployed"])
    export_gguf(model, path, "BF16", tokenizer=AutoTokenizer.from_pretrained(states["float"]))
    return path


@pytest.fixture(scope="module")
def quantized(ternary: Path) -> Path:
    """Its matrices in four bits, as most files hold them."""
    kind = gguf.GGMLQuantizationType.Q4_0
    return rewrite(ternary, ternary.with_name("q4.gguf"), kind, "")


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is left where files are unpacked."""
    place = tmp_path / "scratch"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield
    assert not [left for left in place.iterdir() if left.name.startswith("bitlab-")]


def test_the_floats_are_the_files(quantized: Path) -> None:
    ours, theirs = _both(quantized, torch.bfloat16)
    for name, tensor in theirs.items():
        assert ours[name].dtype == torch.bfloat16
        assert torch.equal(ours[name], tensor), name


def test_floats_that_bfloat16_does_not_hold(ternary: Path, tmp_path: Path) -> None:
    file = rewrite(ternary, tmp_path / "f32.gguf", None, "")
    ours, theirs = _both(file, torch.float32)
    for name, tensor in theirs.items():
        assert ours[name].dtype == torch.float32
        assert torch.equal(ours[name], tensor), name


def _both(file: Path, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=dtype,
        quantization_config=GgufConfig(dequantize=True),
    )  # fmt: skip
    with as_folder(str(file)) as folder:
        ours = AutoModelForCausalLM.from_pretrained(folder)
        assert len(AutoTokenizer.from_pretrained(folder)) == 2048
    return dict(ours.state_dict()), dict(theirs.state_dict())


def test_commands(bitlab: Run, quantized: Path, tmp_path: Path) -> None:
    scheme = ("--weight-granularity", "per_channel")
    found = bitlab("eval", quantized, *TEXT, "--json").json
    packed = bitlab("eval", quantized, *TEXT, *scheme, "--json").json
    done = bitlab("deploy", quantized, tmp_path / "packed", *scheme, "--json")
    assert done.code == 0, done.err
    assert done.json["bytes_before"] == quantized.stat().st_size
    stored = bitlab("eval", tmp_path / "packed", *TEXT, "--json").json
    assert found["nats"] != packed["nats"] == stored["nats"]
    done = bitlab("train", quantized, tmp_path / "latent", *TEXT[:4], "--steps", 1, "--batch", 2,
                  "--recipe", "distill", "--teacher", quantized, *scheme)  # fmt: skip
    assert done.code == 0, done.err
    # Beside it, only a bar that is gone.
    assert done.err.startswith("scales of the weights: per channel; ")
    assert len(done.err.strip().splitlines()) == 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "latent")
    assert model.config.quantization_config.weight_granularity == "per_channel"
    done = bitlab("generate", quantized, "def", "--max-tokens", 2, "--json")
    assert done.json["tokens"] == 2


def test_of_a_folder_with_other_files(
    quantized: Path, states: dict[str, Path], tmp_path: Path
) -> None:
    """What lies beside the file is not taken for its own."""
    folder = shutil.copytree(states["latent"], tmp_path / "mixed")
    (folder / "tokenizer.json").write_text("nonsense")
    file = shutil.copy(quantized, folder / "model.gguf")
    with as_folder(str(file)) as unpacked:
        model = AutoModelForCausalLM.from_pretrained(unpacked)
        assert len(AutoTokenizer.from_pretrained(unpacked)) == 2048
    assert not quantized_layers(model)
    scheme = BitLabConfig(mode="infer")
    with as_folder(str(quantized)) as unpacked:
        packed = AutoModelForCausalLM.from_pretrained(unpacked, quantization_config=scheme)
        latent = AutoModelForCausalLM.from_pretrained(unpacked, quantization_config=BitLabConfig())
    with torch.no_grad():
        assert torch.equal(packed(IDS).logits, deploy(latent)(IDS).logits)


def truncated(file: Path, target: Path) -> None:
    content = file.read_bytes()
    target.write_bytes(content[: len(content) // 2])


def renamed(old: bytes, new: bytes) -> Callable[[Path, Path], None]:
    def damage(file: Path, target: Path) -> None:
        content = file.read_bytes()
        assert old in content
        target.write_bytes(content.replace(old, new, 1))

    return damage


def of_another_type(file: Path, target: Path) -> None:
    """Names a type that nothing unpacks: the tensor's record ends in its type and its offset."""
    reader = gguf.GGUFReader(file)
    content = bytearray(file.read_bytes())
    record = next(item for item in reader.tensors if item.name == "blk.0.ffn_up.weight").field
    place = record.offset + sum(int(part.nbytes) for part in record.parts[:-2])
    content[place : place + 4] = int(gguf.GGMLQuantizationType.I8).to_bytes(4, "little")
    target.write_bytes(content)


DAMAGE: dict[str, Callable[[Path, Path], object]] = {
    "truncated": truncated,
    "not GGUF": lambda _file, target: target.write_bytes(b"nonsense" * 100),
    "empty": lambda _file, target: target.write_bytes(b""),
    "another architecture": renamed(b"\x05\x00\x00\x00\x00\x00\x00\x00llama", b"\x05\x00\x00\x00"
                                    b"\x00\x00\x00\x00lzama"),
    "not UTF-8": renamed(b"\x05\x00\x00\x00\x00\x00\x00\x00llama", b"\x05\x00\x00\x00"
                         b"\x00\x00\x00\x00\xff\xfeama"),
    "no layer": lambda file, target: rewrite(file, target, None, "blk.1.ffn_up.weight"),
    "no embedding": lambda file, target: rewrite(file, target, None, "token_embd.weight"),
    "a type that is not unpacked": of_another_type,
    "none": lambda _file, _target: None,
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files(bitlab: Run, quantized: Path, tmp_path: Path, kind: str) -> None:
    file = tmp_path / "bad.gguf"
    DAMAGE[kind](quantized, file)
    out = tmp_path / "out"
    for arguments in (
        ("eval", file, *TEXT),
        ("deploy", file, out),
        ("train", file, out, *TEXT[:4]),
        ("demo", "--model", file, "--output", out),
    ):
        done = bitlab(*arguments, "--json")
        assert done.code == 1, done
        assert "bad.gguf" in done.json["error"]
        assert len(done.err.strip().splitlines()) == 1, done.err
    assert not out.exists()


@pytest.mark.parametrize("kind", ["I8", "Q8_K", "Q2_0"])
def test_types_that_are_not_dequantized(
    bitlab: Run, ternary: Path, states: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """The file is whole, and the message does not call it damaged."""
    file = tmp_path / "whole.gguf"
    if kind == "Q2_0":
        model = AutoModelForCausalLM.from_pretrained(states["deployed"])
        export_gguf(model, file, kind, tokenizer=AutoTokenizer.from_pretrained(states["float"]))
    else:
        rewrite(ternary, file, gguf.GGMLQuantizationType[kind], "")
    held = read_gguf(file).tensors
    first = next(name for name, item in held.items() if item.kind == kind)
    done = bitlab("eval", file, *TEXT, "--json")
    assert done.code == 1
    error = done.json["error"]
    said = f"{file}: {first} must be of a type that can be dequantized, got {kind}. "
    assert error.startswith(said), error
    assert done.json["type"] == "CheckpointError"
    fix = error.removeprefix(said)
    if kind == "Q2_0":
        assert fix == "`bitlab import` makes a deployed model of a file of this type."
        assert bitlab("import", file, tmp_path / "imported", "--json").code == 0
    else:
        assert fix == "Fetch or write the model in another type, such as Q8_0 or F16."


def test_where_none_is_taken(bitlab: Run, quantized: Path, tmp_path: Path) -> None:
    for command in ("export", "convert"):
        done = bitlab(command, quantized, tmp_path / "out", "--json")
        assert "must be a folder or a hub name, got a GGUF file" in done.json["error"]


def test_without_the_package(ternary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with (
        pytest.raises(MissingExtraError, match=r"(?s)ternary\.gguf: .*pip install \"\.\[gguf"),
        as_folder(str(ternary)),
    ):
        pass
