"""The gradients of a weight and of its learned scale: the reference against the formulas, the
native kernels against it.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from bitcore import reference
from bitcore.errors import ArgumentError, ArgumentTypeError, DerivativeError
from bitcore.kernels.native import TYPE_CODES
from tests.bitcore.layouts import STRIDED, lay_out
from tests.bitcore.learned import Call, make_learned, step_gradient_in_lanes
from tests.bitcore.opcheck import opcheck
from tests.conftest import native_kernels

OP = torch.ops.bitlab.learned_gradients
DTYPES = list(TYPE_CODES)
# N, K and the columns of groups: within and past a vector, a part of a row and its end.
SHAPES = [(1, 1, 1), (5, 31, 1), (2, 513, 3), (9, 128, 2), (65, 203, 7), (3, 1030, 1), (70, 576, 9)]
GRANULARITIES = ["per_tensor", "per_channel", "per_group"]
NAN, INF = float("nan"), float("inf")


@cache
def cases(granularity: str) -> list[tuple[Call, tuple[Tensor, Tensor]]]:
    """Calls of every shape and pair of dtypes, and what the reference makes of them."""
    given = []
    for shape in SHAPES:
        for dw_dtype in DTYPES:
            for dtype in DTYPES:
                call = make_learned(shape, granularity, dw_dtype, dtype)
                given.append((call, reference.learned_gradients(*call)))
    return given


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_reference_is_the_formulas(granularity: str) -> None:
    for (dw, weight, step), (gradient, step_gradient) in cases(granularity):
        v = weight.double().reshape(step.numel(), -1) / step.double().view(-1, 1)
        g = dw.double().view(v.shape)
        inside, q = v.abs() < 1.5, v.round().clamp(-1, 1)
        kept = torch.where(inside, g, 0.0).view(weight.shape)
        assert gradient.dtype == weight.dtype
        assert torch.equal(gradient, kept.to(weight.dtype))
        terms = g * torch.where(inside, q - v, q)
        expected = terms.sum(1) / v.shape[1] ** 0.5
        bound = (terms.abs().sum(1) / v.shape[1] ** 0.5 + 1e-30) * 2.0**-20
        assert step_gradient.shape == step.shape
        assert step_gradient.dtype == torch.float32
        assert bool(((step_gradient.flatten() - expected).abs() <= bound).all())
        # The comparison bites.
        if terms.abs().sum() > 0:
            wrong = 2 * step_gradient.flatten()
            assert not bool(((wrong - expected).abs() <= bound).all())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_isa_gives_the_bits_of_the_reference(
    isa: str, num_threads: int, granularity: str
) -> None:
    """Of the weight's gradient; the sums of the step's are in an order of their own."""
    for call, (gradient, step_gradient) in cases(granularity):
        ours, ours_of_step = native_kernels().learned_gradients(*call)
        assert ours.dtype == gradient.dtype
        assert torch.equal(ours, gradient)
        assert torch.equal(ours_of_step, step_gradient_in_lanes(*call))
        torch.testing.assert_close(ours_of_step, step_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_results_do_not_depend_on_threads(isa: str, granularity: str) -> None:
    call = make_learned((515, 1152, 18), granularity, torch.bfloat16, torch.float32)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(native_kernels().learned_gradients(*call))
    for gradient, step_gradient in results:
        assert torch.equal(gradient, results[0][0])
        assert torch.equal(step_gradient, results[0][1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_are_none(isa: str, dtype: torch.dtype) -> None:
    """NaN, infinity and steps that nobody should have, at every place of a vector."""
    for place in range(0, 70, 3):
        dw, weight, step = make_learned((4, 140, 2), "per_group", dtype, dtype)
        weight[0, place], weight[1, place], weight[2, place] = NAN, INF, 0.0
        weight[3, place], dw[3, place + 70], dw[3, place] = -INF, NAN, INF
        step[2, 0], step[1, 1], step[2, 1] = 0.0, -step[1, 1], NAN
        gradient, step_gradient = native_kernels().learned_gradients(dw, weight, step)
        expected, expected_of_step = reference.learned_gradients(dw, weight, step)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(
            step_gradient, expected_of_step, rtol=1e-4, atol=1e-5, equal_nan=True
        )
        # A weight that is NaN gets nothing, and its step gets NaN; one of infinity is clipped.
        assert gradient[0, place] == 0
        assert gradient[1, place] == 0
        wrong = [[True, False], [False, False], [True, True], [False, True]]
        assert torch.equal(step_gradient.isnan(), torch.tensor(wrong))
        assert step_gradient[3, 0].isinf()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_op(backend: str, granularity: str) -> None:
    for dtype in DTYPES:
        args = make_learned((9, 128, 2), granularity, torch.bfloat16, dtype)
        opcheck(OP.default, args, graphs=backend == "cpu")


@pytest.mark.parametrize("layout", STRIDED)
def test_any_layout_is_taken(backend: str, layout: str) -> None:
    for granularity in GRANULARITIES:
        given = make_learned((12, 192, 3), granularity, torch.float32, torch.bfloat16)
        for index in range(3):
            moved = list(given)
            moved[index] = lay_out(given[index], layout)
            expected = OP(*(one.contiguous() for one in moved))
            for ours, theirs in zip(OP(*moved), expected, strict=True):
                assert ours.is_contiguous()
                torch.testing.assert_close(ours, theirs)


def test_nothing_of_a_weight(backend: str) -> None:
    for shape, steps in (((0, 64), (1,)), ((0, 64), (0, 1)), ((3, 0), (3,)), ((3, 0), (3, 2))):
        args = torch.empty(shape), torch.empty(shape, dtype=torch.float16), torch.ones(steps)
        opcheck(OP.default, args, graphs=False)
        gradient, step_gradient = OP(*args)
        assert gradient.shape == shape
        assert gradient.dtype == torch.float16
        assert torch.equal(step_gradient, torch.zeros(steps))


def test_no_gradient_goes_through_it(backend: str) -> None:
    dw, weight, step = make_learned((9, 128, 2), "per_group", torch.float32, torch.float32)
    gradient, _ = OP(dw, weight.requires_grad_(), step)
    with pytest.raises(DerivativeError, match="bitlab::learned_gradients: the output has no"):
        gradient.sum().backward()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_refused(device: str) -> None:
    other = "cpu" if device == "meta" else "meta"
    dw = weight = torch.zeros(9, 128, device=device)
    step = torch.ones(9, device=device)
    calls: list[tuple[Call, type[Exception], str]] = [
        ((dw[:5], weight, step), ArgumentError, r"dw must be \[9, 128\], got \[5, 128\]"),
        ((dw.double(), weight, step), ArgumentTypeError, "dw must be float32, .*float64"),
        ((dw, weight.int(), step), ArgumentTypeError, "weight must be float32, .*int32"),
        ((dw, weight, step.half()), ArgumentTypeError, "step must be torch.float32, got .*16"),
        ((dw, weight, step[:3]), ArgumentError, r"step must be \[1\], \[9\] or .*got \[3\]"),
        ((dw[0], weight[0], step), ArgumentError, r"weight must be \[N, K\], got \[128\]"),
        ((dw, weight, torch.ones(9, device=other)), ArgumentError, f"on {device}, got one on"),
    ]
    for args, error, message in calls:
        with pytest.raises(error, match=f"bitlab::learned_gradients: .*{message}"):
            OP(*args)
    wide = torch.empty(1, 131072, device=device)
    with pytest.raises(ArgumentError, match="in_features must be at most 131071"):
        OP(wide, wide, step[:1])


def test_the_library_refuses_what_it_cannot_take() -> None:
    library = native_kernels()._library
    for arguments, text in (
        ((9, None, 0, None, 9, 0), b"dw_type must be a bk_type"),
        ((0, None, 9, None, 9, 0), b"weight_type must be a bk_type"),
        ((0, None, 0, None, 1, 0), b"row_sums must be given for a per-tensor step"),
        ((0, None, 0, None, 9, 3), b"scale_columns must be 0 or divide K"),
    ):
        assert library.bk_cpu_learned_gradients(None, *arguments, None, None, None, 9, 64, 1) == 1
        assert library.bk_cpu_last_error() == text
