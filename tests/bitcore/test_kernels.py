"""The native kernels against the reference: integer sums and float32 outputs bit for bit."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from bitcore import pack_ternary, quantize, reference, unpack_ternary
from tests.conftest import native_kernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRANULARITIES = ["per_tensor", "per_channel", "per_group", "per_group_float32"]
NAN = float("nan")
# Half of the last place of the output, relative.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def random_codes(*shape: int) -> Tensor:
    return torch.randint(-1, 2, shape, dtype=torch.int8)


@pytest.mark.parametrize("M", [0, 1, 2, 3, 4, 5, 7, 16, 33])
@pytest.mark.parametrize("N", [1, 5, 64, 65])
@pytest.mark.parametrize("K", [1, 31, 63, 64, 65, 200])
def test_integer_sums(isa: str, M: int, N: int, K: int) -> None:  # noqa: N803
    codes = torch.randint(-128, 128, (M, K), dtype=torch.int8)
    weight = random_codes(N, K)
    acc = native_kernels().matmul(codes, pack_ternary(weight), N)
    assert acc.dtype == torch.int32
    assert torch.equal(acc, (codes.long() @ weight.long().t()).int())


@pytest.mark.parametrize("K", [6912, 20000, 131071])
@pytest.mark.parametrize("weight_code", [1, -1, 0])
@pytest.mark.parametrize("code", [127, -128])
def test_extreme_codes(isa: str, num_threads: int, K: int, weight_code: int, code: int) -> None:  # noqa: N803
    """All +1 weights with codes 127 overflow the int16 sums of bitnet.cpp's I2_S from K = 6912
    on."""
    codes = torch.full((3, K), code, dtype=torch.int8)
    weight = torch.full((9, K), weight_code, dtype=torch.int8)
    acc = native_kernels().matmul(codes, pack_ternary(weight), 9)
    assert torch.equal(acc, torch.full((3, 9), code * weight_code * K, dtype=torch.int32))
    assert torch.equal(acc, reference.matmul(codes, pack_ternary(weight), 9))


@cache
def real_shape() -> tuple[Tensor, Tensor, Tensor]:
    """Codes, a packed weight, and their exact product."""
    codes = torch.randint(-128, 128, (17, 2560), dtype=torch.int8)
    weight = random_codes(6912, 2560)
    return codes, pack_ternary(weight), (codes.double() @ weight.double().t()).int()


def test_a_real_shape(isa: str, num_threads: int) -> None:
    codes, qweight, exact = real_shape()
    assert torch.equal(native_kernels().matmul(codes, qweight, 6912), exact)


def make_linear(
    shape: tuple[int, int, int],
    granularity: str,
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """An input, a packed weight, its scale and bias; its multipliers, all but the largest drawn."""
    tokens, out_features, in_features = shape
    x = torch.randn(tokens, in_features).to(dtype)
    weight = torch.randn(out_features, in_features)
    qweight, scale, multiplier = reference.pack_weight(weight, granularity, 64)
    if multiplier is not None:
        drawn = torch.randint(0, 128, multiplier.shape, dtype=torch.uint8)
        multiplier = torch.where(torch.rand(multiplier.shape) < 0.7, drawn, multiplier)
    bias = None if bias_dtype is None else torch.randn(out_features).to(bias_dtype)
    return x, qweight, scale, bias, multiplier


@cache
def linear_cases(
    shape: tuple[int, int, int], dtype: torch.dtype, granularity: str, activation: str
) -> list[tuple[tuple[Any, ...], Tensor]]:
    """Arguments of each dtype of bias and output, and what the reference makes of them; the same
    for every ISA and thread count.
    """
    cases = []
    for bias_dtype in (None, torch.float32, torch.bfloat16, torch.float16):
        x, qweight, scale, bias, multiplier = make_linear(shape, granularity, dtype, bias_dtype)
        for out_dtype in DTYPES:
            args = (x, qweight, scale, bias, shape[1], activation, out_dtype, multiplier)
            cases.append((args, reference.linear(*args)))
    return cases


@pytest.mark.parametrize("activation", ["int8_per_token", "int8_per_tensor"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 64), (3, 5, 128), (9, 67, 192), (33, 130, 320)])
def test_linear_equals_the_reference(
    isa: str,
    num_threads: int,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    granularity: str,
    activation: str,
) -> None:
    for args, expected in linear_cases(shape, dtype, granularity, activation):
        assert torch.equal(native_kernels().linear(*args), expected)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_against_float64(backend: str, granularity: str, dtype: torch.dtype) -> None:
    x, qweight, scale, bias, multiplier = make_linear(
        (7, 65, 320), granularity, torch.float32, torch.float32
    )
    assert bias is not None
    codes, x_scale = reference.quantize_activation(x, False)
    weight = reference.unpack_weight(qweight, torch.ones_like(scale), 65, torch.float32).double()
    columns = scale.shape[1] if scale.dim() == 2 else 1
    most = scale.double().max()
    if multiplier is not None:
        weight, most = weight * multiplier.double().repeat_interleave(64, 1), most * 127
    scaled = weight.view(65, columns, -1) * scale.double().view(scale.shape[0], columns, 1)
    terms = codes.double() @ scaled.view(65, -1).t() * x_scale.double()
    exact = terms + bias.double()
    y = torch.ops.bitlab.linear(x, qweight, scale, bias, 65, "int8_per_token", dtype, multiplier)
    # Float32 roundings of the sum, the scales, each group's product and sum, and the bias; one of
    # the output.
    magnitude = (
        terms.abs()
        + bias.double().abs()
        + codes.double().abs().sum(-1, keepdim=True) * (x_scale.double() * most)
    )
    bound = magnitude * (4 + 2 * columns) * 2.0**-24 + exact.abs() * ROUNDING[dtype]
    assert bool(((y.double() - exact).abs() <= bound).all())
    # The comparison bites: a doubled output, a negated row, swapped scales must all fail.
    for wrong in (y * 2, y * torch.where(torch.arange(65) == 11, -1, 1), y / (x_scale * 127)):
        assert not bool(((wrong.double() - exact).abs() <= bound).all())


def test_special_values_pass_through(isa: str) -> None:
    """Overflow, subnormals and NaN in 16-bit outputs round as torch rounds them."""
    qweight, *_ = reference.pack_weight(torch.randn(64, 64), "per_channel", 0)
    scale = torch.logspace(-30, 30, 64)
    x = torch.randn(4, 64)
    x[1, 3] = float("nan")
    for out_dtype in DTYPES:
        args = (x, qweight, scale, None, 64, "int8_per_token", out_dtype)
        y, expected = native_kernels().linear(*args), reference.linear(*args)
        assert torch.equal(y.isnan(), expected.isnan())
        assert y[1].isnan().all()
        assert torch.equal(y.nan_to_num(), expected.nan_to_num())


def test_every_float16_is_read_right(isa: str) -> None:
    bits = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    finite = bits[torch.isfinite(bits)]
    ours = native_kernels().quantize_activation(finite.view(-1, 1), False)
    expected = reference.quantize_activation(finite.view(-1, 1), False)
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])


def test_scales_of_extreme_weights(isa: str) -> None:
    """Subnormals count; sums may pass the type's largest value where their mean does not."""
    for dtype in DTYPES:
        limits = torch.finfo(dtype)
        tiny, most = limits.smallest_normal * limits.eps, limits.max
        for values in ([tiny, 0.0], [most, most], [most, tiny], [1.0, float("inf")], [1.0, -NAN]):
            weight = torch.tensor(values).to(dtype).repeat(5, 70)
            weight[1::2] *= -1
            for granularity in ("per_tensor", "per_channel"):
                _, ours, _ = native_kernels().pack_weight(weight, granularity, 0)
                expected = weight.double().abs().mean(None if len(ours) == 1 else 1).float()
                expected = expected.view(ours.shape).clamp(min=1e-5)
                expected[expected.isinf()] = NAN
                assert torch.equal(ours.nan_to_num(-1.0), expected.nan_to_num(-1.0))
        assert float(torch.tensor(tiny, dtype=dtype)) == tiny


def test_strided_input(isa: str) -> None:
    x = torch.randn(6, 200)
    qweight, scale, _ = reference.pack_weight(torch.randn(10, 64), "per_tensor", 0)
    for view in (x[:, 7:71], x[::2, :64], x.t()[:64].t(), x[:, :128:2]):
        args = (view, qweight, scale, None, 10, "int8_per_token", torch.float32)
        assert torch.equal(native_kernels().linear(*args), reference.linear(*args))


@pytest.mark.parametrize("activation", ["int8_per_token", "float"])
@pytest.mark.parametrize("granularity", ["per_group", "per_group_float32"])
def test_results_do_not_depend_on_threads(isa: str, granularity: str, activation: str) -> None:
    for tokens in (1, 7, 16, 33):
        # Float activations of more tokens are left to torch's own product.
        if activation == "float" and tokens > 16:
            continue
        x, qweight, scale, bias, multiplier = make_linear(
            (tokens, 1030, 576), granularity, torch.float32, torch.float32
        )
        args = (x, qweight, scale, bias, 1030, activation, torch.float32, multiplier)
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(native_kernels().linear(*args))
        assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize("activation", ["int8_per_token", "float"])
@pytest.mark.parametrize("granularity", ["per_group", "per_group_float32"])
@pytest.mark.parametrize("tokens", [1, 4, 9, 16, 40])
def test_every_isa_gives_the_same_bits(granularity: str, activation: str, tokens: int) -> None:
    if activation == "float" and tokens > 16:
        tokens = 13
    x, qweight, scale, bias, multiplier = make_linear(
        (tokens, 67, 1152), granularity, torch.bfloat16, torch.float32
    )
    kernels, results = native_kernels(), []
    for name in kernels.supported_isas:
        with kernels.use_isa(name):
            args = (x, qweight, scale, bias, 67, activation, torch.float32, multiplier)
            results.append(kernels.linear(*args))
    assert all(torch.equal(results[0], other) for other in results)


@cache
def extreme_groups(
    group: int, code: int
) -> tuple[Tensor, Tensor, Tensor, list[tuple[int, Tensor]]]:
    """A packed weight, its multipliers, the sums of its rows; numbers of tokens of ones, and what
    the reference makes of them.
    """
    in_features = 131071 // group * group
    qweight = pack_ternary(torch.full((5, in_features), code, dtype=torch.int8))
    multiplier = torch.full((5, in_features // group), 127, dtype=torch.uint8)
    # Of the row of ones the largest sum; of the others' parts each cancels the last.
    multiplier[1, 1::2] = 0
    sums = code * 127 * group * multiplier.long().sum(1)
    assert 2**30 < int(sums.abs().max()) < 2**31
    args = (qweight, torch.ones(5), None, 5, "int8_per_token", torch.float32, multiplier)
    expected = [
        (tokens, reference.linear(alternating_ones(tokens, in_features), *args))
        for tokens in (1, 3, 26)
    ]
    return qweight, multiplier, sums, expected


def alternating_ones(tokens: int, in_features: int) -> Tensor:
    x = torch.ones(tokens, in_features)
    x[1::2] *= -1
    return x


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("code", [1, -1])
def test_extreme_groups(isa: str, num_threads: int, group: int, code: int) -> None:
    """The largest K that groups divide, every multiplier and every code at its end."""
    qweight, multiplier, sums, of_reference = extreme_groups(group, code)
    for tokens, expected in of_reference:
        x = alternating_ones(tokens, qweight.shape[1])
        args = (x, qweight, torch.ones(5), None, 5, "int8_per_token", torch.float32, multiplier)
        y = native_kernels().linear(*args)
        assert torch.equal(y[0], sums.float() * (torch.ones(()) / 127))
        assert torch.equal(y, expected)


@pytest.mark.parametrize("tokens", [1, 2, 7, 16])
def test_float_sums_of_groups_are_exact(isa: str, num_threads: int, tokens: int) -> None:
    """As of one scale a row: one rounding to float64, one product, and one rounding to float32."""
    _, qweight, scale, _, multiplier = make_linear((1, 9, 6912), "per_group", torch.float32, None)
    assert multiplier is not None
    x = torch.randint(-(2**19), 2**19, (tokens, 6912)).float()
    weight = quantize.multiplied(unpack_ternary(qweight, 9), multiplier).double()
    y = native_kernels().linear(x, qweight, scale, None, 9, "float", torch.float32, multiplier)
    assert torch.equal(y, ((x.double() @ weight.t()) * scale.double()).float())
