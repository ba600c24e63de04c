"""Gradients of learned scales on the emulator: the bits of the CPU."""

from __future__ import annotations

import pytest
import torch

from bitcore import reference
from bitcore.errors import ArgumentError
from tests.bitcore.learned import make_learned, step_gradient_in_lanes
from tests.conftest import native_kernels
from tests.native.cuda.host import LAUNCHES, HostKernels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# N, K and the columns of groups: within and past a chain, a lane's loads, a block's parts.
SHAPES = [(1, 1, 1), (5, 31, 1), (2, 513, 3), (9, 128, 2), (65, 203, 7), (300, 36, 2), (3, 1030, 1)]
GRANULARITIES = ["per_tensor", "per_channel", "per_group"]
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dw_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_are_those_of_the_cpu(
    host: HostKernels, dtype: torch.dtype, dw_dtype: torch.dtype, granularity: str
) -> None:
    for shape in SHAPES:
        call = make_learned(shape, granularity, dw_dtype, dtype)
        before = host.count(LAUNCHES)
        gradient, step_gradient = host.learned_gradients(*call)
        assert host.count(LAUNCHES) == before + (2 if call[2].shape == (1,) else 1)
        assert torch.equal(gradient, reference.learned_gradients(*call)[0])
        assert torch.equal(step_gradient, step_gradient_in_lanes(*call))
        for ours, expected in zip(
            (gradient, step_gradient), native_kernels().learned_gradients(*call), strict=True
        ):
            assert ours.dtype == expected.dtype
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_are_none(host: HostKernels, dtype: torch.dtype) -> None:
    dw, weight, step = make_learned((4, 140, 2), "per_group", dtype, dtype)
    weight[0, 3], weight[1, 20], weight[2, 0] = NAN, INF, 0.0
    weight[3, 69], dw[3, 139], dw[3, 17] = -INF, NAN, INF
    step[2, 0], step[1, 1], step[2, 1] = 0.0, -step[1, 1], NAN
    ours = host.learned_gradients(dw, weight, step)
    expected = native_kernels().learned_gradients(dw, weight, step)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_a_step_of_the_tensor_needs_room_for_the_rows(host: HostKernels) -> None:
    dw, weight, step = make_learned((9, 128, 2), "per_tensor", torch.float32, torch.float32)
    outputs = torch.empty_like(weight), torch.empty_like(step)
    with pytest.raises(ArgumentError, match="row_sums must be given for a step per tensor, got"):
        host._call(
            "op", "learned_gradients", outputs, dw, 0, weight, 0, step, 1, 0, *outputs, None, 9, 128
        )
