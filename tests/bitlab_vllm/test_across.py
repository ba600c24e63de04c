"""A layer with its inputs over several processes, here threads: the bits of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from bitcore.config import BitQuantConfig
from bitcore.errors import ConfigError
from bitcore.ops import linear
from bitlab_vllm.across import _MOST_COLUMNS, Group, across, padded
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
        if multiplier is not None:
            qweight, multiplier = padded(qweight, multiplier)
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


def test_too_many_columns_for_exact_sums_are_refused() -> None:
    columns = _MOST_COLUMNS + 64
    multiplier = torch.ones(4, columns // 64, dtype=torch.uint8)
    with pytest.raises(ConfigError, match="must leave at most .* inputs"):
        padded(torch.zeros(1, columns, dtype=torch.uint8), multiplier)
