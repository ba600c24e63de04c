"""The CUDA kernels on the emulator against the reference: integers and float32 bit for bit.

Where sums are floats, against a float64 product, within the roundings of a float32 sum.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitcore import pack_ternary, reference
from tests.native.cuda.host import CONFLICTS, LAUNCHES, MMA, SHARED_LOADS, HostKernels
from tests.native.cuda.quick_check import ordered_shares, tied_tokens, uneven_weight

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRANULARITIES = ["per_tensor", "per_channel", "per_group_float32"]
# Few tokens of one and of two tiles, many tokens of narrow and of wide tiles; whole and cut tiles.
SHAPES = [(1, 5, 64), (2, 67, 192), (9, 70, 128), (16, 33, 320), (17, 130, 192), (66, 129, 128)]


def random_codes(*shape: int) -> Tensor:
    return torch.randint(-1, 2, shape, dtype=torch.int8)


@pytest.mark.parametrize("M", [0, 1, 2, 3, 7, 8, 9, 16, 17, 33, 65])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (5, 31), (64, 63), (65, 64), (66, 65), (3, 208)])
def test_integer_sums(host: HostKernels, M: int, N: int, K: int) -> None:  # noqa: N803
    codes = torch.randint(-128, 128, (M, K), dtype=torch.int8)
    weight = random_codes(N, K)
    acc = host.matmul(codes, pack_ternary(weight), N)
    assert acc.dtype == torch.int32
    assert torch.equal(acc, (codes.long() @ weight.long().t()).int())


@pytest.mark.parametrize(
    ("M", "weight_code", "code"),
    [(1, 1, 127), (1, 1, -128), (1, -1, -128), (3, 1, 127), (3, 1, -128), (17, 1, -128)],
)
def test_extreme_codes(host: HostKernels, M: int, weight_code: int, code: int) -> None:  # noqa: N803
    """The largest sums at the largest K: the emulator reports an int32 that overflows."""
    codes = torch.full((M, 131071), code, dtype=torch.int8)
    weight = torch.full((9, 131071), weight_code, dtype=torch.int8)
    acc = host.matmul(codes, pack_ternary(weight), 9)
    assert torch.equal(acc, torch.full((M, 9), code * weight_code * 131071, dtype=torch.int32))


@pytest.mark.parametrize("M", [1, 5, 16, 40])
def test_a_long_k_is_split_and_added(host: HostKernels, M: int) -> None:  # noqa: N803
    codes = torch.randint(-128, 128, (M, 6912), dtype=torch.int8)
    weight = random_codes(70, 6912)
    host.multiprocessors = 132
    acc = host.matmul(codes, pack_ternary(weight), 70)
    assert torch.equal(acc, (codes.double() @ weight.double().t()).int())


def make(
    shape: tuple[int, int, int], granularity: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, out_features, in_features = shape
    x = torch.randn(tokens, in_features).to(dtype)
    weight = torch.randn(out_features, in_features)
    qweight, scale = reference.pack_weight(weight, granularity, 64)[:2]
    return x, qweight, scale


@pytest.mark.parametrize("activation", ["int8_per_token", "int8_per_tensor"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_equals_the_reference(
    host: HostKernels,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    granularity: str,
    activation: str,
) -> None:
    x, qweight, scale = make(shape, granularity, dtype)
    # Every dtype of x meets two of the four kinds of bias; all kinds meet every kernel.
    kinds = [None, *DTYPES]
    for index in (DTYPES.index(dtype), DTYPES.index(dtype) + 1):
        kind = kinds[index]
        bias = None if kind is None else torch.randn(shape[1]).to(kind)
        args = (x, qweight, scale, bias, shape[1], activation, DTYPES[index % 3])
        assert torch.equal(host.linear(*args), reference.linear(*args))


@pytest.mark.parametrize("K", [8192, 8193, 12000, 49000])
def test_quantization_of_long_tokens(host: HostKernels, K: int) -> None:  # noqa: N803
    """Past what registers hold, and past what the fused kernel's shared memory holds."""
    for dtype in DTYPES:
        x = torch.randn(2, K).to(dtype)
        for per_tensor in (False, True):
            ours, expected = (
                kernels.quantize_activation(x, per_tensor) for kernels in (host, reference)
            )
            assert torch.equal(ours[0], expected[0])
            assert torch.equal(ours[1], expected[1])
    qweight, scale = reference.pack_weight(torch.randn(6, K), "per_tensor", 0)[:2]
    args = (x[:1], qweight, scale, None, 6, "int8_per_token", torch.float32)
    assert torch.equal(host.linear(*args), reference.linear(*args))


@pytest.mark.parametrize("N", [1, 9, 70, 515])
def test_one_token_with_every_team(host: HostKernels, N: int) -> None:  # noqa: N803
    """One launch, whatever the number of warps to a row."""
    for multiprocessors in (1, 4, 132):
        host.multiprocessors = multiprocessors
        for in_features in (64, 1000, 4400):
            x, qweight, scale = make((1, N, in_features), "per_channel", torch.bfloat16)
            before = host.count(LAUNCHES)
            args = (x, qweight, scale, torch.randn(N), N, "int8_per_token", torch.float32)
            assert torch.equal(host.linear(*args), reference.linear(*args))
            assert host.count(LAUNCHES) == before + 1
            assert host.count(MMA) == 0


@pytest.mark.parametrize("group", [64, 128, 256, 512, 192])
def test_one_token_with_groups(host: HostKernels, group: int) -> None:
    """One launch where a group's lanes are those of one warp; other groups as several tokens."""
    for multiprocessors, N, columns in ((1, 70, 1), (4, 9, 5), (4, 515, 4), (132, 70, 23)):  # noqa: N806
        host.multiprocessors = multiprocessors
        x, weight = torch.randn(1, columns * group).half(), torch.randn(N, columns * group)
        qweight, scale = reference.pack_weight(weight, "per_group_float32", group)[:2]
        for activation in ("int8_per_token", "int8_per_tensor"):
            args = (x, qweight, scale, torch.randn(N), N, activation, torch.float32)
            before = host.count(LAUNCHES)
            assert torch.equal(host.linear(*args), reference.linear(*args))
            fused = host.count(LAUNCHES) == before + 1 and host.count(MMA) == 0
            assert fused == (group != 192)


@pytest.mark.parametrize(("K", "launches"), [(28672, 1), (32000, 3)])
def test_terms_of_groups_fill_the_shared_memory(host: HostKernels, K: int, launches: int) -> None:  # noqa: N803
    """The longest layer of a 70B model is one launch; past the end of 48 KiB it is more."""
    x, qweight, scale = make((1, 6, K), "per_group_float32", torch.bfloat16)
    args = (x, qweight, scale, None, 6, "int8_per_token", torch.float32)
    before = host.count(LAUNCHES)
    assert torch.equal(host.linear(*args), reference.linear(*args))
    assert host.count(LAUNCHES) == before + launches


@pytest.mark.parametrize("tokens", [2, 9, 16])
def test_groups_are_split_and_added_in_order(host: HostKernels, tokens: int) -> None:
    host.multiprocessors = 132
    x, qweight, scale = make((tokens, 70, 64 * 43), "per_group_float32", torch.bfloat16)
    args = (x, qweight, scale, torch.randn(70), 70, "int8_per_token", torch.float32)
    for seed in (0, 1, 2):
        host._library.bk_emulator_order(seed)
        before = host.count(LAUNCHES)
        assert torch.equal(host.linear(*args), reference.linear(*args))
        assert host.count(LAUNCHES) == before + 3
    for dtype in DTYPES:
        weight = reference.unpack_weight(qweight, scale, 70, torch.float32)
        y = host.linear(x.to(dtype), qweight, scale, None, 70, "float", torch.float32)
        exact = x.to(dtype).double() @ weight.double().t()
        assert bool(((y.double() - exact).abs() <= sum_bound(x, weight)).all())


def test_special_values_pass_through(host: HostKernels) -> None:
    qweight, _ = reference.pack_weight(torch.randn(64, 64), "per_channel", 0)[:2]
    scale = torch.logspace(-30, 30, 64)
    for tokens in (1, 4, 20):
        x = torch.randn(tokens, 64)
        x[tokens // 2, 3] = float("nan")
        x[0, 1] = 0.0 if tokens == 1 else float("inf")
        for out_dtype in DTYPES:
            args = (x, qweight, scale, None, 64, "int8_per_token", out_dtype)
            y, expected = host.linear(*args), reference.linear(*args)
            assert torch.equal(y.isnan(), expected.isnan())
            assert y[tokens // 2].isnan().all()
            assert torch.equal(y.nan_to_num(), expected.nan_to_num())


def test_every_float16_is_read_right(host: HostKernels) -> None:
    bits = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    finite = bits[torch.isfinite(bits)].view(-1, 32)
    ours, expected = (kernels.quantize_activation(finite, False) for kernels in (host, reference))
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])


def test_roundings_and_orders_that_random_numbers_do_not_show(host: HostKernels) -> None:
    ties = tied_tokens()
    ours, expected = (kernels.quantize_activation(ties, False) for kernels in (host, reference))
    assert torch.equal(ours[0], expected[0])
    # Rows are added in pairs of lanes: in ascending order they would give the row's number.
    for weight, number in ((uneven_weight(), 2.0**49), (uneven_weight().t(), 2.0**49 + 2.0**26)):
        ours, expected = (
            kernels.pack_weight(weight.contiguous(), "per_tensor", 0)
            for kernels in (host, reference)
        )
        assert torch.equal(ours[1], expected[1])
        assert expected[1].item() == number
    for tokens in (3, 20):
        y, ones = ordered_shares(host, tokens)
        assert torch.equal(y, ones)


def test_strided_and_misaligned_input(host: HostKernels) -> None:
    x = torch.randn(6, 200)
    qweight, scale = reference.pack_weight(torch.randn(10, 64), "per_tensor", 0)[:2]
    for view in (x[:, 7:71], x[::2, :64], x.t()[:64].t(), x[:, :128:2], x[:1, 3:67]):
        for activation in ("int8_per_token", "float"):
            args = (view, qweight, scale, None, 10, activation, torch.float32)
            y, expected = host.linear(*args), reference.linear(*args)
            torch.testing.assert_close(
                y, expected, rtol=0 if activation != "float" else 1e-5, atol=1e-5
            )
    # Packed rows that begin anywhere, as a view of a memory-mapped file may.
    for offset in (1, 4, 8):
        room = torch.zeros(offset + qweight.numel(), dtype=torch.uint8)
        moved = room[offset:].view(qweight.shape).copy_(qweight)
        for tokens in (1, 6):
            args = (x[:tokens, :64], moved, scale, None, 10, "int8_per_token", torch.float32)
            assert torch.equal(host.linear(*args), reference.linear(*args))


def sum_bound(x: Tensor, weight: Tensor) -> Tensor:
    """Bound of the error of float32 sums of the products, in any order, even if cut off."""
    return (x.double().abs() @ weight.double().abs().t()) * (x.shape[1] + 8) * 2.0**-23


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 20, 100), (20, 7, 100)])
def test_unquantized_activations(
    host: HostKernels, shape: tuple[int, int, int], dtype: torch.dtype, granularity: str
) -> None:
    if granularity == "per_group_float32" and shape[2] % 64:
        granularity = "per_channel"
    x, qweight, scale = make(shape, granularity, dtype)
    bias = torch.randn(shape[1])
    weight = reference.unpack_weight(qweight, scale, shape[1], torch.float32)
    exact = x.double() @ weight.double().t() + bias.double()
    y = host.linear(x, qweight, scale, bias, shape[1], "float", torch.float32)
    bound = sum_bound(x, weight) + bias.double().abs() * 2.0**-23
    assert bool(((y.double() - exact).abs() <= bound).all())
    for wrong in (y * 2, y.roll(1, 0) if shape[0] > 1 else -y):
        assert not bool(((wrong.double() - exact).abs() <= bound).all())


def test_float32_activations_keep_all_their_bits(host: HostKernels) -> None:
    """One column at a time: what comes out is what went in, over the whole range."""
    qweight = pack_ternary(torch.ones(1, 1, dtype=torch.int8))
    x = torch.cat([torch.randn(500), torch.logspace(-30, 38, 500), torch.tensor([3.4028235e38, 0])])
    y = host.linear(x.view(-1, 1), qweight, torch.ones(1), None, 1, "float", torch.float32)
    assert torch.equal(y.view(-1), x)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5, 64), (3, 67, 192), (66, 70, 320), (5, 9, 100), (2, 3, 7)])
def test_input_gradient(
    host: HostKernels, shape: tuple[int, int, int], dtype: torch.dtype, granularity: str
) -> None:
    if granularity == "per_group_float32" and shape[2] % 64:
        granularity = "per_channel"
    _, qweight, scale = make(shape, granularity, dtype)
    dy = torch.randn(shape[0], shape[1]).to(dtype)
    weight = reference.unpack_weight(qweight, scale, shape[1], torch.float32)
    exact = dy.double() @ weight.double()
    dx = host.input_gradient(dy, qweight, scale, shape[1], torch.float32)
    bound = sum_bound(dy, weight.t())
    if dtype == torch.bfloat16 and granularity != "per_tensor":
        # The product of dy and scale is rounded to bfloat16, as the reference rounds the weight.
        bound = bound + (dy.double().abs() @ weight.double().abs()) * 2.0**-8
    assert bool(((dx.double() - exact).abs() <= bound).all())
    assert not bool(((2 * dx.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_input_gradient_of_many_tokens_is_the_references(
    host: HostKernels, dtype: torch.dtype, granularity: str
) -> None:
    _, qweight, scale = make((1, 7, 64), granularity, dtype)
    dy = torch.randn(2, 512, 14)[..., :7].to(dtype)
    dx = host.input_gradient(dy, qweight, scale, 7, torch.float32)
    assert dx.is_contiguous()
    assert torch.equal(dx, reference.input_gradient(dy, qweight, scale, 7, torch.float32))
    # One token less goes through the kernel, which adds up in another order.
    few = host.input_gradient(dy.view(-1, 7)[1:], qweight, scale, 7, torch.float32)
    torch.testing.assert_close(few, dx.view(-1, 64)[1:], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("M", [0, 1, 8, 9, 16, 33])
@pytest.mark.parametrize(("N", "K"), [(1, 1), (5, 64), (67, 100), (130, 192)])
def test_int8_weights(host: HostKernels, M: int, N: int, K: int) -> None:  # noqa: N803
    weight = torch.randint(-127, 128, (N, K), dtype=torch.int8)
    args = (torch.randn(M, K), weight, torch.rand(N), torch.randn(N), torch.float32)
    assert torch.equal(host.linear_int8(*args), reference.linear_int8(*args))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (5, 128), (300, 96), (7, 1000)])
def test_packing_gives_the_bits_of_the_reference(
    host: HostKernels, shape: tuple[int, int], dtype: torch.dtype, granularity: str
) -> None:
    if granularity == "per_group_float32" and shape[1] % 64:
        granularity = "per_channel"
    weight = (torch.randn(shape) * 3).to(dtype)
    weight[0, 3] = 0.0
    ours, expected = (
        kernels.pack_weight(weight, granularity, 64)[:2] for kernels in (host, reference)
    )
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])
    for out_dtype in DTYPES:
        args = (*expected, shape[0], out_dtype)
        assert torch.equal(host.unpack_weight(*args), reference.unpack_weight(*args))
    weight[0, 0] = float("inf")
    scale = host.pack_weight(weight, granularity, 64)[1]
    assert torch.equal(scale.isnan(), reference.pack_weight(weight, granularity, 64)[1].isnan())


def test_ties_of_weights_round_to_even(host: HostKernels) -> None:
    """Codes at exactly half a scale are 0."""
    weight = torch.tensor([[0.5, -0.5, 1.5, -1.5] * 16])
    ours, expected = (
        kernels.pack_weight(weight, "per_tensor", 0)[:2] for kernels in (host, reference)
    )
    assert torch.equal(ours[0], expected[0])
    assert (reference.unpack_weight(*ours, 1, torch.float32)[0, :2] == 0).all()


@pytest.mark.parametrize("M", [3, 16, 20, 70])
def test_16_byte_loads_meet_no_bank_conflict(host: HostKernels, M: int) -> None:  # noqa: N803
    for dtype, activation in ((torch.float32, "int8_per_token"), (torch.bfloat16, "float")):
        x, qweight, scale = make((M, 130, 320), "per_tensor", dtype)
        host.linear(x, qweight, scale, None, 130, activation, torch.float32)
        assert (host.count(SHARED_LOADS) > 0) == (M > 16)
        assert host.count(CONFLICTS) == 0


def test_float_sums_are_the_same_every_run_and_in_every_order(host: HostKernels) -> None:
    host.multiprocessors = 132
    x, qweight, scale = make((20, 70, 2560), "per_tensor", torch.bfloat16)
    results = []
    for seed in (0, 1, 2):
        host._library.bk_emulator_order(seed)
        for tokens in (5, 20):
            args = (x[:tokens], qweight, scale, None, 70, "float", torch.float32)
            results.append(host.linear(*args))
    assert all(torch.equal(results[i], results[i + 2]) for i in range(len(results) - 2))
