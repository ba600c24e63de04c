from __future__ import annotations

import pytest
import torch

from bitcore import quantize, reference
from tests.conftest import native_kernels

GRANULARITIES = [("per_tensor", 0), ("per_channel", 0), ("per_group", 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_weight_scale_against_float64() -> None:
    weight = torch.randn(37, 192, dtype=torch.float64).float()
    exact = weight.double().abs()
    for granularity, expected in (
        ("per_tensor", exact.mean().view(1)),
        ("per_channel", exact.mean(1)),
        ("per_group", exact.view(37, 3, 64).mean(2)),
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
        _, scale = pack(weight, granularity, group)
        expected = torch.zeros_like(scale, dtype=torch.bool)
        expected[{"per_tensor": 0, "per_channel": 3, "per_group": (3, 1)}[granularity]] = True
        assert torch.equal(scale.isnan(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("granularity", "group"), GRANULARITIES)
@pytest.mark.parametrize("shape", [(1, 64), (5, 64), (64, 192), (65, 128), (130, 2560), (33, 6912)])
def test_pack_weight_equals_the_reference(
    isa: str,
    num_threads: int,
    shape: tuple[int, int],
    granularity: str,
    group: int,
    dtype: torch.dtype,
) -> None:
    weight = (torch.randn(shape) * 0.04).to(dtype)
    qweight, scale = native_kernels().pack_weight(weight, granularity, group)
    expected_qweight, expected_scale = reference.pack_weight(weight, granularity, group)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(qweight, expected_qweight)


@pytest.mark.parametrize("in_features", [1, 15, 17, 63, 65])
def test_pack_weight_at_odd_widths(isa: str, in_features: int) -> None:
    weight = torch.randn(7, in_features)
    for granularity in ("per_tensor", "per_channel"):
        packed = native_kernels().pack_weight(weight, granularity, 0)
        expected = reference.pack_weight(weight, granularity, 0)
        assert all(torch.equal(a, b) for a, b in zip(packed, expected, strict=True))


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
