"""A layer of vLLM's from the tensors of its stored layers, in whatever order they come."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bitcore.config import BitQuantConfig
from bitcore.errors import CheckpointError
from bitcore.norm import rms_norm
from bitcore.ops import linear, linear_int8, unpack_weight
from bitcore.quantize import dequantize_rows_int8
from bitlab_vllm.arriving import NORM, Arriving, Stored
from bitlab_vllm.scheme import FLOAT, INT8, Form
from bitlab_vllm.slices import Slice
from tests.bitlab_vllm.test_slices import GRANULARITIES, stored, stored_int8

SIZES = {"q": 30, "k": 7, "v": 9}


def made(kind: str, rows: int) -> tuple[Form, dict[str, Tensor]]:
    """How a layer of this granularity is held, and its tensors; or one that is int8 or float."""
    if kind == FLOAT:
        return kind, {"weight": torch.randn(rows, 128)}
    if kind == INT8:
        return kind, stored_int8(rows, 128, seed=rows)
    config = BitQuantConfig(**GRANULARITIES[kind])
    return config, stored(rows, 128, config, seed=rows)


def layer(*kinds: str, norms: str = "") -> tuple[Arriving, dict[str, dict[str, Tensor]]]:
    """Queries, keys and values of these kinds."""
    described, tensors = [], {}
    for (shard, rows), kind in zip(SIZES.items(), kinds, strict=True):
        form, tensors[shard] = made(kind, rows)
        part = Slice(f"{shard}_proj", (rows, 128), ((0, rows),), (0, 128))
        described.append(Stored(part, form, shard in norms))
        if shard in norms:
            tensors[shard][NORM] = torch.rand(128) + 0.5
    return Arriving(described, torch.device("cpu"), torch.float32), tensors


def expected(x: Tensor, held: dict[str, Tensor], rows: int) -> Tensor:
    if "weight" in held:
        return F.linear(x, held["weight"])
    if held["qweight"].dtype == torch.int8:
        return linear_int8(x, held["qweight"], held["qweight_scale"], None)
    x = rms_norm(x, held[NORM]) if NORM in held else x
    return linear(x, held["qweight"], held["qweight_scale"], None, rows, "int8_per_token",
                  held.get("qweight_multiplier"))  # fmt: skip


@pytest.mark.parametrize(
    ("kinds", "norms", "parts"),
    [
        (("tensor", "channel", "tensor"), "", 1),
        (("groups", "groups", "groups"), "", 1),
        (("groups", "floats", "floats"), "", 2),
        (("tensor", FLOAT, "tensor"), "", 3),
        ((INT8, INT8, INT8), "", 1),
        ((INT8, "channel", FLOAT), "q", 3),
        (("channel", "channel", "channel"), "qkv", 3),
        (("channel", "channel", "channel"), "v", 2),
    ],
)
def test_parts_multiply_as_the_stored_layers_do(
    kinds: tuple[str, ...], norms: str, parts: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 128)
    for order in permutations(SIZES):
        arriving, tensors = layer(*kinds, norms=norms)
        for shard in order:
            for leaf, tensor in reversed(tensors[shard].items()):
                arriving.add(leaf, tensor, shard)
        found = arriving.parts()
        assert len(found) == parts
        y = torch.cat([part(x, None) for part in found], -1)
        each = [expected(x, tensors[shard], rows) for shard, rows in SIZES.items()]
        assert torch.equal(y, torch.cat(each, -1))


def test_loaders_hand_on_what_vllm_gives_them() -> None:
    arriving, tensors = layer("tensor", "tensor", "tensor")
    for leaf in ("qweight", "qweight_scale"):
        parameter: Any = arriving.placeholder(leaf)
        assert parameter.numel() == 0
        for shard in SIZES:
            parameter.weight_loader(parameter, tensors[shard][leaf], shard)
    sentinel: Any = arriving.placeholder("weight")
    sentinel.weight_loader(sentinel, torch.empty(0, dtype=torch.uint8), "q")
    assert sum(part.rows for part in arriving.parts()) == sum(SIZES.values())


@pytest.mark.parametrize("kind", [*GRANULARITIES, INT8])
@pytest.mark.parametrize("rows", [(0, 9), (9, 17)])
def test_an_embedding_looks_up_the_rows_that_a_process_has(
    kind: str, rows: tuple[int, int]
) -> None:
    """Two processes share 17 rows; nine each, one of them for nothing."""
    form, tensors = made(kind, 17)
    part = Slice("embed_tokens", (17, 128), (rows,), (0, 128), 9 - rows[1] + rows[0])
    arriving = Arriving([Stored(part, form, False)], torch.device("cpu"), torch.bfloat16)
    for leaf, tensor in tensors.items():
        arriving.add(leaf, tensor)
    (held,) = arriving.parts()
    scale, multiplier = tensors["qweight_scale"], tensors.get("qweight_multiplier")
    whole = (
        dequantize_rows_int8(tensors["qweight"], scale, torch.bfloat16)
        if kind == INT8
        else unpack_weight(tensors["qweight"], scale, 17, torch.bfloat16, multiplier)
    )
    ids = torch.tensor([[7, 0, 3], [0, 1, 7]])
    found = held.lookup(ids, torch.bfloat16)
    assert torch.equal(found, whole[slice(*rows)][ids])
    # What is looked up for another process is no row of this one's, and is masked by vLLM.
    assert held.lookup(torch.tensor(8), torch.bfloat16).shape == (128,)


def test_int8_parameters_are_told_to_vllm() -> None:
    for kind, dtype in ((INT8, torch.int8), ("tensor", torch.uint8)):
        arriving, _ = layer(kind, kind, kind)
        assert arriving.placeholder("qweight").dtype == dtype


@pytest.mark.parametrize("leaf", ["qweight", "qweight_scale", NORM])
def test_a_tensor_that_has_not_come_is_named(leaf: str) -> None:
    arriving, tensors = layer("tensor", "tensor", "tensor", norms="k")
    for shard, held in tensors.items():
        for name, tensor in held.items():
            if (shard, name) != ("k", leaf):
                arriving.add(name, tensor, shard)
    with pytest.raises(CheckpointError, match=f"k_proj.{leaf} must be in the checkpoint, got none"):
        arriving.parts()


def test_a_tensor_of_no_stored_layer_is_refused() -> None:
    arriving, tensors = layer("tensor", "tensor", "tensor")
    for shard in (None, 3, (0, 1)):
        with pytest.raises(CheckpointError, match="must be of one of .*q_proj"):
            arriving.add("qweight", tensors["q"]["qweight"], shard)
