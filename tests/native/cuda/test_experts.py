"""All experts of a layer in one call, on the emulator: the reference's bits, wherever tokens go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitcore import reference
from tests.bitcore.test_experts import draw, make
from tests.native.cuda.host import CONFLICTS, LAUNCHES, MMA, WGMMA, HostKernels
from tests.native.cuda.test_kernels import DTYPES

ACTIVATIONS = ["int8_per_token", "int8_per_tensor"]
GRANULARITIES = ["per_tensor", "per_channel", "per_group", "per_group_float32"]
# Tokens, experts of each, E, N, K: tiles of eight and of sixteen tokens alone, then with tiles of
# 32 and of 64; some experts get none.
SHAPES = [(1, 8, 16, 5, 64), (9, 3, 4, 67, 192), (17, 3, 5, 130, 128), (9, 24, 2, 9, 128)]


def equals(host: HostKernels, *args: object) -> bool:
    return torch.equal(host.experts_linear(*args), reference.experts_linear(*args))  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference(
    host: HostKernels, shape: tuple[int, ...], granularity: str, activation: str
) -> None:
    tokens, choices, experts, rows, columns = shape
    qweight, scale, multiplier = make(experts, rows, columns, granularity)
    number = GRANULARITIES.index(granularity)
    dtype, bias_dtype, out = (DTYPES[(number + i) % 3] for i in range(3))
    bias = None if number == 1 else torch.randn(experts, rows).to(bias_dtype)
    x, index = torch.randn(tokens, columns).to(dtype), draw(tokens, choices, experts)
    args = (x, index, qweight, scale, bias, rows, activation, out, multiplier)
    before = host.count(LAUNCHES)
    y = host.experts_linear(*args)
    many = tokens * choices >= 8 * experts
    per_tensor = activation == "int8_per_tensor"
    assert host.count(LAUNCHES) - before == 2 + many + per_tensor
    assert host.count(CONFLICTS) == 0
    assert torch.equal(y, reference.experts_linear(*args))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(9, 9, 3, 130, 144), (3, 60, 2, 300, 320), (2, 90, 2, 5, 72)])
def test_many_tokens_on_a_hopper(
    host: HostKernels, shape: tuple[int, ...], granularity: str
) -> None:
    """Tiles of 64 tokens with wgmma; rows that are not aligned, and groups of floats, without."""
    tokens, choices, experts, rows, columns = shape
    if granularity.startswith("per_group"):
        columns = (columns + 63) // 64 * 64
    qweight, scale, multiplier = make(experts, rows, columns, granularity)
    x, bias = torch.randn(tokens, columns).bfloat16(), torch.randn(experts, rows)
    index = draw(tokens, choices, experts)
    host.set_hopper(True)
    for activation in ACTIVATIONS:
        before = host.count(WGMMA)
        args = (x, index, qweight, scale, bias, rows, activation, torch.float32, multiplier)
        y = host.experts_linear(*args)
        assert torch.equal(y, reference.experts_linear(*args))
        with_wgmma = granularity != "per_group_float32" and columns % 16 == 0
        assert (host.count(WGMMA) > before) == with_wgmma
    host.set_hopper(False)


@pytest.mark.parametrize("columns", [31, 1008])
def test_rows_that_are_not_aligned(host: HostKernels, columns: int) -> None:
    for tokens, choices, experts in ((3, 2, 5), (12, 4, 2)):
        qweight, scale, _ = make(experts, 21, columns, "per_channel")
        x, index = torch.randn(tokens, columns).bfloat16(), draw(tokens, choices, experts)
        args = (x, index, qweight, scale, None, 21, "int8_per_token", torch.float32, None)
        assert equals(host, *args)


def test_one_output(host: HostKernels) -> None:
    """Where a scale a row is one scale, and groups are not."""
    for granularity in GRANULARITIES:
        qweight, scale, multiplier = make(3, 1, 128, granularity)
        x, index = torch.randn(5, 128), draw(5, 2, 3)
        args = (x, index, qweight, scale, None, 1, "int8_per_token", torch.float32, multiplier)
        assert equals(host, *args)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_all_tokens_to_one_expert_and_to_none(host: HostKernels, activation: str) -> None:
    qweight, scale, _ = make(4, 9, 128, "per_channel")
    x, bias = torch.randn(20, 128), torch.randn(4, 9)
    weights = qweight, scale, bias, 9, activation, torch.float32
    y = host.experts_linear(x, torch.full((20, 2), 2), *weights)
    one = reference.linear(x, qweight[2], scale[2], bias[2], 9, activation, torch.float32)
    assert torch.equal(y, one.repeat_interleave(2, 0))
    for number in (-1, 4, 2**40, -(2**40)):
        y = host.experts_linear(x, torch.full((20, 2), number), *weights)
        assert torch.equal(y, torch.zeros(40, 9))


@pytest.mark.parametrize(
    ("tokens", "choices", "experts"), [(5, 130, 2), (3, 20, 1100), (2, 70, 700)]
)
def test_rows_are_sorted_whatever_their_number(
    host: HostKernels, tokens: int, choices: int, experts: int
) -> None:
    """Several rounds of rows of a warp and of experts; more experts than all warps can count."""
    qweight, scale, _ = make(experts, 5, 64, "per_channel")
    index = draw(tokens, choices, experts)
    args = (torch.randn(tokens, 64), index, qweight, scale, None, 5, "int8_per_token")
    assert equals(host, *args, torch.float32, None)


@pytest.mark.parametrize("counts", [[16, 17, 0, 33, 1, 32], [15, 0, 0, 0, 0, 97], [65, 64, 63, 0]])
def test_tiles_are_cut_where_they_end(host: HostKernels, counts: list[int]) -> None:
    """Experts that fill a tile, want one token of the next, and none."""
    experts = len(counts)
    qweight, scale, multiplier = make(experts, 9, 64, "per_group")
    index = torch.cat([torch.full((count,), e) for e, count in enumerate(counts)])
    index = index[torch.randperm(len(index))][:, None].contiguous()
    # As rows of few tokens, so that few codes are made.
    index = torch.cat([index, index.new_full((-len(index) % 8, 1), -1)]).view(8, -1)
    args = (torch.randn(8, 64), index, qweight, scale, None, 9, "int8_per_token", torch.float32)
    assert equals(host, *args, multiplier)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_token_that_is_not_finite_spoils_no_other(host: HostKernels, activation: str) -> None:
    """With one scale a tensor it spoils the tokens of its own experts."""
    qweight, scale, _ = make(3, 9, 64, "per_channel")
    x, index = torch.randn(7, 64), torch.tensor([[0, 2], [1, 2], [0, 2], [1, -1]] + 3 * [[2, 2]])
    x[3, 5] = float("nan")
    args = (x, index, qweight, scale, None, 9, activation, torch.float32)
    y, expected = host.experts_linear(*args), reference.experts_linear(*args)
    assert torch.equal(y.isnan(), expected.isnan())
    assert y[6].isnan().all()
    assert not y[7].any()
    assert torch.equal(y.nan_to_num(7.0), expected.nan_to_num(7.0))


def spread_over(tokens: int, choices: int, experts: int) -> Tensor:
    return torch.stack([torch.randperm(experts)[:choices] for _ in range(tokens)])


def test_experts_without_tokens_are_not_read(host: HostKernels) -> None:
    """One token's three experts are multiplied, however many there are: 64 columns are eight mma,
    and the warp that has them has three blocks of zeros in flight beside.
    """
    for experts in (8, 40):
        qweight, scale, _ = make(experts, 32, 64, "per_channel")
        index = spread_over(1, 3, experts)
        args = (torch.randn(1, 64), index, qweight, scale, None, 32, "int8_per_token")
        assert equals(host, *args, torch.float32, None)
        assert host.count(MMA) == 3 * 4 * 8


def test_a_layer_of_float_activations_goes_expert_by_expert(host: HostKernels) -> None:
    qweight, scale, multiplier = make(3, 9, 128, "per_group")
    x, index = torch.randn(5, 128).bfloat16(), draw(5, 2, 3)
    weights = qweight, scale, None, 9, "float", torch.float32, multiplier
    y = host.experts_linear(x, index, *weights)
    exact = reference.experts_linear(x.float(), index, *weights)
    torch.testing.assert_close(y, exact, rtol=2e-2, atol=2e-2)


def test_sizes_above_the_limits_are_refused(host: HostKernels) -> None:
    library = host._library
    room = torch.zeros(4096, dtype=torch.uint8)
    good = room.data_ptr() + -room.data_ptr() % 256

    def call(index: int, choices: int, experts: int, tokens: int, out_features: int) -> str:
        weights = (good, good, 1, 0, None, None, 0)
        shape = (tokens, out_features, 64)
        end = (good, 0, *shape, 0, good, None)
        assert library.bk_cuda_experts_i8_t2(good, 0, 64, index, choices, experts, *weights, *end)
        return str(library.bk_cuda_last_error().decode())

    for experts in (0, -1, 8193):
        found = call(good, 2, experts, 3, 9)
        assert "experts must be from 1 to 8192" in found
        assert f"got experts {experts}, choices 2, M 3, N 9" in found
    assert "choices must be at least 1" in call(good, 0, 4, 3, 9)
    assert "their rows below 2^31" in call(good, 2**29, 4, 8, 9)
    assert "N must be at most 4194240" in call(good, 2, 4, 3, 4194241)
    assert "index must be aligned to its elements" in call(good + 4, 2, 4, 3, 9)
    assert "index must be aligned to its elements" in call(0, 2, 4, 3, 9)
