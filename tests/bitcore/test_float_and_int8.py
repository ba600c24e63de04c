"""Activations as they are, the input gradient, int8 weights, unpacking: against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bitcore
from bitcore import reference
from tests.conftest import native_kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Half of the last place of the output, relative.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
GRANULARITIES = ["per_tensor", "per_channel", "per_group", "per_group_float32"]


def packed(
    out_features: int, in_features: int, granularity: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Groups are of several sizes, so that multipliers are."""
    sizes = torch.rand(out_features, -(-in_features // 64)).repeat_interleave(64, 1)
    weight = torch.randn(out_features, in_features) * sizes[:, :in_features]
    return reference.pack_weight(weight, granularity, 64)


def exact_weight(
    qweight: Tensor, scale: Tensor, out_features: int, multiplier: Tensor | None = None
) -> Tensor:
    codes = reference.unpack_weight(qweight, torch.ones(1), out_features, torch.float32).double()
    if multiplier is not None:
        codes *= multiplier.double().repeat_interleave(64, 1)
    columns = scale.shape[1] if scale.dim() == 2 else 1
    grouped = codes.view(out_features, columns, -1)
    return (grouped * scale.double().view(scale.shape[0], columns, 1)).view(out_features, -1)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 3, 16, 17, 40])
def test_float_activations(
    isa: str,
    num_threads: int,
    M: int,  # noqa: N803
    dtype: torch.dtype,
    granularity: str,
) -> None:
    qweight, scale, multiplier = packed(67, 320, granularity)
    x, bias = torch.randn(M, 320).to(dtype), torch.randn(67)
    y = native_kernels().linear(x, qweight, scale, bias, 67, "float", dtype, multiplier)
    weight = exact_weight(qweight, scale, 67, multiplier)
    exact = x.double() @ weight.t() + bias.double()
    # Exact sums for few tokens, a float32 dot product for many.
    magnitude = x.double().abs() @ weight.abs().t() + bias.double().abs()
    bound = magnitude * (320 + 4) * 2.0**-24 + exact.abs() * ROUNDING[dtype]
    assert bool(((y.double() - exact).abs() <= bound).all())
    for wrong in (y * 2, y * torch.where(torch.arange(67) == 11, -1, 1)):
        assert not bool(((wrong.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_float_sums_of_few_tokens_are_exact(isa: str, num_threads: int, dtype: torch.dtype) -> None:
    """Values within 2^19 of the largest are not changed: one rounding is all that is left."""
    qweight, *_ = packed(9, 6912, "per_tensor")
    x = (torch.randn(3, 6912) * torch.logspace(-3, 1, 6912)).to(dtype)
    x = torch.where(x.abs() < x.abs().amax() * 2.0**-18, 0, x).bfloat16().to(dtype)
    y = native_kernels().linear(x, qweight, torch.ones(1), None, 9, "float", torch.float32)
    exact = x.double() @ exact_weight(qweight, torch.ones(1), 9).t()
    assert torch.equal(y, exact.float())


def test_float_activations_of_any_size(isa: str) -> None:
    qweight, scale, _ = packed(9, 64, "per_tensor")
    x = torch.randn(8, 64)
    for row, factor in enumerate((1e-42, 1e-38, 1e-30, 1.0, 1e30, 0.0)):
        x[row] *= factor
    x[6, 5], x[7, 5] = float("nan"), float("inf")
    y = native_kernels().linear(x, qweight, scale, None, 9, "float", torch.float32)
    exact = x[:6].double() @ exact_weight(qweight, scale, 9).t()
    bound = exact.abs() * 2.0**-22 + x[:6].double().abs().amax(-1, keepdim=True) * 64 * 2.0**-31
    assert bool(((y[:6].double() - exact).abs() <= bound + 1e-45).all())
    assert y[6:].isnan().all()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_features", [1, 5, 64, 67])
def test_input_gradient(
    backend: str, dtype: torch.dtype, granularity: str, out_features: int
) -> None:
    qweight, scale, multiplier = packed(out_features, 192, granularity)
    dy = torch.randn(2, 7, out_features).to(dtype)
    args = (dy, qweight, scale, out_features, dtype, multiplier)
    dx = torch.ops.bitlab.input_gradient(*args)
    weight = exact_weight(qweight, scale, out_features, multiplier)
    exact = dy.double() @ weight
    magnitude = dy.double().abs() @ weight.abs()
    # The reference multiplies with a weight rounded to dtype.
    bound = magnitude * ((out_features + 4) * 2.0**-24 + 2 * ROUNDING[dtype]) + 1e-30
    assert dx.shape == (2, 7, 192)
    assert bool(((dx.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_features", [1, 5, 64, 67])
def test_unpack(isa: str, dtype: torch.dtype, granularity: str, out_features: int) -> None:
    qweight, scale, multiplier = packed(out_features, 192, granularity)
    args = (qweight, scale, out_features, dtype, multiplier)
    assert torch.equal(native_kernels().unpack_weight(*args), reference.unpack_weight(*args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 64), (9, 67, 200), (33, 130, 321)])
def test_int8_weights(
    isa: str, num_threads: int, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    tokens, out_features, in_features = shape
    weight = torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8)
    scale, x = torch.rand(out_features) + 0.1, torch.randn(tokens, in_features).to(dtype)
    for bias in (None, torch.randn(out_features)):
        ours = torch.ops.bitlab.linear_int8(x, weight, scale, bias, dtype)
        assert torch.equal(ours, reference.linear_int8(x, weight, scale, bias, dtype))


def test_int8_sums_do_not_overflow(isa: str) -> None:
    weight = torch.full((5, 131071), -127, dtype=torch.int8)
    x = torch.ones(2, 131071)
    ours = native_kernels().linear_int8(x, weight, torch.ones(5), None, torch.float32)
    assert torch.equal(ours, reference.linear_int8(x, weight, torch.ones(5), None, torch.float32))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_lies_between_rows_reaches_no_product(backend: str, dtype: torch.dtype) -> None:
    """Rows of odd length, NaN behind each: as the same rows without gaps."""
    qweight, scale, _ = packed(5, 65, "per_channel")
    around = torch.full((33, 96), float("nan"), dtype=dtype)
    around[:, :65] = torch.randn(33, 65).to(dtype)
    dy, x = around[:, :5], around[:, :65]
    with bitcore.use_backend(backend):
        y = torch.ops.bitlab.linear(x, qweight, scale, None, 5, "float", dtype)
        dx = torch.ops.bitlab.input_gradient(dy, qweight, scale, 5, dtype)
        assert torch.equal(
            y, torch.ops.bitlab.linear(x.clone(), qweight, scale, None, 5, "float", dtype)
        )
        assert torch.equal(
            dx, torch.ops.bitlab.input_gradient(dy.clone(), qweight, scale, 5, dtype)
        )
    assert torch.isfinite(y).all()
    assert torch.isfinite(dx).all()
