from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, reduce
from operator import add

import pytest
import torch
from torch import Tensor

from bitcore import quantize, reference, unpack_ternary
from bitcore.errors import ArgumentError, ArgumentTypeError
from bitcore.ops import row_sums
from bitcore.quantize import lane_sums, mean_scale, total, two_levels, weight_scale
from tests.conftest import native_kernels
from tests.native.cuda.host import HostKernels

GRANULARITIES = [
    ("per_tensor", 0),
    ("per_channel", 0),
    ("per_group", 64),
    ("per_group", 128),
    ("per_group_float32", 64),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN = float("nan")


def test_weight_scale_against_float64() -> None:
    weight = torch.randn(37, 192, dtype=torch.float64).float()
    exact = weight.double().abs()
    for granularity, expected in (
        ("per_tensor", exact.mean().view(1)),
        ("per_channel", exact.mean(1)),
        ("per_group", exact.view(37, 3, 64).mean(2)),
        ("per_group_float32", exact.view(37, 3, 64).mean(2)),
    ):
        scale = quantize.weight_scale(weight, granularity, 64)
        assert torch.equal(scale, expected.float())


def test_ternarize_rounds_half_to_even_and_clamps() -> None:
    scale = torch.tensor([2.0])
    weight = torch.tensor([[-9.0, -1.0000001, -1.0, 0.0, 1.0, 1.0000001, 9.0, float("nan")]])
    codes = quantize.ternarize(weight, scale)
    assert codes.tolist() == [[-1, -1, 0, 0, 0, 1, 1, 0]]


def test_zero_weight_has_the_least_scale() -> None:
    assert quantize.weight_scale(torch.zeros(4, 64), "per_tensor").item() == pytest.approx(1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("granularity", "group"), GRANULARITIES)
def test_nonfinite_weight_gives_nan_scale_where_it_stands(
    isa: str, value: float, granularity: str, group: int
) -> None:
    weight = torch.randn(5, 128)
    weight[3, 70] = value
    for pack in (native_kernels().pack_weight, reference.pack_weight):
        qweight, scale, multiplier = pack(weight, granularity, group)
        expected = torch.zeros_like(scale, dtype=torch.bool)
        expected[{"per_tensor": 0, "per_group_float32": (3, 1)}.get(granularity, 3)] = True
        assert torch.equal(scale.isnan(), expected)
        if granularity == "per_group":
            assert multiplier is not None
            assert multiplier[3].eq(1).all()
            assert multiplier.amax(1)[[0, 1, 2, 4]].eq(127).all()
            assert unpack_ternary(qweight, 5)[3].eq(0).all()


@cache
def packed_by_reference(
    shape: tuple[int, int], granularity: str, group: int, dtype: torch.dtype
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """A weight, and what the reference makes of it: the same for every ISA and thread count."""
    # Groups of many sizes, so that multipliers are.
    weight = torch.randn(shape) * torch.rand(shape[0], shape[1] // 64).repeat_interleave(64, 1)
    weight = (weight * 0.04).to(dtype)
    return weight, reference.pack_weight(weight, granularity, group)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("granularity", "group"), GRANULARITIES)
@pytest.mark.parametrize(
    "shape", [(1, 128), (5, 128), (64, 384), (65, 1152), (130, 2560), (33, 6912)]
)
def test_pack_weight_equals_the_reference(
    isa: str,
    num_threads: int,
    shape: tuple[int, int],
    granularity: str,
    group: int,
    dtype: torch.dtype,
) -> None:
    weight, expected = packed_by_reference(shape, granularity, group, dtype)
    assert_same(native_kernels().pack_weight(weight, granularity, group), expected)


@pytest.mark.parametrize("in_features", [1, 15, 17, 63, 65])
def test_pack_weight_at_odd_widths(isa: str, in_features: int) -> None:
    weight = torch.randn(7, in_features)
    for granularity in ("per_tensor", "per_channel"):
        assert_same(
            native_kernels().pack_weight(weight, granularity, 0),
            reference.pack_weight(weight, granularity, 0),
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (34, 65), (5, 2560), (301, 7)])
def test_sums_of_rows_make_the_scale_of_more_rows(
    isa: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = torch.randn(2 * shape[0], shape[1]).to(dtype)
    parts = weight.t().contiguous().t().chunk(2)
    sums = torch.cat([row_sums(part) for part in parts])
    assert torch.equal(sums, reference.row_sums(weight))
    exact = weight.double().abs().sum(1)
    torch.testing.assert_close(sums, exact, rtol=2.0**-45, atol=0)
    scale = mean_scale(total(sums), weight.numel())
    assert torch.equal(scale, native_kernels().pack_weight(weight, "per_tensor", 0)[1])


@pytest.mark.parametrize("rows", [1, 2, 255, 256, 257, 900])
def test_rows_are_added_in_256_lanes_and_these_in_pairs(rows: int) -> None:
    sums = torch.rand(rows, dtype=torch.float64)
    lanes = [0.0] * 256
    for row, value in enumerate(sums.tolist()):
        lanes[row % 256] += value
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [low + high for low, high in zip(lanes[:half], lanes[half:], strict=True)]
    assert total(sums).tolist() == lanes


def test_sums_of_rows_on_a_gpu(host: HostKernels) -> None:
    weight = torch.randn(37, 192)
    assert torch.equal(host.row_sums(weight), reference.row_sums(weight))


def test_sums_of_rows_are_checked() -> None:
    negated = torch._neg_view(torch.randn(3, 64))
    assert torch.equal(row_sums(negated), reference.row_sums(negated.clone()))
    with pytest.raises(ArgumentError, match="row_sums: weight must be"):
        row_sums(torch.zeros(4))
    with pytest.raises(ArgumentTypeError, match="row_sums: weight must be"):
        row_sums(torch.zeros(4, 4, dtype=torch.int8))


def odd_groups(dtype: torch.dtype) -> Tensor:
    """Rows of 9 groups of 64 whose scales go wrong easily."""
    largest = torch.finfo(dtype).max
    sizes = [
        # Multipliers that are ties, that would be 0, that are all the same, or that nearly are.
        [127.0, 63.5, 0.5, 1.5, 2.5, 126.5, 1.0, 0.4999, 0.0],
        [1.0, 1e-3, 1e-4, 1e-5, 0.0, 0.0, 0.003937, 0.003936, 0.011811],
        [0.0] * 9,
        [0.04] * 9,
        [0.04, 0.0400001, 0.0399999, 0.03, 0.0301, 0.0299, 0.02, 0.01, 1e-5],
        [largest] * 9,
        [largest, largest / 2, 1.0, 0.0, largest / 127, largest / 254, 1e-5, 1.0, 1.0],
        [1e-5, 2e-5, 3e-5, 1e-6, 1e-7, 0.0, 1e-5, 1e-5, 4e-5],
    ]
    weight = torch.tensor(sizes, dtype=torch.float64).clamp(max=largest).repeat_interleave(64, 1)
    weight[:, 1::2] *= -1
    # Codes at the border: half of the step, and what lies beside it.
    weight[:, 2::64] *= 0.5
    weight[:, 3::64] *= 0.5 * (1 + 2.0**-23)
    weight[:, 4::64] *= 0.5 * (1 - 2.0**-23)
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_groups(isa: str, dtype: torch.dtype) -> None:
    weight = odd_groups(dtype)
    assert_same(
        native_kernels().pack_weight(weight, "per_group", 64),
        reference.pack_weight(weight, "per_group", 64),
    )
    for value in (NAN, math.inf, -math.inf):
        weight[::3, 70] = value
        assert_same(
            native_kernels().pack_weight(weight, "per_group", 64),
            reference.pack_weight(weight, "per_group", 64),
        )


def test_two_levels_are_the_formulas() -> None:
    """Of float32 operands float64 gives the quotient that float32 rounds to."""
    scale = torch.rand(50, 40) ** 4 + 1e-5
    scale[3], scale[7, 2] = 0.25, NAN
    row, multiplier = quantize.two_levels(scale)
    exact_row = (scale.double().amax(1) / 127).float()
    assert torch.equal(row.nan_to_num(-1), exact_row.nan_to_num(-1))
    assert row.isnan().nonzero().flatten().tolist() == [7]
    assert multiplier.dtype == torch.uint8
    kept = torch.arange(50) != 7
    ratio = (scale[kept].double() / exact_row[kept].double().unsqueeze(1)).float()
    assert torch.equal(multiplier[kept], ratio.round().clamp(1, 127).to(torch.uint8))
    assert multiplier[7].eq(1).all()
    assert multiplier[kept].amax(1).eq(127).all()
    step = quantize.group_scale(row, multiplier)
    exact = (multiplier.double() * row.double().unsqueeze(1)).float()
    assert torch.equal(step.nan_to_num(-1), exact.nan_to_num(-1))
    off = (step - scale)[kept].abs() / row[kept].unsqueeze(1)
    assert bool((off <= 0.5 + 1e-4)[multiplier[kept] > 1].all())
    assert bool((off <= 1).all())


def test_values_of_two_levels() -> None:
    codes = torch.randint(-1, 2, (9, 256), dtype=torch.int8)
    multiplier = torch.randint(0, 128, (9, 4), dtype=torch.uint8)
    row = torch.rand(9) + 0.1
    whole = quantize.multiplied(codes, multiplier)
    expected = torch.stack(
        [codes[:, k].double() * multiplier[:, k // 64].double() for k in range(256)], 1
    )
    assert whole.dtype == torch.int16
    assert torch.equal(whole.double(), expected)
    for dtype in (*DTYPES, torch.float64):
        # One product, rounded to float32, then to the dtype.
        exact = (expected * row.double().unsqueeze(1)).float().to(dtype)
        assert torch.equal(quantize.dequantize(codes, row, dtype, multiplier), exact)


def assert_same(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> None:
    """The same bits, NaN where NaN is; None where None is."""
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_activations_against_float64() -> None:
    x = torch.randn(33, 512)
    codes, scale = quantize.quantize_activation(x, per_tensor=False)
    most = x.abs().amax(-1, keepdim=True)
    assert torch.equal(scale, most / 127)
    error = (codes.double() * scale.double() - x.double()).abs()
    # Half a step, and the rounding of x * a to float32 (2^-24 of at most 127).
    assert bool((error <= scale.double() * (0.5 + 127 * 2**-23)).all())
    assert codes.abs().amax(-1).eq(127).all()


def test_activation_codes_equal_autobitlinears() -> None:
    """transformers computes ``127 / m`` as a reciprocal and a product; codes differ only at exact
    ties."""
    x = torch.randn(64, 256)
    codes, _ = quantize.quantize_activation(x, per_tensor=False)
    scale = 127 / x.abs().max(dim=-1, keepdim=True).values.clamp_(min=1e-5)
    theirs = (x * scale).round().clamp(-128, 127)
    assert torch.equal(codes.float(), theirs)


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (7, 64), (16, 65), (2, 5, 100)])
def test_activations_equal_the_reference(
    isa: str, num_threads: int, shape: tuple[int, ...], dtype: torch.dtype, per_tensor: bool
) -> None:
    x = (torch.randn(shape) * torch.logspace(-6, 3, shape[-1])).to(dtype)
    x[0] = 0
    ours = native_kernels().quantize_activation(x, per_tensor)
    expected = reference.quantize_activation(x, per_tensor)
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_activation_spoils_its_token_only(isa: str, value: float) -> None:
    x = torch.randn(5, 70)
    x[2, 69] = value
    for quantizer in (native_kernels().quantize_activation, reference.quantize_activation):
        codes, scale = quantizer(x, False)
        assert scale.isnan().flatten().tolist() == [False, False, True, False, False]
        assert codes[2].eq(0).all()
        _, scale = quantizer(x, True)
        assert scale.isnan().all()


def test_lanes_that_go_on_from_those_of_other_columns() -> None:
    """As processes that have some columns each add them up: the bits of the whole row."""
    weight = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    lanes = None
    for columns in weight.split(32, dim=1):
        lanes = lane_sums(columns, lanes)
    assert lanes is not None
    assert torch.equal(lanes, lane_sums(weight))
    sums = reduce(add, lanes.unbind(1))
    assert torch.equal(mean_scale(sums, 96), weight_scale(weight, "per_channel"))
    assert torch.equal(mean_scale(total(sums), 5 * 96), weight_scale(weight, "per_tensor"))


def test_two_levels_of_a_part_of_the_groups() -> None:
    scale = torch.rand(7, 6, generator=torch.Generator().manual_seed(0)) + 0.01
    row, multiplier = two_levels(scale)
    for first in (0, 3):
        part = two_levels(scale[:, first : first + 3], scale.amax(1))
        assert torch.equal(part[0], row)
        assert torch.equal(part[1], multiplier[:, first : first + 3])
