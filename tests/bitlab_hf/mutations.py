"""Files changed at random, and what may come of loading one: the parts of `test_mutations`.

A mutation says whether other outputs are legal after it: where it hit values that any writer could
have written (a bit of a weight, a hyperparameter), nothing in the file can show it.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

Rng = random.Random
SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1}
FLOATS = ("F64", "F32", "F16", "BF16")
JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 3, 7, 1.5, float("nan"), "", "x", "../x", "(", "\x1b[31m", [], {},
    [None], ["x"], [[]], {"x": None}, {"x": 1}, 2**63,
]  # fmt: skip
EXTREMES = [0, 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1]


@dataclass(frozen=True)
class Mutation:
    """What was done to a folder, and whether its model may give other outputs now."""

    what: str
    legal: bool


class Safetensors:
    """A file taken apart: its header as an ordered list, so that keys can stand twice."""

    def __init__(self, path: Path) -> None:
        self.path, self.content = path, bytearray(path.read_bytes())
        (self.size,) = struct.unpack_from("<Q", self.content)
        self.header: list[tuple[str, Any]] = list(
            json.loads(self.content[8 : 8 + self.size]).items()
        )
        self.data = bytes(self.content[8 + self.size :])

    def tensors(self) -> list[str]:
        return [name for name, held in self.header if name != "__metadata__" and numel(held)]

    def entry(self, name: str) -> dict[str, Any]:
        held: dict[str, Any] = dict(self.header)[name]
        return held

    def write_header(self) -> None:
        text = ", ".join(f"{json.dumps(name)}: {json.dumps(held)}" for name, held in self.header)
        content = f"{{{text}}}".encode()
        self.path.write_bytes(struct.pack("<Q", len(content)) + content + self.data)

    def write_content(self) -> None:
        self.path.write_bytes(self.content)

    def put(self, name: str, at: int, value: bytes) -> None:
        start = 8 + self.size + self.entry(name)["data_offsets"][0] + at
        self.content[start : start + len(value)] = value


def numel(held: dict[str, Any]) -> int:
    start, end = held["data_offsets"]
    return int(end - start) // SIZES[held["dtype"]]


def flip(content: bytearray, at: int, rng: Rng) -> None:
    content[at] ^= 1 << rng.randrange(8)


def weights_of(folder: Path, rng: Rng) -> Safetensors:
    return Safetensors(rng.choice(sorted(folder.glob("*.safetensors"))))


# Each takes a folder and a source of random numbers.


def header_bit(folder: Path, rng: Rng) -> Mutation:
    file = weights_of(folder, rng)
    at = rng.randrange(8 + file.size)
    flip(file.content, at, rng)
    file.write_content()
    return Mutation(f"a bit of byte {at} of the header of {file.path.name}", legal=False)


def data_bit(folder: Path, rng: Rng) -> Mutation:
    file = weights_of(folder, rng)
    at = rng.randrange(8 + file.size, len(file.content))
    flip(file.content, at, rng)
    file.write_content()
    return Mutation(f"a bit of byte {at} of {file.path.name}", legal=True)


def length(folder: Path, rng: Rng) -> Mutation:
    file = weights_of(folder, rng)
    if rng.random() < 0.3:
        added = rng.randrange(1, 100)
        file.content += bytes(added)
        file.write_content()
        return Mutation(f"{added} bytes after {file.path.name}", legal=False)
    size = rng.randrange(len(file.content))
    file.path.write_bytes(file.content[:size])
    return Mutation(f"{file.path.name} cut to {size} bytes", legal=False)


def value(folder: Path, rng: Rng) -> Mutation:
    """A value that no writer writes, where the file says that nothing of its kind may stand."""
    file = weights_of(folder, rng)
    name = rng.choice(file.tensors())
    held = file.entry(name)
    index = rng.randrange(numel(held))
    if held["dtype"] in ("F32", "F16", "BF16"):
        new = rng.choice([float("nan"), float("inf"), float("-inf"), 0.0, -1.0, 1e30])
        packed = struct.pack("<f", new)
        if held["dtype"] == "F16":
            packed = struct.pack("<e", new if new != 1e30 else 6e4)
        part = packed[2:] if held["dtype"] == "BF16" else packed
        # A scale of a packed layer is finite and positive.
        scale = name.endswith("_scale")
        file.put(name, index * SIZES[held["dtype"]], part)
        file.write_content()
        return Mutation(f"{name}[{index}] = {new}", legal=not scale or new == 1e30)
    if name.endswith("_multiplier") and rng.random() < 0.5:
        # A row of groups needs one that is not 0.
        columns = held["shape"][1]
        row = index // columns
        file.put(name, row * columns, bytes(columns))
        file.write_content()
        return Mutation(f"{name}[{row}] = 0", legal=False)
    new_byte = 0xFF
    if held["dtype"] == "I8" or name.endswith("_multiplier"):
        new_byte = 0x80
    file.put(name, index, bytes([new_byte]))
    file.write_content()
    return Mutation(f"{name}[{index}] = {new_byte:#x}", legal=False)


def dtype(folder: Path, rng: Rng) -> Mutation:
    file = weights_of(folder, rng)
    name = rng.choice(file.tensors())
    held = file.entry(name)
    same = [d for d in SIZES if SIZES[d] == SIZES[held["dtype"]] and d != held["dtype"]]
    new = rng.choice(same) if same and rng.random() < 0.7 else rng.choice([*SIZES, "X9", ""])
    old, held["dtype"] = held["dtype"], new
    file.write_header()
    # The same bits read as another float are values like any others.
    legal = old == new or (old in FLOATS and new in FLOATS and SIZES[old] == SIZES[new])
    return Mutation(f"{name} as {new!r} instead of {old}", legal)


def shape(folder: Path, rng: Rng) -> Mutation:
    file = weights_of(folder, rng)
    name = rng.choice(file.tensors())
    held = file.entry(name)
    old = list(held["shape"])
    options: list[list[Any]] = [
        old[::-1], [numel(held)], [1, *old], [*old, 1], [2 * old[0], *old[1:]], [], [0], [-1],
        [2**63, 2], [2**32, 2**32], [s // 2 for s in old], ["x"],
    ]  # fmt: skip
    held["shape"] = rng.choice(options)
    file.write_header()
    return Mutation(f"{name} of shape {held['shape']} instead of {old}", held["shape"] == old)


def offsets(folder: Path, rng: Rng) -> Mutation:
    file = weights_of(folder, rng)
    first, second = rng.choices(file.tensors(), k=2)
    one, two = file.entry(first), file.entry(second)
    if rng.random() < 0.5:
        alike = numel(one) * SIZES[one["dtype"]] == numel(two) * SIZES[two["dtype"]]
        one["data_offsets"], two["data_offsets"] = two["data_offsets"], one["data_offsets"]
        file.write_header()
        # As if the names were the other way round: nothing shows it.
        return Mutation(f"{first} and {second} change places", alike)
    start, end = one["data_offsets"]
    one["data_offsets"] = rng.choice(
        [
            two["data_offsets"],
            [start + 1, end + 1],
            [end, start],
            [start, 2**63],
            [-1, end],
            [],
            [0],
        ]
    )
    file.write_header()
    return Mutation(f"{first} at {one['data_offsets']}", first == second)


def names(folder: Path, rng: Rng) -> Mutation:
    file = weights_of(folder, rng)
    index = rng.randrange(len(file.header))
    name, held = file.header[index]
    if name == "__metadata__":
        return metadata(folder, rng)
    kind = rng.randrange(4)
    if kind == 0:
        new = rng.choice(
            [name + "x", name[1:], name.upper(), "", "x" * 5000, "a\x1b[31m\n", "../x"]
        )
        file.header[index] = (new, held)
    elif kind == 1:
        del file.header[index]
    elif kind == 2:
        file.header.append(
            (name, rng.choice([held, dict(file.header)[rng.choice(file.tensors())]]))
        )
    else:
        empty = {"dtype": "U8", "shape": [0], "data_offsets": [len(file.data)] * 2}
        file.header.append((rng.choice([name, "more", name + ".qweight"]), empty))
    file.write_header()
    return Mutation(f"names: {('renamed', 'dropped', 'twice', 'empty')[kind]} {name}", legal=False)


def metadata(folder: Path, rng: Rng) -> Mutation:
    file = weights_of(folder, rng)
    held: Any = dict(file.header).get("__metadata__", {})
    layers = json.loads(held.get("bitlab_layers", "[]"))
    options: list[Any] = [
        "[null]", "{}", "3", '"x"', "[", "[" * 100_000, "[[]]", "[3]", '[""]', "[]",
        json.dumps(layers[1:]), json.dumps([*layers, "x"]), json.dumps(layers * 2),
    ]  # fmt: skip
    text = rng.choice(options)
    header = [(name, entry) for name, entry in file.header if name != "__metadata__"]
    if rng.random() < 0.9:
        header.insert(0, ("__metadata__", {"format": "pt", "bitlab_layers": text}))
    file.header = header
    file.write_header()
    return Mutation(f"metadata: bitlab_layers = {text!r:.60}", legal=False)


def index_edit(folder: Path, rng: Rng) -> Mutation:
    file = folder / "model.safetensors.index.json"
    if not file.exists():
        return header_bit(folder, rng)
    content = json.loads(file.read_text())
    held = content["weight_map"]
    key = rng.choice(sorted(held))
    kind = rng.randrange(6)
    if kind == 0:
        held[key] = rng.choice([*held.values(), "none.safetensors", "config.json", *JUNK])
    elif kind == 1:
        del held[key]
    elif kind == 2:
        held["more"] = rng.choice(sorted(held.values()))
    elif kind == 3:
        content["weight_map"] = rng.choice(JUNK)
    elif kind == 4:
        return text_bit(file, rng, legal=False)
    else:
        first, second = (Safetensors(path) for path in sorted(folder.glob("*.safetensors"))[:2])
        name = rng.choice(first.tensors())
        entry = first.entry(name)
        start, end = entry["data_offsets"]
        at = len(second.data)
        second.data += bytes(end - start) if rng.random() < 0.5 else first.data[start:end]
        second.header.append((name, {**entry, "data_offsets": [at, at + end - start]}))
        second.write_header()
        return Mutation(f"{name} in two shards", legal=False)
    file.write_text(json.dumps(content))
    return Mutation(f"index: {kind} at {key}", legal=False)


def text_bit(file: Path, rng: Rng, legal: bool) -> Mutation:
    content = bytearray(file.read_bytes())
    at = rng.randrange(len(content))
    flip(content, at, rng)
    file.write_bytes(content)
    return Mutation(f"a bit of byte {at} of {file.name}", legal)


def config_edit(folder: Path, rng: Rng) -> Mutation:
    """Hyperparameters: whatever still makes a model is one."""
    file = folder / "config.json"
    if rng.random() < 0.4:
        return text_bit(file, rng, legal=True)
    content = json.loads(file.read_text())
    place = content
    if isinstance(content.get("quantization_config"), dict) and rng.random() < 0.6:
        place = content["quantization_config"]
    key = rng.choice(sorted(place))
    # Other sizes than the file's make a stock model of any size, and are transformers' to judge.
    new = rng.choice(JUNK[:-1])
    if rng.random() < 0.2:
        del place[key]
    else:
        place[key] = new
    file.write_text(json.dumps(content))
    return Mutation(f"config: {key} = {new!r}", legal=True)


def version(folder: Path, rng: Rng) -> Mutation:
    """Another version, or other scales of groups, than the tensors have."""
    file = folder / "config.json"
    content = json.loads(file.read_text())
    scheme = content.get("quantization_config")
    if not isinstance(scheme, dict) or scheme.get("quant_method") != "bitlab":
        return config_edit(folder, rng)
    before = dict(scheme)
    if rng.random() < 0.5:
        scheme.pop("group_scale_dtype", None)
    else:
        scheme["group_scale_dtype"] = rng.choice(["uint8", "float32", None])
    if rng.random() < 0.5:
        scheme["format_version"] = rng.choice([1, 2, 3, 4])
    file.write_text(json.dumps(content))
    # Of latent groups any kind of scales can be made.
    legal = scheme == before or scheme["weight_format"] == "latent"
    return Mutation(f"config: {scheme}", legal)


def deep_json(folder: Path, rng: Rng) -> Mutation:
    file = rng.choice(sorted(folder.glob("*.json")))
    file.write_text("[" * 100_000)
    return Mutation(f"{file.name} nested without end", legal=False)


def gguf_header(folder: Path, rng: Rng) -> Mutation:
    """A bit, or a number that no count may be, in the metadata or in the tensors' records."""
    (file,) = folder.glob("*.gguf")
    content, reader = bytearray(file.read_bytes()), gguf.GGUFReader(file)
    records = int(reader.tensors[0].field.offset)
    at = rng.randrange(reader.data_offset - 8)
    if rng.random() < 0.5:
        flip(content, at, rng)
    else:
        kind, most = rng.choice([("<Q", 2**64), ("<I", 2**32)])
        struct.pack_into(kind, content, at, rng.choice(EXTREMES) % most)
    file.write_bytes(content)
    # The metadata are hyperparameters, and their lengths and names.
    return Mutation(f"byte {at} of the header, records from {records}", legal=at < records)


def gguf_record(folder: Path, rng: Rng) -> Mutation:
    (file,) = folder.glob("*.gguf")
    content, reader = bytearray(file.read_bytes()), gguf.GGUFReader(file)
    one, two = rng.choices(reader.tensors, k=2)
    ends = [int(t.field.offset + sum(p.nbytes for p in t.field.parts)) for t in (one, two)]
    if rng.random() < 0.5:
        # The type, too, or another place.
        new = rng.choice(sorted(int(kind) for kind in gguf.GGMLQuantizationType))
        struct.pack_into("<I", content, ends[0] - 12, new)
        legal = {int(one.tensor_type), new} <= {1, 30} or new == int(one.tensor_type)
        what = f"{one.name} of type {new}"
    else:
        place = [int(t.field.parts[-1][0]) for t in (one, two)]
        struct.pack_into("<Q", content, ends[0] - 8, place[1])
        swapped = rng.random() < 0.5
        if swapped:
            struct.pack_into("<Q", content, ends[1] - 8, place[0])
        legal = (swapped and one.n_bytes == two.n_bytes) or one.name == two.name
        what = f"{one.name} at the place of {two.name}, {swapped=}"
    file.write_bytes(content)
    return Mutation(what, legal)


def gguf_data(folder: Path, rng: Rng) -> Mutation:
    (file,) = folder.glob("*.gguf")
    content, start = bytearray(file.read_bytes()), gguf.GGUFReader(file).data_offset
    at = rng.randrange(start, len(content))
    flip(content, at, rng)
    file.write_bytes(content)
    return Mutation(f"a bit of byte {at}", legal=True)


def gguf_length(folder: Path, rng: Rng) -> Mutation:
    (file,) = folder.glob("*.gguf")
    content = file.read_bytes()
    if rng.random() < 0.3:
        file.write_bytes(content + bytes(rng.randrange(32, 1000)))
        return Mutation("bytes after the last tensor", legal=False)
    size = rng.randrange(len(content))
    file.write_bytes(content[:size])
    return Mutation(f"cut to {size} bytes", legal=False)


SAFETENSORS: list[Callable[[Path, Rng], Mutation]] = [
    header_bit, data_bit, length, value, dtype, shape, offsets, names, metadata, index_edit,
    config_edit, config_edit, version, deep_json,
]  # fmt: skip
GGUF: list[Callable[[Path, Rng], Mutation]] = [gguf_header, gguf_record, gguf_data, gguf_length]
