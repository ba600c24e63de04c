"""Rows and columns of stored matrices, cut out and joined, against slices of the codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bitcore.config import BitQuantConfig
from bitcore.errors import CheckpointError, ConfigError
from bitcore.ops import linear, pack_weight, unpack_weight
from bitcore.quantize import quantize_rows_int8
from bitlab_vllm.slices import Slice, join, output_slices, take, take_int8

GRANULARITIES: dict[str, dict[str, Any]] = {
    "tensor": {},
    "channel": {"weight_granularity": "per_channel"},
    "groups": {"weight_granularity": "per_group", "group_size": 64},
    "floats": {
        "weight_granularity": "per_group", "group_size": 64, "group_scale_dtype": "float32",
    },
}  # fmt: skip


def stored(rows: int, columns: int, config: BitQuantConfig, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    packed = pack_weight(weight, config.granularity, config.group_size)
    return dict(zip(("qweight", "qweight_scale", "qweight_multiplier"), packed, strict=False))


def stored_int8(rows: int, columns: int, seed: int = 0) -> dict[str, Tensor]:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return dict(zip(("qweight", "qweight_scale"), quantize_rows_int8(weight), strict=True))


def weight_of(tensors: dict[str, Tensor], rows: int) -> Tensor:
    return unpack_weight(
        tensors["qweight"], tensors["qweight_scale"], rows, torch.float32,
        tensors.get("qweight_multiplier"),
    )  # fmt: skip


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("columns", [(0, 256), (64, 192)])
def test_ranges_of_rows_and_columns(granularity: str, columns: tuple[int, int]) -> None:
    config = BitQuantConfig(**GRANULARITIES[granularity])
    tensors = stored(27, 256, config)
    part = Slice("a", (27, 256), ((3, 10), (20, 27)), columns, padding=3)
    assert part.count == 17
    packed = join([take(part, config, tensors)])
    found = unpack_weight(packed[0], packed[1], part.count, torch.float32, packed[2])
    whole = weight_of(tensors, 27)[:, slice(*columns)]
    assert torch.equal(
        found, torch.cat([whole[3:10], whole[20:27], torch.zeros(3, found.shape[1])])
    )


@pytest.mark.parametrize(("columns", "zeros"), [((0, 250), 0), ((0, 125), 3), ((64, 192), 64)])
def test_ranges_of_int8_rows_and_columns(columns: tuple[int, int], zeros: int) -> None:
    """Where other processes have other columns, zeros stand behind one's own."""
    tensors = stored_int8(27, 250)
    part = Slice("a", (27, 250), ((3, 10), (20, 27)), columns, padding=3)
    found = take_int8(part, tensors)
    whole = tensors["qweight"][:, slice(*columns)]
    expected = torch.cat([whole[3:10], whole[20:27]])
    assert torch.equal(found.codes, torch.nn.functional.pad(expected, (0, zeros, 0, 3)))
    scale = tensors["qweight_scale"]
    assert torch.equal(found.scale, torch.cat([scale[3:10], scale[20:27], torch.zeros(3)]))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_joined_matrices_multiply_as_each_does(granularity: str) -> None:
    """Rows that are no multiples of four, as queries, keys and values are joined."""
    config = BitQuantConfig(**GRANULARITIES[granularity])
    matrices = [stored(rows, 128, config, seed) for seed, rows in enumerate((30, 7, 9))]
    slices = [Slice("a", (rows, 128), ((0, rows),), (0, 128)) for rows in (30, 7, 9)]
    qweight, scale, multiplier = join(
        [take(part, config, held) for part, held in zip(slices, matrices, strict=True)]
    )
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(9))
    y = linear(x, qweight, scale, None, 46, config.activation, multiplier)
    each = [
        linear(x, held["qweight"], held["qweight_scale"], None, part.count, config.activation,
               held.get("qweight_multiplier"))
        for part, held in zip(slices, matrices, strict=True)
    ]  # fmt: skip
    assert torch.equal(y, torch.cat(each, -1))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("processes", "copies"), [(1, 1), (2, 1), (4, 2)])
def test_rows_of_fused_layers_over_processes(fused: bool, processes: int, copies: int) -> None:
    """Queries of eight heads, keys and values of two, of three rows each."""
    wholes = {"q": 24, "k": 6, "v": 6}
    sizes = [24 // processes, 6 * copies // processes, 6 * copies // processes]
    names = ["qkv"] if fused else list(wholes)
    stored_rows = {"qkv": list(range(36))} if fused else {
        "q": list(range(24)), "k": list(range(24, 30)), "v": list(range(30, 36)),
    }  # fmt: skip
    for rank in range(processes):
        slices = output_slices(names, 64, sizes, [1, copies, copies], rank, processes)
        found = [
            row
            for part in slices
            for start, stop in part.rows
            for row in stored_rows[part.name][start:stop]
        ]
        assert all(part.shape == (len(stored_rows[part.name]), 64) for part in slices)
        queries, keys = rank * sizes[0], 24 + rank // copies * sizes[1]
        assert found == [
            *range(queries, queries + sizes[0]),
            *range(keys, keys + sizes[1]),
            *range(keys + 6, keys + 6 + sizes[1]),
        ]


def test_layers_that_are_neither_one_nor_all_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"must be one or 3, got \['a', 'b'\]"):
        output_slices(["a", "b"], 64, [1, 1, 1], [1, 1, 1], 0, 1)


@pytest.mark.parametrize("scales", ["uint8", "float32"])
def test_a_group_of_128_is_cut_into_two_of_64(scales: str) -> None:
    config = BitQuantConfig(
        weight_granularity="per_group", group_size=128, group_scale_dtype=scales
    )
    tensors = stored(5, 384, config)
    part = Slice("a", (5, 384), ((0, 5),), (192, 384))
    packed = join([take(part, config, tensors)])
    found = unpack_weight(packed[0], packed[1], 5, torch.float32, packed[2])
    assert torch.equal(found, weight_of(tensors, 5)[:, 192:])


def test_columns_that_end_within_a_group_are_refused() -> None:
    config = BitQuantConfig(**GRANULARITIES["groups"])
    part = Slice("model.down", (5, 192), ((0, 5),), (0, 96))
    with pytest.raises(ConfigError, match=r"whole groups of 64 inputs of model.down.*\nUse fewer"):
        take(part, config, stored(5, 192, config))


def spoil(tensors: dict[str, Tensor], leaf: str, how: str) -> None:
    if how == "missing":
        del tensors[leaf]
    elif how == "cut":
        tensors[leaf] = tensors[leaf][:-1]
    elif how == "cast":
        tensors[leaf] = tensors[leaf].to(torch.float16)
    else:
        tensors[leaf] = tensors[leaf].clone()
        tensors[leaf].view(-1)[3] = {
            "three": 255, "nan": torch.nan, "zero": 0, "large": 128, "least": -128,
        }[how]  # fmt: skip


@pytest.mark.parametrize(
    ("leaf", "how", "message"),
    [
        ("qweight", "missing", "a.qweight must be in the checkpoint, got none"),
        ("qweight_scale", "missing", "a.qweight_scale must be in the checkpoint, got none"),
        ("qweight_multiplier", "missing", "a.qweight_multiplier must be in the checkpoint"),
        ("qweight", "cut", r"a.qweight must be torch.uint8 \[3, 128\], got torch.uint8 \[2, 128\]"),
        ("qweight_scale", "cut", r"a.qweight_scale must be torch.float32 \[9\]"),
        ("qweight_scale", "cast", "a.qweight_scale must be .* got torch.float16"),
        ("qweight", "three", "a.qweight must hold the codes 0, 1 and 2, got 3"),
        ("qweight_scale", "nan", "a.qweight_scale must be finite and positive"),
        ("qweight_scale", "zero", "a.qweight_scale must be finite and positive"),
        ("qweight_multiplier", "large", "a.qweight_multiplier must be from 0 to 127, got 128"),
    ],
)
def test_damage_is_named(leaf: str, how: str, message: str) -> None:
    config = BitQuantConfig(**GRANULARITIES["groups"])
    tensors = stored(9, 128, config)
    spoil(tensors, leaf, how)
    with pytest.raises(CheckpointError, match=message):
        take(Slice("a", (9, 128), ((0, 9),), (0, 128)), config, tensors)


@pytest.mark.parametrize(
    ("leaf", "how", "message"),
    [
        ("qweight_scale", "missing", "a.qweight_scale must be in the checkpoint, got none"),
        ("qweight", "cut", r"a.qweight must be torch.int8 \[9, 128\], got torch.int8 \[8, 128\]"),
        ("qweight", "cast", "a.qweight must be torch.int8 .* got torch.float16"),
        ("qweight", "least", "a.qweight must be from -127 to 127, got -128"),
        ("qweight_scale", "nan", "a.qweight_scale must be finite and positive"),
    ],
)
def test_damage_of_int8_layers_is_named(leaf: str, how: str, message: str) -> None:
    tensors = stored_int8(9, 128)
    spoil(tensors, leaf, how)
    with pytest.raises(CheckpointError, match=message):
        take_int8(Slice("a", (9, 128), ((0, 9),), (0, 128)), tensors)
