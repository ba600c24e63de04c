"""Groups whose scales are in two levels, on the emulator: integers and float32 bit for bit.

Against integers made here from random codes and multipliers, and against the reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from bitcore import pack_ternary, quantize, reference
from tests.native.cuda.host import CONFLICTS, LAUNCHES, MMA, SHARED_LOADS, WGMMA, HostKernels
from tests.native.cuda.test_kernels import DTYPES, random_codes, sum_bound

GROUPS = [64, 128]
# The largest K that groups divide; past what shared memory holds of one token's codes.
LARGEST = 131008
# One token fused, one and two tiles of few, many tokens of narrow and of wide tiles; N and M odd.
SHAPES = [
    (1, 5, 128), (1, 70, 1408), (2, 67, 384), (9, 70, 640), (16, 33, 2304), (17, 130, 384),
    (66, 129, 384), (41, 515, 640),
]  # fmt: skip


class Weight:
    """Random codes [N, K] and multipliers [N, K / G], some of them 0, with scales [N]."""

    def __init__(self, out_features: int, in_features: int, group: int) -> None:
        self.codes = random_codes(out_features, in_features)
        shape = (out_features, in_features // group)
        self.multiplier = torch.randint(0, 128, shape, dtype=torch.uint8)
        self.multiplier[torch.rand(shape) < 0.2] = 0
        self.multiplier[0, -1] = 127
        self.scale = torch.rand(out_features) + 0.01

    @property
    def packed(self) -> tuple[Tensor, Tensor]:
        return pack_ternary(self.codes), self.scale

    @property
    def integers(self) -> Tensor:
        """Codes times multipliers, int64 [N, K]."""
        width = self.codes.shape[1] // self.multiplier.shape[1]
        return self.codes.long() * self.multiplier.long().repeat_interleave(width, 1)

    @property
    def values(self) -> Tensor:
        return self.integers.double() * self.scale.double().unsqueeze(1)


def expected_linear(x: Tensor, weight: Weight, bias: Tensor | None, activation: str) -> Tensor:
    """The specification: an exact integer, and then as with one scale for each output."""
    codes, x_scale = quantize.quantize_activation(x, activation == "int8_per_tensor")
    # Exact in any order: below 2^31.
    sums = (codes.double() @ weight.integers.double().t()).to(torch.int32)
    y = sums.float() * (x_scale * weight.scale)
    return y if bias is None else y + bias.float()


@pytest.fixture(params=[False, True], ids=["mma", "wgmma"])
def device(host: HostKernels, request: pytest.FixtureRequest) -> Iterator[HostKernels]:
    """The kernels on a device without and with wgmma."""
    host.set_hopper(request.param)
    yield host
    host.set_hopper(False)


@pytest.mark.parametrize("multiprocessors", [1, 4, 132])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_is_exact(
    device: HostKernels, shape: tuple[int, int, int], group: int, multiprocessors: int
) -> None:
    """Sums of integers, whatever the split of K; every dtype of x, bias and output.

    The dtypes take turns: each of x with each of the output, and each of them with each shape and
    each number of multiprocessors.
    """
    device.multiprocessors = multiprocessors
    tokens, out_features, in_features = shape
    weight = Weight(out_features, in_features, group)
    turn = [1, 4, 132].index(multiprocessors)
    index = (turn + GROUPS.index(group) + SHAPES.index(shape)) % 3
    x = torch.randn(tokens, in_features).to(DTYPES[index])
    bias = None if index == 0 else torch.randn(out_features).to(DTYPES[index])
    out_dtype = DTYPES[(index + turn) % 3]
    activation = "int8_per_tensor" if index == 1 else "int8_per_token"
    args = (x, *weight.packed, bias, out_features, activation, out_dtype)
    before = device.count(WGMMA)
    y = device.linear(*args, weight.multiplier)
    assert device.count(CONFLICTS) == 0
    expected = expected_linear(x, weight, bias, activation).to(out_dtype)
    assert torch.equal(y, expected)
    assert torch.equal(y, reference.linear(*args, weight.multiplier))
    if tokens == 1:
        assert device.count(MMA) == 0
    elif tokens > 16:
        assert (device.count(WGMMA) > before) == device.is_hopper
        assert (device.count(MMA) > 0) == (not device.is_hopper)
        assert device.count(SHARED_LOADS) > 0


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("tokens", [1, 3, 9, 33])
def test_the_largest_sums(device: HostKernels, tokens: int, group: int) -> None:
    """127 * 127 for each of K columns: what is added to the codes as bytes wraps around.

    Rows and tokens of either sign: an output of each pair of signs, for one token in two calls.
    """
    in_features = LARGEST if group == 64 else 48384
    weight = Weight(5, in_features, group)
    code = torch.tensor([1, -1, 1, -1, 1])
    weight.codes.copy_(code.view(5, 1).expand(5, in_features))
    weight.multiplier.fill_(127)
    sign = torch.tensor([1, -1]).repeat(tokens)[: max(tokens, 2)].view(-1, tokens, 1)
    for signs in sign:
        x = signs.float().expand(tokens, in_features)
        args = (x, *weight.packed, None, 5, "int8_per_token", torch.float32)
        y = device.linear(*args, weight.multiplier)
        sums = (127 * 127 * in_features * signs * code).to(torch.int32)
        assert torch.equal(y, sums.float() * (torch.full((tokens, 1), 1.0) / 127.0 * weight.scale))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("tokens", [1, 2, 16, 20])
def test_each_group_has_its_own_multiplier(device: HostKernels, tokens: int, group: int) -> None:
    """One group of x at a time is not zero: nothing of a neighbour's multiplier comes in."""
    columns = 9
    weight = Weight(7, columns * group, group)
    weight.codes.fill_(1)
    weight.scale.fill_(1.0)
    weight.multiplier = torch.arange(7 * columns, dtype=torch.uint8).view(7, columns)
    for column in range(columns):
        x = torch.zeros(tokens, columns * group)
        x[:, column * group : (column + 1) * group] = 127.0
        args = (x, *weight.packed, None, 7, "int8_per_token", torch.float32)
        y = device.linear(*args, weight.multiplier)
        expected = weight.multiplier[:, column].float() * (127 * group)
        assert torch.equal(y, expected.expand(tokens, -1))


@pytest.mark.parametrize("tokens", [1, 2, 20, 40])
def test_one_multiplier_is_one_scale(device: HostKernels, tokens: int) -> None:
    """With 1 in every group the layer is that of one scale for each output, bit for bit."""
    weight = Weight(70, 640, 64)
    weight.multiplier.fill_(1)
    args = (torch.randn(tokens, 640), *weight.packed, None, 70, "int8_per_token", torch.float32)
    assert torch.equal(device.linear(*args, weight.multiplier), device.linear(*args))


@pytest.mark.parametrize("tokens", [2, 9, 16, 20, 40])
def test_shares_of_k_add_up(device: HostKernels, tokens: int) -> None:
    device.multiprocessors = 132
    weight = Weight(70, 64 * 43, 64)
    x = torch.randn(tokens, 64 * 43).bfloat16()
    args = (x, *weight.packed, torch.randn(70), 70, "int8_per_token", torch.float32)
    expected = expected_linear(x, weight, args[3], args[5])
    for seed in (0, 1, 2):
        device._library.bk_emulator_order(seed)
        before = device.count(LAUNCHES)
        assert torch.equal(device.linear(*args, weight.multiplier), expected)
        # The multipliers cost no launch more.
        assert device.count(LAUNCHES) == before + 3


@pytest.mark.parametrize(("K", "launches"), [(48384, 1), (48640, 2)])
def test_one_token_is_one_launch(host: HostKernels, K: int, launches: int) -> None:  # noqa: N803
    """While its codes fit in 48 KiB."""
    weight = Weight(6, K, 64)
    x = torch.randn(1, K)
    before = host.count(LAUNCHES)
    args = (x, *weight.packed, None, 6, "int8_per_token", torch.float32)
    y = host.linear(*args, weight.multiplier)
    assert host.count(LAUNCHES) - before >= launches
    assert (host.count(MMA) == 0) == (launches == 1)
    assert torch.equal(y, expected_linear(x, weight, None, "int8_per_token"))


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_multipliers_and_rows_that_begin_anywhere(device: HostKernels, offset: int) -> None:
    for columns in (3, 4, 8):
        weight = Weight(10, 64 * columns, 64)
        qweight, scale = weight.packed
        room = torch.zeros(offset + weight.multiplier.numel(), dtype=torch.uint8)
        moved = room[offset:].view(weight.multiplier.shape).copy_(weight.multiplier)
        rows = torch.zeros(offset + qweight.numel(), dtype=torch.uint8)
        moved_rows = rows[offset:].view(qweight.shape).copy_(qweight)
        wide = torch.randn(40, 64 * columns + 7)
        for tokens in (1, 6, 40):
            x = wide[:tokens, 3 : 3 + 64 * columns]
            expected = expected_linear(x, weight, None, "int8_per_token")
            for packed in (qweight, moved_rows):
                args = (x, packed, scale, None, 10, "int8_per_token", torch.float32)
                assert torch.equal(device.linear(*args, moved), expected)
                spread = weight.multiplier.t().contiguous().t()
                assert torch.equal(device.linear(*args, spread), expected)


@pytest.mark.parametrize("tokens", [1, 3, 20, 40])
def test_codes_are_kept(device: HostKernels, tokens: int) -> None:
    weight = Weight(70, 320, 64)
    x = torch.randn(tokens, 320).bfloat16()
    args = (x, *weight.packed, None, 70, "int8_per_token", torch.float32, weight.multiplier)
    for ours, expected in zip(
        device.linear_with_codes(*args), reference.linear_with_codes(*args), strict=True
    ):
        assert torch.equal(ours, expected)


def test_a_token_that_is_not_finite(device: HostKernels) -> None:
    weight = Weight(9, 128, 64)
    for tokens in (1, 4, 20):
        x = torch.randn(tokens, 128)
        x[tokens // 2, 3] = float("nan")
        args = (x, *weight.packed, None, 9, "int8_per_token", torch.float32, weight.multiplier)
        y, expected = device.linear(*args), reference.linear(*args)
        assert y[tokens // 2].isnan().all()
        assert torch.equal(y.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("multiprocessors", [4, 132])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5, 128), (3, 67, 1664), (17, 130, 384), (66, 33, 1408)])
def test_unquantized_activations(
    host: HostKernels,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    group: int,
    multiprocessors: int,
) -> None:
    host.multiprocessors = multiprocessors
    weight = Weight(shape[1], shape[2], group)
    x, bias = torch.randn(shape[0], shape[2]).to(dtype), torch.randn(shape[1])
    args = (x, *weight.packed, bias, shape[1], "float", torch.float32, weight.multiplier)
    y = host.linear(*args)
    exact = x.double() @ weight.values.t() + bias.double()
    bound = sum_bound(x, weight.values) + bias.double().abs() * 2.0**-23
    assert bool(((y.double() - exact).abs() <= bound).all())
    assert not bool(((2 * y.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_codes_and_multipliers_are_exact(host: HostKernels, dtype: torch.dtype) -> None:
    """Every code times every multiplier, one column of x at a time."""
    weight = Weight(3, 128 * 64, 64)
    weight.codes.copy_(torch.tensor([[-1], [0], [1]]).expand(3, 128 * 64))
    weight.multiplier.copy_(torch.arange(128).expand(3, 128))
    weight.scale.fill_(1.0)
    x = torch.zeros(128, 128 * 64, dtype=dtype)
    x[torch.arange(128), torch.arange(128) * 64 + 5] = 1.0
    for tokens in (slice(0, 16), slice(112, 128), slice(0, 128)):
        args = (x[tokens], *weight.packed, None, 3, "float", torch.float32, weight.multiplier)
        m = torch.arange(128.0)[tokens]
        assert torch.equal(host.linear(*args), torch.stack([-m, 0 * m, m], 1))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5, 128), (3, 67, 384), (66, 70, 640), (5, 9, 256)])
def test_input_gradient(
    host: HostKernels, shape: tuple[int, int, int], dtype: torch.dtype, group: int
) -> None:
    weight = Weight(shape[1], shape[2], group)
    dy = torch.randn(shape[0], shape[1]).to(dtype)
    dx = host.input_gradient(dy, *weight.packed, shape[1], torch.float32, weight.multiplier)
    exact, bound = dy.double() @ weight.values, sum_bound(dy, weight.values.t())
    if dtype == torch.bfloat16:
        # The product of dy and scale is rounded to bfloat16.
        bound = bound + (dy.double().abs() @ weight.values.abs()) * 2.0**-8
    assert bool(((dx.double() - exact).abs() <= bound).all())
    assert not bool(((2 * dx.double() - exact).abs() <= bound).all())


def test_input_gradient_of_k_that_no_two_groups_fill(host: HostKernels) -> None:
    """The last block of columns has one group of 64 and an end."""
    weight = Weight(21, 192, 64)
    dy = torch.eye(21)
    dx = host.input_gradient(dy, *weight.packed, 21, torch.float32, weight.multiplier)
    expected = reference.unpack_weight(*weight.packed, 21, torch.float32, weight.multiplier)
    assert torch.equal(dx, expected)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("shape", [(1, 128), (5, 384), (70, 640)])
def test_unpacking(host: HostKernels, shape: tuple[int, int], group: int) -> None:
    weight = Weight(*shape, group)
    for dtype in (*DTYPES, torch.float64):
        args = (*weight.packed, shape[0], dtype, weight.multiplier)
        assert torch.equal(host.unpack_weight(*args), reference.unpack_weight(*args))


def assert_same(ours: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    """Codes, scales (NaN or the same bits) and multipliers."""
    for found, wanted in zip(ours, expected, strict=True):
        assert found is not None
        assert wanted is not None
        assert torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(found.nan_to_num(), wanted.nan_to_num())


def latent(out_features: int, in_features: int, group: int) -> Tensor:
    """A weight whose groups differ by a thousand and more, so that multipliers are 1 to 127."""
    weight = torch.randn(out_features, in_features)
    sizes = 10 ** (-3.5 * torch.rand(out_features, in_features // group))
    return weight * sizes.repeat_interleave(group, 1)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 128), (5, 384), (70, 640), (6, 9088), (9, 36992)])
def test_packing_gives_the_bits_of_the_reference(
    host: HostKernels, shape: tuple[int, int], dtype: torch.dtype, group: int
) -> None:
    weight = latent(*shape, group).to(dtype)
    weight[0, 3] = 0.0
    before = host.count(LAUNCHES)
    ours = host.pack_weight(weight, "per_group", group)
    assert host.count(LAUNCHES) == before + 1
    assert_same(ours, reference.pack_weight(weight, "per_group", group))


def test_packing_of_special_rows(host: HostKernels) -> None:
    """NaN, infinity, zeros, groups far below the row's largest, ratios halfway to the next."""
    weight = torch.randn(11, 256)
    weight[1, 70], weight[2, 200] = float("nan"), float("inf")
    weight[3] = 0.0
    weight[4, :192] = 1e-30
    weight[5] = 3e38
    weight[6, :64], weight[6, 64:] = 127.0, 2.5
    weight[7, :64], weight[7, 64:] = 127.0, 3.5
    weight[8, :64], weight[8, 64:] = 127.0, 0.25
    weight[9, 64:] = 0.5 * weight[9, :64].abs().mean()
    qweight, scale, multiplier = host.pack_weight(weight, "per_group", 64)
    assert multiplier is not None
    assert_same((qweight, scale, multiplier), reference.pack_weight(weight, "per_group", 64))
    assert scale.isnan().tolist() == [row in (1, 2) for row in range(11)]
    assert multiplier[6:9].tolist() == [[127, 2, 2, 2], [127, 4, 4, 4], [127, 1, 1, 1]]


def test_the_largest_k_is_packed(host: HostKernels) -> None:
    """All scales of a packed row's groups are in shared memory."""
    weight = latent(3, LARGEST, 64).bfloat16()
    assert_same(*(kernels.pack_weight(weight, "per_group", 64) for kernels in (host, reference)))


def test_packing_of_a_weight_that_begins_anywhere(host: HostKernels) -> None:
    room = torch.empty(1 + 5 * 384)
    moved = room[1:].view(5, 384).copy_(latent(5, 384, 128))
    assert moved.data_ptr() % 16
    assert_same(*(kernels.pack_weight(moved, "per_group", 128) for kernels in (host, reference)))


def test_other_groups_have_no_multipliers(host: HostKernels) -> None:
    """Every function that takes multipliers refuses those of groups that are not 64 or 128."""
    room = torch.zeros(4096, dtype=torch.uint8)
    good = room.data_ptr() + -room.data_ptr() % 256
    library = host._library
    before = host.count(LAUNCHES)
    for columns, K in ((0, 256), (1, 256), (8, 256), (1, 192), (4, 128)):  # noqa: N806
        scales, shape = (good, 9, columns, good), (3, 9, K)
        layer = (good, 0, K, good, *scales, None, 0, good, 0)
        calls = {
            "linear_i8_t2": (*layer, *shape, 0, good, 4, None),
            "linear_codes_i8_t2": (*layer, good, good, *shape, 0, good, 4, None),
            "linear_float_t2": (*layer, *shape, good, 4, None),
            "input_gradient": (good, 0, 9, good, *scales, good, 0, *shape, None),
            "unpack_t2": (good, *scales, good, 0, 9, K, None),
            "pack_groups_t2": (good, 0, good, good, good, 9, K, columns, None),
        }
        for name, arguments in calls.items():
            assert getattr(library, f"bk_cuda_{name}")(*arguments) == 1, (name, columns, K)
            text = library.bk_cuda_last_error().decode()
            assert text.startswith(f"bk_cuda_{name}: "), text
            assert "groups" in text, text
    assert library.bk_cuda_pack_groups_t2(good, 0, good, None, good, 9, 256, 4, None) == 1
    assert "multiplier must be given" in library.bk_cuda_last_error().decode()
    assert host.count(LAUNCHES) == before
