"""A layer with its inputs over several processes, here threads: the bits of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from bitcore.across import Group, across, across_int8, across_linear, filled_up
from bitcore.config import BitQuantConfig
from bitcore.errors import ArgumentError
from bitcore.ops import linear, linear_int8, pack_weight, qat_linear
from bitcore.packing import pack_codes
from bitcore.quantize import quantize_rows_int8
from bitlab_vllm.slices import Slice, join, take
from tests.bitlab_vllm.test_slices import GRANULARITIES, stored

ROWS = 37


def groups(processes: int) -> list[Group]:
    """Groups of threads that reduce tensors in place, as collectives do."""
    held: list[Any] = [None] * processes
    barrier = threading.Barrier(processes)

    def reducing(rank: int, reduce: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
        def run(tensor: Tensor) -> None:
            held[rank] = tensor.clone()
            barrier.wait(60)
            tensor.copy_(reduce(torch.stack(held)))
            barrier.wait(60)

        return run

    return [
        Group(reducing(rank, lambda all_: all_.amax(0)), reducing(rank, lambda all_: all_.sum(0)))
        for rank in range(processes)
    ]


def spread(
    x: Tensor, tensors: dict[str, Tensor], config: BitQuantConfig, bias: Tensor, processes: int
) -> list[Tensor]:
    columns = x.shape[-1]
    width = columns // processes

    def run(rank: int, group: Group) -> Tensor:
        within = (rank * width, (rank + 1) * width)
        part = Slice("a", (ROWS, columns), ((0, ROWS),), within)
        qweight, scale, multiplier = join([take(part, config, tensors)])
        own = x[:, slice(*within)]
        return across(own, qweight, scale, bias, ROWS, config.activation, multiplier, group)

    with ThreadPoolExecutor(processes) as pool:
        return list(pool.map(run, range(processes), groups(processes)))


def whole(x: Tensor, tensors: dict[str, Tensor], config: BitQuantConfig, bias: Tensor) -> Tensor:
    return linear(
        x, tensors["qweight"], tensors["qweight_scale"], bias, ROWS, config.activation,
        tensors.get("qweight_multiplier"),
    )  # fmt: skip


def tokens(dtype: torch.dtype, columns: int = 256) -> Tensor:
    x = torch.randn(7, columns, generator=torch.Generator().manual_seed(5)) * 3
    x[1] = 0
    # The largest value of a token is in one part only, and is met by each code.
    x[2, 200] = 1000
    x[3] = torch.linspace(-128, 127, columns)
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "groups"])
def test_integer_sums_give_the_bits_of_one_process(
    granularity: str, processes: int, dtype: torch.dtype
) -> None:
    config = BitQuantConfig(**GRANULARITIES[granularity])
    tensors, x = stored(ROWS, 256, config), tokens(dtype)
    bias = torch.randn(ROWS, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = whole(x, tensors, config, bias)
    for y in spread(x, tensors, config, bias, processes):
        assert y.dtype == dtype
        assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("columns", "processes"), [(256, 4), (254, 2)])
def test_int8_weights_give_the_bits_of_one_process(
    columns: int, processes: int, dtype: torch.dtype
) -> None:
    """127 columns a process are no multiple of anything, 64 are one block."""
    generator = torch.Generator().manual_seed(4)
    qweight, scale = quantize_rows_int8(torch.randn(ROWS, columns, generator=generator))
    x = tokens(dtype, columns)
    x[4, 3] = torch.nan
    bias = torch.randn(ROWS, generator=generator).to(dtype)
    expected = linear_int8(x, qweight, scale, bias)
    width = columns // processes

    def run(rank: int, group: Group) -> Tensor:
        own = slice(rank * width, (rank + 1) * width)
        return across_int8(x[:, own], filled_up(qweight[:, own]), scale, bias, group)

    with ThreadPoolExecutor(processes) as pool:
        for y in pool.map(run, range(processes), groups(processes)):
            assert y.dtype == dtype
            assert y[4].isnan().all()
            assert torch.equal(y.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("columns", [16512, 16576])
def test_the_largest_int8_sums_are_exact(columns: int) -> None:
    """In halves and in quarters of a code, of both signs."""
    group = Group(lambda largest: None, lambda sums: None)
    qweight = torch.tensor([[127], [-127], [127]], dtype=torch.int8).repeat(1, columns)
    qweight[2, ::3] = -90
    x = torch.tensor([[127.0], [-127.0], [119.0]]).repeat(1, columns)
    x[2, 0] = 127
    y = across_int8(x, filled_up(qweight), torch.ones(3), None, group)
    assert y[0, 0] == 127 * 127 * columns
    assert torch.equal(y, linear_int8(x, qweight, torch.ones(3), None))


def test_int8_weights_that_are_not_filled_up_are_refused() -> None:
    group = Group(lambda largest: None, lambda sums: None)
    x, qweight = torch.ones(1, 64), torch.zeros(4, 64, dtype=torch.int8)
    with pytest.raises(ArgumentError, match=r"zeros behind its 64, got \[4, 64\]\n.*filled_up"):
        across_int8(x, qweight, torch.ones(4), None, group)


def test_sums_beyond_24_bits_stay_exact() -> None:
    """All products of one sign and the largest multipliers: about 2^27 in all."""
    config = BitQuantConfig(**GRANULARITIES["groups"])
    columns = 16384
    tensors = {
        "qweight": torch.full((10, columns), 0b10101010, dtype=torch.uint8),
        "qweight_scale": torch.linspace(0.1, 0.2, ROWS),
        "qweight_multiplier": torch.full((ROWS, columns // 64), 127, dtype=torch.uint8),
    }
    x = torch.randint(100, 128, (3, columns), generator=torch.Generator().manual_seed(2)).float()
    x[:, 0] = 127
    bias = torch.zeros(ROWS)
    expected = whole(x, tensors, config, bias)
    assert expected.max() / 0.2 > 2**24
    for y in spread(x, tensors, config, bias, 2):
        assert torch.equal(y, expected)


@pytest.mark.parametrize("fields", [{"activation_dtype": "float32"}, {}])
def test_what_is_float_by_nature_is_equal_to_its_rounding(fields: dict[str, str]) -> None:
    config = BitQuantConfig(**GRANULARITIES["floats"], **fields)
    tensors, x = stored(ROWS, 256, config), tokens(torch.float32)
    bias = torch.ones(ROWS)
    expected = whole(x, tensors, config, bias)
    one, two = spread(x, tensors, config, bias, 2)
    assert torch.equal(one, two)
    torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_spoils_itself_only(bad: float) -> None:
    config = BitQuantConfig(**GRANULARITIES["groups"])
    tensors, x = stored(ROWS, 256, config), tokens(torch.float32)
    x[4, 3] = bad
    expected = whole(x, tensors, config, torch.zeros(ROWS))
    for y in spread(x, tensors, config, torch.zeros(ROWS), 2):
        assert y[4].isnan().all()
        assert torch.equal(y[torch.arange(7) != 4], expected[torch.arange(7) != 4])


@pytest.mark.parametrize("columns", [16512, 16576])
def test_codes_in_halves_and_in_quarters_give_the_same_sums(columns: int) -> None:
    """The largest sums that each has to hold exactly, of both signs."""
    group = Group(lambda largest: None, lambda sums: None)
    qweight = torch.tensor([[0b10000010] * columns], dtype=torch.uint8)
    multiplier = torch.full((4, columns // 64), 127, dtype=torch.uint8)
    x = torch.tensor([[127.0], [-127.0], [119.0]]).expand(3, columns)
    y = across(x, qweight, torch.ones(4), None, 4, "int8_per_token", multiplier, group)
    assert torch.equal(y, linear(x, qweight, torch.ones(4), None, 4, "int8_per_token", multiplier))


def test_too_many_columns_for_exact_sums_are_refused() -> None:
    columns = 66112
    multiplier = torch.ones(4, columns // 64, dtype=torch.uint8)
    qweight, x = torch.zeros(1, columns, dtype=torch.uint8), torch.ones(1, columns)
    group = Group(lambda largest: None, lambda sums: None)
    with pytest.raises(ArgumentError, match="columns must be at most 66052 .* got 66112"):
        across(x, qweight, torch.ones(4), None, 4, "int8_per_token", multiplier, group)


def test_codes_are_those_of_one_division() -> None:
    """127 / m by the reciprocal of m would round twice, and take some values to another code."""
    x = torch.rand(200000, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    largest = x.amax(1, keepdim=True)
    # Where a code ends: the float just there, by the formula of one process.
    x[:, 0] = 63.5 / (torch.full_like(largest, 127.0) / largest).squeeze()
    qweight = pack_codes(torch.eye(4, dtype=torch.int8))
    group = Group(lambda largest: None, lambda sums: None)
    y = across(x, qweight, torch.ones(4), None, 4, "int8_per_token", None, group)
    assert torch.equal(y, linear(x, qweight, torch.ones(4), None, 4, "int8_per_token"))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("activation", ["int8_per_token", "int8_per_tensor", "float"])
def test_gradients_are_those_of_one_process(granularity: str, activation: str) -> None:
    config = BitQuantConfig(**GRANULARITIES[granularity])
    weight = torch.randn(ROWS, 256, generator=torch.Generator().manual_seed(3))
    bias = torch.randn(ROWS, generator=torch.Generator().manual_seed(1))
    qweight, scale, *multiplier = pack_weight(weight, config.granularity, config.group_size)
    x, dy = tokens(torch.float32), torch.randn(7, ROWS)
    given = [one.clone().requires_grad_() for one in (x, weight, bias)]
    expected = qat_linear(
        *given, config.granularity, config.group_size, activation
    )  # fmt: skip
    expected.backward(dy)
    group = Group(lambda largest: None, lambda sums: None)
    held = [one.clone().requires_grad_() for one in (x, weight, bias)]
    y = across_linear(
        held[0], held[1], qweight, scale, held[2], ROWS, activation,
        multiplier[0] if multiplier else None, group,
    )  # fmt: skip
    y.backward(dy)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-2)
    for one, other in zip(held, given, strict=True):
        assert one.grad is not None
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("activation", ["int8_per_token", "float"])
def test_gradients_do_not_depend_on_autocast(activation: str) -> None:
    """A float32 gradient is not rounded, whether the backward pass is under autocast or not."""
    weight = torch.randn(ROWS, 256, generator=torch.Generator().manual_seed(3))
    packed, x = pack_weight(weight, "per_channel", None), tokens(torch.float32)
    group = Group(lambda largest: None, lambda sums: None)
    dy = torch.randn(7, ROWS, generator=torch.Generator().manual_seed(6))
    given = [one.clone().requires_grad_() for one in (x, weight, packed[1])]
    layers: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [
        lambda x, w, _: across_linear(x, w, *packed, None, ROWS, activation, None, group),
        lambda x, w, _: qat_linear(x, w, None, "per_channel", None, activation),
        lambda x, w, scale: qat_linear(x, w, None, "per_channel", None, activation, None, scale),
    ]
    for number, layer in enumerate(layers):
        read, found = given[: 3 if number == 2 else 2], []
        for within in (False, True):
            y = layer(*given)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=within):
                found.append(torch.autograd.grad(y, read, dy))
        assert all(map(torch.equal, *found))
