"""GGUF headers that lie: each is refused, named, before any of the data is used."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from transformers import AutoTokenizer

from bitcore.errors import CheckpointError
from bitlab_hf import export_gguf, import_gguf
from bitlab_hf.interop.gguf_file import read_gguf
from tests.bitlab_hf.interop.test_gguf import DEMO, build

TERNARY, FLOAT = "blk.0.attn_q.weight", "token_embd.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    export_gguf(build("qwen2"), path, tokenizer=AutoTokenizer.from_pretrained(DEMO))
    return path


def test_the_header_is_what_the_package_reads(good: Path) -> None:
    ours, theirs = read_gguf(good), gguf.GGUFReader(good)
    fields = {name: held.contents() for name, held in theirs.fields.items()}
    assert ours.fields == {name: v for name, v in fields.items() if not name.startswith("GGUF.")}
    assert set(ours.tensors) == {item.name for item in theirs.tensors}
    for item in theirs.tensors:
        tensor = ours.tensors[item.name]
        assert tensor.kind == item.tensor_type.name
        assert tensor.shape == tuple(reversed(item.shape.tolist()))
        assert tensor.data.tobytes() == item.data.tobytes()


class Editor:
    """A copy of a file, with places to change by name."""

    def __init__(self, source: Path, target: Path) -> None:
        self.path, self.content = target, bytearray(source.read_bytes())
        reader = gguf.GGUFReader(source)
        self.fields = reader.fields
        self.tensors = {item.name: item for item in reader.tensors}

    def put(self, at: int, kind: str, value: int | float) -> None:
        struct.pack_into("<" + kind, self.content, at, value)

    def end_of(self, name: str) -> int:
        field = self.tensors[name].field
        return int(field.offset + sum(part.nbytes for part in field.parts))

    def offset(self, name: str) -> int:
        return int(self.tensors[name].field.parts[-1][0])

    def at(self, field: str, part: int) -> int:
        """Where a part of a field lies: 0 its name's length, 2 its type, 3 the value's first."""
        held = self.fields[field]
        return int(held.offset + sum(p.nbytes for p in held.parts[:part]))


def set_offset(name: str, change: Callable[[Editor], int]) -> Callable[[Editor], None]:
    return lambda file: file.put(file.end_of(name) - 8, "Q", change(file) % 2**64)


def set_type(name: str, kind: int) -> Callable[[Editor], None]:
    return lambda file: file.put(file.end_of(name) - 12, "I", kind)


def set_shape(name: str, *sizes: int) -> Callable[[Editor], None]:
    def change(file: Editor) -> None:
        for index, size in enumerate(reversed(sizes)):
            file.put(file.end_of(name) - 20 - 8 * index, "Q", size)

    return change


def set_part(field: str, part: int, kind: str, value: int | float) -> Callable[[Editor], None]:
    return lambda file: file.put(file.at(field, part), kind, value)


def append(count: int) -> Callable[[Editor], None]:
    return lambda file: file.content.extend(b"\0" * count)


TOKENS, NAME = "tokenizer.ggml.tokens", "general.architecture"
LIES: dict[str, tuple[Callable[[Editor], None], str]] = {
    "overlap": (set_offset(TERNARY, lambda file: file.offset(FLOAT)), "is the end of the one"),
    "unaligned": (set_offset(TERNARY, lambda file: file.offset(TERNARY) + 1), "is the end of"),
    "elsewhere": (set_offset(TERNARY, lambda file: file.offset(TERNARY) + 32), "is the end of"),
    "wrapping": (set_offset(TERNARY, lambda file: file.offset(TERNARY) - 2**64 + 2**63), "end of"),
    "negative": (set_offset(TERNARY, lambda file: -32), "is the end of the one before"),
    "beyond": (set_offset(TERNARY, lambda file: len(file.content)), "is the end of the one before"),
    "another type": (set_type(TERNARY, gguf.GGMLQuantizationType.TQ1_0), "is the end of"),
    "a wider type": (set_type(FLOAT, gguf.GGMLQuantizationType.F64), "is the end of|to .* with"),
    "a vector in blocks": (set_type("output_norm.weight", 20), "in rows of blocks of 32"),
    "Q2_0": (set_type(TERNARY, 42), "is the end of"),
    "half a block of Q2_0": (
        lambda file: (set_type(TERNARY, 42)(file), set_shape(TERNARY, 96, 256)(file))[0],
        r"\[96, 256\], in rows of blocks of 64",
    ),
    "no type": (set_type(TERNARY, 250), "of the unknown type 250"),
    "a huge shape": (set_shape(TERNARY, 2**62, 2**62), "is the end of|to .* with"),
    "an empty shape": (set_shape(TERNARY, 256, 0), r"of the shape \[256, 0\]"),
    "half a block": (set_shape(TERNARY, 255, 256), r"\[255, 256\], in rows of blocks of 256"),
    "an array without end": (set_part(TOKENS, 4, "Q", 2**60), "values of tokenizer.ggml.tokens"),
    "an array too long": (set_part(TOKENS, 4, "Q", 2**20), "with .* left in the file"),
    "an array of arrays": (set_part(TOKENS, 3, "I", 9), "an array of the type 9"),
    "an array of nothing": (set_part(TOKENS, 3, "I", 99), "an array of the type 99"),
    "a field of nothing": (set_part(NAME, 2, "I", 77), "of the unknown type 77"),
    "a text too long": (set_part(NAME, 3, "Q", 2**63), "of 9223372036854775808 bytes"),
    "no UTF-8": (set_part(NAME, 4, "B", 0xFF), "general.architecture that is not UTF-8"),
    "no UTF-8 in an array": (set_part(TOKENS, 6, "B", 0xFF), "tokens that is not UTF-8"),
    "no UTF-8 in a name": (set_part(NAME, 1, "B", 0xFF), "a field's name that is not UTF-8"),
    "NaN": (set_part("qwen2.rope.freq_base", 3, "f", float("nan")), "freq_base that is not finite"),
    "tensors without end": (lambda file: file.put(8, "Q", 2**63), "9223372036854775808 tensors"),
    "a tensor too many": (lambda file: file.put(8, "Q", len(file.tensors) + 1), ""),
    "a tensor too few": (lambda file: file.put(8, "Q", len(file.tensors) - 1), ""),
    "fields without end": (lambda file: file.put(16, "Q", 2**60), "1152921504606846976 fields"),
    "a field too many": (lambda file: file.put(16, "Q", len(file.fields) - 2), ""),
    "a field too few": (lambda file: file.put(16, "Q", len(file.fields) - 4), ""),
    "the other byte order": (lambda file: file.put(4, "I", 3 << 24), "version 50331648"),
    "another version": (lambda file: file.put(4, "I", 1), "version 1, of which 2 and 3 are known"),
    "bytes of nobody": (append(32), "32 bytes that belong to no tensor"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_refused(lie: str, good: Path, tmp_path: Path) -> None:
    change, message = LIES[lie]
    file = Editor(good, tmp_path / "bad.gguf")
    change(file)
    assert file.content != good.read_bytes()
    file.path.write_bytes(file.content)
    started = time.perf_counter()
    expected = f"bad.gguf must be a whole GGUF file, got: .*({message})"
    with pytest.raises(CheckpointError, match=expected):
        import_gguf(file.path, tmp_path / "out")
    assert time.perf_counter() - started < 5
    assert not (tmp_path / "out").exists()


def written(path: Path, values: dict[str, Any], align: int | None = None) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    if align is not None:
        writer.add_custom_alignment(align)
    for name, value in values.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("align", [None, 8, 64, 4096])
def test_alignments(tmp_path: Path, align: int | None) -> None:
    values = {name: np.full(size, size, np.float32) for name, size in (("a", 1), ("b", 33))}
    path = written(tmp_path / "m.gguf", values, align)
    tensors = read_gguf(path).tensors
    for name, value in values.items():
        assert tensors[name].data.tobytes() == value.tobytes()
    # The padding behind the last one may be left out.
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - (-33 * 4) % (align or 32)])
    assert set(read_gguf(path).tensors) == {"a", "b"}
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="b to .*, with .* bytes in the file"):
        read_gguf(path)


@pytest.mark.parametrize("align", [1, 4, 12, 2**31])
def test_alignments_that_are_none(tmp_path: Path, align: int) -> None:
    path = written(tmp_path / "m.gguf", {"a": np.zeros(3, np.float32)}, 64)
    content = path.read_bytes()
    name = b"general.alignment" + struct.pack("<I", 4)
    at = content.index(name) + len(name)
    path.write_bytes(content[:at] + struct.pack("<I", align) + content[at + 4 :])
    with pytest.raises(CheckpointError, match="m.gguf must be a whole GGUF file"):
        read_gguf(path)


def test_every_truncation_of_a_header(good: Path, tmp_path: Path) -> None:
    content = good.read_bytes()
    small = written(tmp_path / "small.gguf", {"a": np.zeros(3, np.float32)}).read_bytes()
    path = tmp_path / "bad.gguf"
    for whole, sizes in (
        (small, range(len(small) - 21)),
        (content, range(0, len(content), 99_991)),
    ):
        for size in sizes:
            path.write_bytes(whole[:size])
            with pytest.raises(CheckpointError, match="bad.gguf must be a whole GGUF file"):
                read_gguf(path)


def test_values_that_are_not_finite(good: Path, tmp_path: Path) -> None:
    file = Editor(good, tmp_path / "bad.gguf")
    item = file.tensors["output_norm.weight"]
    file.put(item.data_offset, "f", float("nan"))
    file.path.write_bytes(file.content)
    with pytest.raises(CheckpointError, match="model.norm.weight must be finite, got NaN"):
        import_gguf(file.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
