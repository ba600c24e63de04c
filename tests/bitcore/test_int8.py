"""int8 rows: quantization, the linear op past the dispatcher, its gradient against float64."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from bitcore import ops, quantize
from bitcore.errors import ArgumentError, ArgumentTypeError

OPS = torch.ops.bitlab
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rows(
    out_features: int = 37, in_features: int = 130, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize.quantize_rows_int8(torch.randn(out_features, in_features).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [1, 7 * 130, 2**20])
def test_the_formula(dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "_BLOCK_ELEMENTS", block)
    weight = (torch.randn(37, 130) * torch.logspace(-4, 4, 37)[:, None]).to(dtype)
    codes, scale = quantize.quantize_rows_int8(weight)
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.float32)
    exact = weight.double()
    most = exact.abs().amax(1)
    torch.testing.assert_close(scale.double(), most / 127, rtol=2.0**-23, atol=0)
    # The largest of each row has code 127 or -127, and nothing is off by more than half a step.
    assert torch.equal(codes.abs().amax(1), torch.full((37,), 127, dtype=torch.int8))
    error = (codes.double() * scale.double()[:, None] - exact).abs()
    assert bool((error <= scale.double()[:, None] * (0.5 + 1e-5)).all())
    for name, wrong in (("times two", codes * 2), ("a row negated", -codes)):
        error = (wrong.double() * scale.double()[:, None] - exact).abs()
        assert not bool((error <= scale.double()[:, None] * (0.5 + 1e-5)).all()), name


def test_ties_round_to_even() -> None:
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    codes, scale = quantize.quantize_rows_int8(weight)
    assert scale.item() == 1.0
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2]]


def test_rows_of_zeros_and_of_the_smallest_and_largest_numbers() -> None:
    weight = torch.tensor([0.0, 1e-45, 1e-38, 3e38])[:, None] * torch.tensor([[1.0, -1.0, 0.5]])
    codes, scale = quantize.quantize_rows_int8(weight)
    assert bool((torch.isfinite(scale) & (scale > 0)).all())
    assert codes.tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 0], [127, -127, 64]]


def test_nan_and_infinity_stay_in_their_row() -> None:
    weight = torch.randn(5, 64)
    weight[1, 3], weight[3, 63] = float("nan"), float("-inf")
    codes, scale = quantize.quantize_rows_int8(weight)
    assert scale.isnan().tolist() == [False, True, False, True, False]
    assert not codes[[1, 3]].any()
    clean, clean_scale = quantize.quantize_rows_int8(weight[[0, 2, 4]])
    assert torch.equal(codes[[0, 2, 4]], clean)
    assert torch.equal(scale[[0, 2, 4]], clean_scale)


def test_what_cannot_be_quantized() -> None:
    with pytest.raises(ArgumentTypeError, match="quantize_rows_int8: weight must be float32"):
        quantize.quantize_rows_int8(torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(ArgumentError, match=r"must be \[N, K\]"):
        quantize.quantize_rows_int8(torch.zeros(3))


def test_quantizing_again_changes_no_code() -> None:
    codes, scale = rows()
    again, _ = quantize.quantize_rows_int8(
        quantize.dequantize_rows_int8(codes, scale, torch.float32)
    )
    assert torch.equal(again, codes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_rounds_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "_BLOCK_ELEMENTS", 1000)
    codes, scale = rows()
    exact = codes.float() * scale[:, None]
    assert torch.equal(quantize.dequantize_rows_int8(codes, scale, dtype), exact.to(dtype))


@pytest.mark.slow
def test_the_peak_is_the_result_and_a_few_blocks() -> None:
    code = """
import torch
from bitcore.quantize import quantize_rows_int8
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
weight = torch.zeros(20000, 4096, dtype=torch.bfloat16).fill_(1)
quantize_rows_int8(weight[:300])
before = peak()
quantize_rows_int8(weight)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    result = 20000 * 4096 // 1024
    # The matrix in float32 would be four times the result.
    assert result <= int(done.stdout) <= result + 24 * 1024


@pytest.mark.parametrize("dtype", DTYPES)
def test_past_the_dispatcher_and_through_it(backend: str, dtype: torch.dtype) -> None:
    codes, scale = rows()
    for bias in (None, torch.randn(37)):
        for shape in ((130,), (1, 130), (2, 3, 130), (0, 130)):
            x = torch.randn(shape).to(dtype)
            direct = ops.linear_int8(x, codes, scale, bias)
            assert torch.equal(direct, OPS.linear_int8(x, codes, scale, bias, dtype))
            assert direct.shape == (*shape[:-1], 37)
            assert direct.dtype == dtype


def test_output_dtype_under_autocast() -> None:
    codes, scale = rows()
    x = torch.randn(3, 130)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.linear_int8(x, codes, scale, None)
    assert torch.equal(y, ops.linear_int8(x, codes, scale, None).bfloat16())


def test_errors_are_the_same_on_both_ways() -> None:
    codes, scale = rows()
    for x, other, scales, error in (
        (torch.randn(3, 129), codes, scale, ArgumentError),
        (torch.randn(3, 130).double(), codes, scale, ArgumentTypeError),
        (torch.randn(3, 130), codes.int(), scale, ArgumentTypeError),
        (torch.randn(3, 130), codes, scale[:1], ArgumentError),
    ):
        with pytest.raises(error, match="bitlab::linear_int8"):
            ops.linear_int8(x, other, scales, None)
        with pytest.raises(error, match="bitlab::linear_int8"):
            ops.linear_int8(x.requires_grad_(), other, scales, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [1, 1000, 2**20])
def test_the_gradient_against_float64(
    backend: str, dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "_BLOCK_ELEMENTS", block)
    codes, scale = rows(301)
    x = torch.randn(2, 3, 130).to(dtype).requires_grad_()
    dy = torch.randn(2, 3, 301).to(dtype)
    bias = torch.randn(301, requires_grad=True)
    ops.linear_int8(x, codes, scale, bias).backward(dy)
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad.double(), dy.double().sum((0, 1)), rtol=1e-5, atol=1e-5)
    weight = codes.double() * scale.double()[:, None]
    exact = dy.double() @ weight
    assert x.grad is not None
    assert x.grad.dtype == dtype
    rounding = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    bound = (dy.double().abs() @ weight.abs()) * 305 * 2.0**-24 + exact.abs() * rounding
    if dtype == torch.float16:
        bound += 2.0**-25  # half of its smallest step
    assert bool(((x.grad.double() - exact).abs() <= bound).all())
    for wrong in (x.grad * 2, x.grad.flip(-1)):
        assert not bool(((wrong.double() - exact).abs() <= bound).all())


def test_opcheck() -> None:
    codes, scale = rows()
    x = torch.randn(2, 3, 130, requires_grad=True)
    for bias in (None, torch.randn(37)):
        torch.library.opcheck(OPS.linear_int8.default, (x, codes, scale, bias, torch.float32))
    dy = torch.randn(2, 3, 37)
    torch.library.opcheck(OPS.input_gradient_int8.default, (dy, codes, scale, torch.bfloat16))
