"""The kernel for many tokens on a GPU that has wgmma, on the emulator against the reference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bitcore import pack_ternary, reference
from tests.native.cuda.host import CONFLICTS, MMA, SHARED_LOADS, WGMMA, HostKernels
from tests.native.cuda.test_kernels import DTYPES, make, random_codes


@pytest.fixture
def hopper(host: HostKernels) -> Iterator[HostKernels]:
    """The kernels on a device that has wgmma."""
    host._library.bk_emulator_hopper(1)
    yield host
    host._library.bk_emulator_hopper(0)


def product(hopper: HostKernels, codes: Tensor, weight: Tensor) -> Tensor:
    """The integer product, which must have gone through wgmma and met no bank conflict."""
    before = hopper.count(WGMMA)
    acc = hopper.matmul(codes, pack_ternary(weight), weight.shape[0])
    assert hopper.count(WGMMA) > before
    assert hopper.count(MMA) == 0
    assert hopper.count(SHARED_LOADS) > 0
    assert hopper.count(CONFLICTS) == 0
    return acc


# Rows and tokens at, below and above the tile; steps of 128 columns cut, whole, fewer and more than
# stages. Warpgroups have rows of their own where N is 258, or 515 with many tokens, else columns.
@pytest.mark.parametrize("multiprocessors", [1, 4])
@pytest.mark.parametrize("M", [33, 64, 65, 130])
@pytest.mark.parametrize(
    ("N", "K"), [(1, 16), (5, 64), (64, 128), (255, 144), (256, 192), (258, 640), (515, 1008)]
)
def test_integer_sums(hopper: HostKernels, M: int, N: int, K: int, multiprocessors: int) -> None:  # noqa: N803
    hopper.multiprocessors = multiprocessors
    codes = torch.randint(-128, 128, (M, K), dtype=torch.int8)
    weight = random_codes(N, K)
    acc = product(hopper, codes, weight)
    assert torch.equal(acc, (codes.long() @ weight.long().t()).int())


def test_extreme_codes(hopper: HostKernels) -> None:
    """The largest sums at the largest K: the emulator reports an int32 that overflows.

    Tokens of either extreme and rows of either sign: an output of each pair.
    """
    code = torch.tensor([127, -128, -128]).repeat(11)
    weight_code = torch.tensor([1, -1, -1]).repeat(3)
    codes = code.to(torch.int8).view(33, 1).repeat(1, 131056)
    weight = weight_code.to(torch.int8).view(9, 1).repeat(1, 131056)
    expected = (131056 * code.view(33, 1) * weight_code).to(torch.int32)
    assert torch.equal(product(hopper, codes, weight), expected)


@pytest.mark.parametrize("K", [6912, 2064])
def test_a_long_k_is_split_and_added(hopper: HostKernels, K: int) -> None:  # noqa: N803
    hopper.multiprocessors = 132
    codes = torch.randint(-128, 128, (40, K), dtype=torch.int8)
    weight = random_codes(70, K)
    for seed in (0, 1, 2):
        hopper._library.bk_emulator_order(seed)
        acc = product(hopper, codes, weight)
        assert torch.equal(acc, (codes.double() @ weight.double().t()).int())


@pytest.mark.parametrize("activation", ["int8_per_token", "int8_per_tensor"])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(33, 130, 192), (66, 128, 144), (70, 518, 128)])
def test_linear_equals_the_reference(
    hopper: HostKernels,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    granularity: str,
    activation: str,
) -> None:
    """Each shape, granularity and activation with each dtype of the output, in turn."""
    x, qweight, scale = make(shape, granularity, dtype)
    per_row, of_tensor = granularity == "per_channel", activation == "int8_per_tensor"
    turn = (DTYPES.index(dtype) + per_row + of_tensor) % 3
    bias = torch.randn(shape[1]).to(DTYPES[turn]) if turn else None
    args = (x, qweight, scale, bias, shape[1], activation, DTYPES[turn])
    before = hopper.count(WGMMA)
    assert torch.equal(hopper.linear(*args), reference.linear(*args))
    assert hopper.count(WGMMA) > before


@pytest.mark.parametrize("K", [8192, 12032])
def test_long_tokens_are_placed(hopper: HostKernels, K: int) -> None:  # noqa: N803
    """Past what quantize_kernel holds in registers."""
    x, qweight, scale = make((33, 9, K), "per_channel", torch.bfloat16)
    args = (x, qweight, scale, torch.randn(9), 9, "int8_per_token", torch.float32)
    assert torch.equal(hopper.linear(*args), reference.linear(*args))


def test_codes_that_are_kept_are_in_order(hopper: HostKernels) -> None:
    x, qweight, scale = make((40, 70, 320), "per_channel", torch.bfloat16)
    args = (x, qweight, scale, None, 70, "int8_per_token", torch.float32)
    before = hopper.count(WGMMA)
    ours, expected = (kernels.linear_with_codes(*args) for kernels in (hopper, reference))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert hopper.count(WGMMA) > before


def test_special_values_pass_through(hopper: HostKernels) -> None:
    x, qweight, _ = make((40, 64, 64), "per_channel", torch.float32)
    scale = torch.logspace(-30, 30, 64)
    x[20, 3], x[0, 1] = float("nan"), float("inf")
    for out_dtype in DTYPES:
        args = (x, qweight, scale, None, 64, "int8_per_token", out_dtype)
        y, expected = hopper.linear(*args), reference.linear(*args)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.nan_to_num(), expected.nan_to_num())


def test_what_goes_another_way(hopper: HostKernels) -> None:
    """Few tokens, groups, rows that are not aligned to 16 bytes: without wgmma, as right."""
    cases = [
        ((16, 70, 64), "per_channel"),
        ((40, 70, 64), "per_group_float32"),
        ((40, 70, 72), "per_tensor"),
    ]
    for shape, granularity in cases:
        x, qweight, scale = make(shape, granularity, torch.bfloat16)
        room = torch.zeros(8 + qweight.numel(), dtype=torch.uint8)
        moved = room[8:].view(qweight.shape).copy_(qweight)
        assert moved.data_ptr() % 16
        for weight in (qweight, moved):
            before = hopper.count(WGMMA)
            args = (x, weight, scale, None, 70, "int8_per_token", torch.float32)
            assert torch.equal(hopper.linear(*args), reference.linear(*args))
            assert hopper.count(WGMMA) == before
    x, qweight, scale = make((40, 70, 64), "per_channel", torch.bfloat16)
    moved = room[8 : 8 + qweight.numel()].view(qweight.shape).copy_(qweight)
    before = hopper.count(WGMMA)
    args = (x, moved, scale, None, 70, "int8_per_token", torch.float32)
    assert torch.equal(hopper.linear(*args), reference.linear(*args))
    assert hopper.count(WGMMA) == before
