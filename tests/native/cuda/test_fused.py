"""Few tokens in one launch of clusters, on the emulator against the reference, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bitcore import pack_ternary, reference
from tests.native.cuda.host import CONFLICTS, LAUNCHES, MMA, HostKernels
from tests.native.cuda.test_groups import Weight, expected_linear
from tests.native.cuda.test_kernels import make, random_codes

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def hopper(host: HostKernels) -> Iterator[HostKernels]:
    """The kernels on a device that has clusters."""
    host.set_hopper(True)
    yield host
    host.set_hopper(False)


def launches(hopper: HostKernels, *args: object) -> int:
    """Launches of a layer, whose result must have the reference's bits."""
    before = hopper.count(LAUNCHES)
    y, expected = hopper.linear(*args), reference.linear(*args)
    assert torch.equal(y, expected)
    return hopper.count(LAUNCHES) - before


# Fewer blocks of 64 columns than a cluster has of its own, as many, more, and cut ones; rows cut,
# one tile, and so many that a cluster takes several, one after another: of teams of 8, 4, 2, 1.
@pytest.mark.parametrize("M", [2, 3, 8, 16])
@pytest.mark.parametrize(
    ("N", "K", "multiprocessors"),
    [(1, 16, 4), (67, 512, 4), (70, 1168, 132), (300, 3088, 16), (190, 4112, 8), (1030, 272, 16)],
)
def test_linear_equals_the_reference(
    hopper: HostKernels,
    M: int,  # noqa: N803
    N: int,  # noqa: N803
    K: int,  # noqa: N803
    multiprocessors: int,
) -> None:
    hopper.multiprocessors = multiprocessors
    dtype, other = HALVES[:: 1 if M % 2 else -1]
    granularity = "per_tensor" if M in (3, 8) else "per_channel"
    activation = "int8_per_tensor" if M in (3, 16) else "int8_per_token"
    x, qweight, scale = make((M, N, K), granularity, dtype)
    bias = None if M == 8 else torch.randn(N).to(other)
    args = (x, qweight, scale, bias, N, activation, torch.float32 if M < 9 else other)
    assert launches(hopper, *args) == 1
    assert hopper.count(MMA) > 0
    assert hopper.count(CONFLICTS) == 0


@pytest.mark.parametrize(
    ("M", "N", "K", "group", "multiprocessors"),
    [
        (2, 9, 256, 64, 4),
        (3, 70, 1536, 128, 132),
        (9, 300, 2304, 64, 16),
        (16, 67, 4096, 128, 132),
        (33, 70, 1024, 64, 132),
    ],
)
def test_groups_with_multipliers(
    hopper: HostKernels,
    M: int,  # noqa: N803
    N: int,  # noqa: N803
    K: int,  # noqa: N803
    group: int,
    multiprocessors: int,
) -> None:
    hopper.multiprocessors = multiprocessors
    weight = Weight(N, K, group)
    x, bias = torch.randn(M, K).to(HALVES[M % 2]), torch.randn(N)
    args = (x, *weight.packed, bias, N, "int8_per_token", torch.float32, weight.multiplier)
    assert launches(hopper, *args) == 1
    assert hopper.count(CONFLICTS) == 0
    assert torch.equal(hopper.linear(*args), expected_linear(x, weight, bias, "int8_per_token"))


def test_every_order_of_threads_gives_the_same(hopper: HostKernels) -> None:
    """Blocks run ahead of each other as far as the messages between them allow."""
    hopper.multiprocessors = 8
    x, qweight, scale = make((5, 700, 528), "per_channel", torch.bfloat16)
    for seed in range(3):
        hopper._library.bk_emulator_order(seed)
        args = (x, qweight, scale, None, 700, "int8_per_token", torch.float32)
        assert launches(hopper, *args) == 1


@pytest.mark.parametrize(("M", "N", "K"), [(17, 70, 528), (40, 150, 272)])
def test_more_tokens_are_tiles_of_sixteen(hopper: HostKernels, M: int, N: int, K: int) -> None:  # noqa: N803
    hopper.multiprocessors = 132
    x, qweight, scale = make((M, N, K), "per_channel", torch.bfloat16)
    args = (x, qweight, scale, torch.randn(N), N)
    assert launches(hopper, *args, "int8_per_token", torch.float32) == 1
    # All tokens' largest value is not known to any one cluster.
    assert launches(hopper, *args, "int8_per_tensor", torch.float32) > 1


def test_the_longest_k_and_its_largest_sums(hopper: HostKernels) -> None:
    """What shared memory holds, and one block of 64 columns a cluster's block more."""
    for in_features, fits in ((87040, True), (87056, False)):
        x = torch.tensor([[1.0], [-1.0]]).bfloat16().expand(2, in_features).contiguous()
        weight = random_codes(5, in_features)
        weight[0], weight[4] = 1, -1
        args = (x, pack_ternary(weight), torch.ones(1), None, 5, "int8_per_token", torch.float32)
        assert (launches(hopper, *args) == 1) == fits


def test_special_values_pass_through(hopper: HostKernels) -> None:
    x, qweight, _ = make((12, 64, 640), "per_channel", torch.bfloat16)
    scale = torch.logspace(-30, 30, 64)
    x[1], x[2, 3], x[3, 639], x[11, 100] = 0.0, float("nan"), float("inf"), -float("inf")
    for out_dtype in (torch.float32, torch.bfloat16, torch.float16):
        args = (x, qweight, scale, None, 64, "int8_per_token", out_dtype)
        y, expected = hopper.linear(*args), reference.linear(*args)
        assert torch.equal(y.isnan(), expected.isnan())
        assert y[[2, 3, 11]].isnan().all()
        assert torch.equal(y.nan_to_num(), expected.nan_to_num())


def moved(tensor: Tensor, offset: int) -> Tensor:
    """The same at an address that is so many bytes past a multiple of 16."""
    room = torch.zeros(tensor.nbytes + 32, dtype=torch.uint8)
    start = -room.data_ptr() % 16 + offset
    return room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def test_what_goes_another_way(hopper: HostKernels) -> None:
    """Rows that are not aligned to 16 bytes, float32, other groups, kept codes, a device without
    clusters: in several launches, as right.
    """
    x, qweight, scale = make((3, 70, 192), "per_channel", torch.bfloat16)
    rest = (None, 70, "int8_per_token", torch.float32)
    assert launches(hopper, x, qweight, scale, *rest) == 1
    # Rows of a wider tensor are as good as any.
    wide = torch.randn(3, 200).bfloat16()
    assert launches(hopper, wide[:, 8:], qweight, scale, *rest) == 1
    assert launches(hopper, wide[:, 7:199], qweight, scale, *rest) > 1
    assert launches(hopper, moved(x, 2), qweight, scale, *rest) > 1
    assert launches(hopper, x, moved(qweight, 8), scale, *rest) > 1
    assert launches(hopper, x.float(), qweight, scale, *rest) > 1
    odd, qodd, odd_scale = make((3, 70, 104), "per_channel", torch.bfloat16)
    assert launches(hopper, odd, qodd, odd_scale, *rest) > 1
    grouped = make((3, 70, 256), "per_group_float32", torch.bfloat16)
    assert launches(hopper, *grouped, *rest) > 1
    # Five groups a row: those of every other row begin where no four bytes do.
    five = Weight(70, 320, 64)
    args = (torch.randn(3, 320).bfloat16(), *five.packed, *rest, five.multiplier)
    assert launches(hopper, *args) > 1
    before = hopper.count(LAUNCHES)
    ours, expected = (k.linear_with_codes(x, qweight, scale, *rest) for k in (hopper, reference))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert hopper.count(LAUNCHES) > before + 1
    hopper.set_hopper(False)
    assert launches(hopper, x, qweight, scale, *rest) > 1
