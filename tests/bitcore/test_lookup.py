"""Rows looked up in packed form are the rows of the unpacked matrix, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitcore import ops, pack_ternary
from bitcore.lookup import lookup_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["per_tensor", "per_channel", "groups", "two_levels"]


def packed(rows: int, columns: int, kind: str) -> tuple[Tensor, Tensor, Tensor | None]:
    torch.manual_seed(rows)
    codes = torch.randint(-1, 2, (rows, columns), dtype=torch.int8)
    scale = torch.rand(1 if kind == "per_tensor" else rows) + 0.01
    multiplier = None
    if kind == "groups":
        scale = torch.rand(rows, columns // 64) + 0.01
    elif kind == "two_levels":
        multiplier = torch.randint(1, 128, (rows, columns // 64), dtype=torch.uint8)
    return pack_ternary(codes), scale, multiplier


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 64, 97, 98, 99, 100])
def test_rows(rows: int, kind: str, dtype: torch.dtype) -> None:
    qweight, scale, multiplier = packed(rows, 128, kind)
    whole = ops.unpack_weight(qweight, scale, rows, dtype, multiplier)
    every = torch.arange(rows)
    found = lookup_rows(every, qweight, scale, rows, dtype, multiplier)
    assert found.dtype == dtype
    assert torch.equal(found, whole)
    # In any order and shape, more than once, in both dtypes of numbers.
    mixed = torch.randint(0, rows, (3, 5, 2))
    for indices in (mixed, mixed.int(), mixed.transpose(0, 1), mixed[0, 0, 0]):
        got = lookup_rows(indices, qweight, scale, rows, dtype, multiplier)
        assert got.shape == (*indices.shape, 128)
        assert torch.equal(got, whole[indices.long()])
    assert lookup_rows(mixed[:0], qweight, scale, rows, dtype, multiplier).shape == (0, 5, 2, 128)


def test_columns_that_no_group_divides() -> None:
    qweight, scale, _ = packed(7, 33, "per_channel")
    whole = ops.unpack_weight(qweight, scale, 7, torch.float32)
    assert torch.equal(lookup_rows(torch.arange(7), qweight, scale, 7, torch.float32), whole)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 5, 97, 98, 99, 100])
def test_numbers_that_are_no_row(rows: int, kind: str) -> None:
    """Rows of padding are not read either, nor do negative numbers count from the end."""
    qweight, scale, multiplier = packed(rows, 64, kind)
    for wrong in (-1, -rows, rows, 4 * len(qweight) - 1 + (rows % 4 == 0), 4 * len(qweight), 2**40):
        for indices in (torch.tensor([0, wrong]), torch.tensor([wrong])):
            with pytest.raises(IndexError):
                lookup_rows(indices, qweight, scale, rows, torch.float32, multiplier)


def test_in_a_graph() -> None:
    qweight, scale, multiplier = packed(97, 128, "two_levels")
    indices = torch.tensor([[0, 96], [50, 24]])
    compiled = torch.compile(lookup_rows, backend="aot_eager", fullgraph=True)
    assert torch.equal(
        compiled(indices, qweight, scale, 97, torch.float32, multiplier),
        lookup_rows(indices, qweight, scale, 97, torch.float32, multiplier),
    )
