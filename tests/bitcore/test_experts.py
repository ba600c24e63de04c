"""All experts of a layer in one call: the bits of a dense call for each of them."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from bitcore import ops, reference
from bitcore.errors import ArgumentError, ArgumentTypeError
from bitcore.kernels.cpu import CpuKernels
from bitcore.kernels.cpu_experts import CpuExperts
from bitcore.ops_experts import counts_on_host
from bitcore.prepared import PreparedExperts
from tests.conftest import native_kernels

OPS = torch.ops.bitlab
ACTIVATIONS = ["int8_per_token", "int8_per_tensor", "float"]
GRANULARITIES = ["per_tensor", "per_channel", "per_group", "per_group_float32"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN = float("nan")
# Tokens, experts of each, E, N, K; some experts get none, some a tile and more.
SHAPES = [(1, 8, 16, 5, 64), (3, 2, 40, 67, 192), (40, 3, 5, 130, 320), (120, 1, 3, 9, 128)]


def make(
    experts: int, rows: int, columns: int, granularity: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Packed weights of all experts, their scales and multipliers."""
    each = [
        reference.pack_weight(torch.randn(rows, columns) * torch.rand(rows, 1), granularity, 64)
        for _ in range(experts)
    ]
    qweight, scale, multiplier = zip(*each, strict=True)
    kept = [one for one in multiplier if one is not None]
    return torch.stack(qweight), torch.stack(scale), torch.stack(kept) if kept else None


def draw(tokens: int, choices: int, experts: int) -> Tensor:
    """An index that names no expert here and there, and some more often than others."""
    drawn = torch.randint(-1, experts + 1, (tokens, choices))
    return torch.where(torch.rand(tokens, choices) < 0.5, drawn, drawn.clamp(max=1))


def expert_by_expert(x: Tensor, index: Tensor, *weights: Any) -> Tensor:
    """One dense call for each expert that has tokens, and zeros for none."""
    qweight, scale, bias, rows, activation, multiplier = weights
    flat, each = index.reshape(-1), index.shape[1]
    y = torch.zeros(flat.numel(), rows, dtype=x.dtype)
    for expert in set(flat.tolist()) & set(range(len(qweight))):
        places = torch.nonzero(flat == expert)[:, 0]
        own = [None if one is None else one[expert] for one in (bias, multiplier)]
        tokens = x[places // each]
        y[places] = ops.linear(
            tokens, qweight[expert], scale[expert], own[0], rows, activation, own[1]
        )
    return y


@cache
def cases(
    shape: tuple[int, ...], granularity: str, activation: str
) -> list[tuple[Tensor, Tensor, tuple[Any, ...], Tensor | None]]:
    """Tokens of each dtype, an index, weights, and what the reference makes of int8 activations;
    the same for every ISA.
    """
    tokens, choices, experts, rows, columns = shape
    qweight, scale, multiplier = make(experts, rows, columns, granularity)
    index, found = draw(tokens, choices, experts), []
    for turn, dtype in enumerate(DTYPES):
        bias = None if turn == 0 else torch.randn(experts, rows).to(DTYPES[turn - 1])
        x, expected = torch.randn(tokens, columns).to(dtype), None
        weights = qweight, scale, bias, rows, activation, multiplier
        if activation != "float":
            expected = reference.experts_linear(x, index, *weights[:-1], dtype, multiplier)
        found.append((x, index, weights, expected))
    return found


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_of_dense_calls(
    isa: str, shape: tuple[int, ...], granularity: str, activation: str
) -> None:
    given = cases(shape, granularity, activation)
    for threads, (x, index, weights, expected) in enumerate(given, 1):
        torch.set_num_threads(threads)
        y = ops.experts_linear(x, index, *weights)
        assert torch.equal(y, expert_by_expert(x, index, *weights))
        assert expected is None or torch.equal(y, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_all_tokens_to_one_expert_and_to_none(isa: str, num_threads: int, activation: str) -> None:
    qweight, scale, _ = make(4, 33, 128, "per_channel")
    x, bias = torch.randn(50, 128), torch.randn(4, 33)
    weights = qweight, scale, bias, 33, activation
    one = ops.experts_linear(x, torch.full((50, 1), 2), *weights)
    assert torch.equal(one, ops.linear(x, qweight[2], scale[2], bias[2], 33, activation))
    for number in (-1, 4, 2**40, -(2**40)):
        none = ops.experts_linear(x, torch.full((50, 2), number), *weights)
        assert torch.equal(none, torch.zeros(100, 33))
    assert ops.experts_linear(x, torch.zeros(50, 0).long(), *weights).shape == (0, 33)
    assert ops.experts_linear(x[:0], torch.zeros(0, 2).long(), *weights).shape == (0, 33)


@pytest.mark.parametrize("activation", ACTIVATIONS[:2])
def test_a_token_that_is_not_finite_spoils_no_other(isa: str, activation: str) -> None:
    """With one scale a tensor it spoils the tokens of its own experts."""
    qweight, scale, _ = make(3, 9, 64, "per_channel")
    x = torch.randn(30, 64)
    x[4, 5], x[7, 0] = NAN, float("inf")
    index = torch.stack([torch.arange(30) % 2, torch.full((30,), 2)], 1)
    x[5::2] = x[5::2].nan_to_num(0, 0, 0)
    y = ops.experts_linear(x, index, qweight, scale, None, 9, activation)
    assert torch.equal(y.isnan(), y.isnan().any(1, keepdim=True).expand_as(y))
    spoilt = set(torch.nonzero(y.isnan()[:, 0])[:, 0].tolist())
    first = {8, 9} if activation == "int8_per_token" else {*range(0, 60, 4), *range(1, 60, 2)}
    assert spoilt == first


def test_strided_tokens_and_index(isa: str) -> None:
    qweight, scale, _ = make(3, 9, 128, "per_channel")
    wide, index = torch.randn(30, 200), draw(2, 30, 3).t()
    weights = qweight, scale, None, 9, "int8_per_token"
    expected = ops.experts_linear(wide[:, 7:135].contiguous(), index.contiguous(), *weights)
    assert torch.equal(ops.experts_linear(wide[:, 7:135], index, *weights), expected)
    turned = torch.randn(128, 30).t()
    expected = ops.experts_linear(turned.contiguous(), index, *weights)
    assert torch.equal(ops.experts_linear(turned, index, *weights), expected)


@pytest.mark.parametrize("granularity", ["per_channel", "per_group"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_prepared_experts(
    backend: str, granularity: str, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    qweight, scale, multiplier = make(5, 12, 128, granularity)
    weights = qweight, scale, torch.randn(5, 12), 12, activation
    prepared = PreparedExperts(*weights, multiplier)
    dispatched = 0
    run = ops.experts_linear

    def counted(*args: Any) -> Tensor:
        nonlocal dispatched
        dispatched += 1
        return run(*args)

    for dtype in DTYPES:
        x, index = torch.randn(7, 128).to(dtype), draw(7, 3, 5)
        expected = run(x, index, *weights, multiplier)
        with monkeypatch.context() as patch:
            patch.setattr(ops, "experts_linear", counted)
            assert torch.equal(prepared(x, index), expected)
    native = backend == "cpu" and activation != "float"
    assert dispatched == (0 if native else 3)
    x = torch.randn(7, 128, requires_grad=True)
    assert prepared(x, index).requires_grad
    assert prepared.holds(qweight, scale, weights[2], multiplier)
    assert not prepared.holds(qweight.clone(), scale, weights[2], multiplier)


def test_a_prepared_call_refuses_what_the_op_does() -> None:
    qweight, scale, _ = make(3, 9, 64, "per_channel")
    prepared = PreparedExperts(qweight, scale, None, 9, "int8_per_token")
    x, index = torch.randn(4, 64), torch.zeros(4, 2).long()
    for wrong, chosen, text in (
        (x[:, :63], index, r"x must be \[\.\.\., 64\]"),
        (x[None], index, r"x must be \[M, K\]"),
        (x, index.int(), "index must be torch.int64"),
        (x, index[:3], "index must have as many entries for each of 4 tokens"),
        (x.double(), index, "x must be float32"),
    ):
        with pytest.raises((ArgumentError, ArgumentTypeError), match=text):
            prepared(wrong, chosen)
    for freed in (x, index):
        given = [x.clone(), index.clone()]
        given[0 if freed is x else 1].untyped_storage().resize_(0)
        with pytest.raises(ArgumentError, match="must have its memory"):
            prepared(*given)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"qweight": torch.zeros(0, 3, 64, dtype=torch.uint8)}, ArgumentError, "qweight must be"),
        ({"qweight": torch.zeros(3, 2, 64, dtype=torch.uint8)}, ArgumentError, "qweight must be"),
        ({"qweight": torch.zeros(3, 3, 64)}, ArgumentTypeError, "qweight must be torch.uint8"),
        ({"weight_scale": torch.ones(2, 9)}, ArgumentError, "weight_scale must have one entry"),
        ({"weight_scale": torch.ones(3, 8)}, ArgumentError, "weight_scale must be"),
        ({"bias": torch.ones(9)}, ArgumentError, "bias must have one entry for each of 3"),
        ({"bias": torch.ones(3, 8)}, ArgumentError, "bias must be"),
        ({"activation": "int4"}, ArgumentError, "activation must be one of"),
        ({"multiplier": torch.ones(3, 9, 2)}, ArgumentTypeError, "multiplier must be torch.uint8"),
        ({"index": torch.zeros(7).long()}, ArgumentError, "index must have as many entries"),
        ({"index": torch.zeros(4, 2)}, ArgumentTypeError, "index must be torch.int64"),
        ({"x": torch.ones(0, 64)}, ArgumentError, "index must have as many entries for each of 0"),
        ({"x": torch.ones(64)}, ArgumentError, r"x must be \[M, K\]"),
    ],
)
def test_bad_arguments_are_named(
    backend: str, change: dict[str, Any], error: type[Exception], text: str
) -> None:
    qweight, scale, _ = make(3, 9, 64, "per_channel")
    given: dict[str, Any] = {
        "x": torch.randn(4, 64), "index": torch.zeros(4, 2).long(), "qweight": qweight,
        "weight_scale": scale, "bias": None, "out_features": 9, "activation": "int8_per_token",
        "multiplier": None,
    }  # fmt: skip
    with pytest.raises(error, match=f"^bitlab::experts_linear: {text}"):
        ops.experts_linear(**given | change)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_opcheck(backend: str, granularity: str) -> None:
    qweight, scale, multiplier = make(3, 9, 128, granularity)
    x, index = torch.randn(4, 128, requires_grad=True), draw(4, 2, 3)
    bias = torch.randn(3, 9, requires_grad=True)
    args = (x, index, qweight, scale, bias, 9, "int8_per_token", torch.float32, multiplier)
    torch.library.opcheck(OPS.experts_linear.default, args)
    args = (torch.randn(8, 9), index, qweight, scale, 9, 4, torch.bfloat16, multiplier)
    torch.library.opcheck(OPS.experts_input_gradient.default, args)


@pytest.mark.parametrize("granularity", ["per_channel", "per_group"])
def test_gradients_are_those_of_dense_calls(backend: str, granularity: str) -> None:
    qweight, scale, multiplier = make(4, 12, 128, granularity)
    index, dy = draw(6, 2, 4), torch.randn(12, 12)
    found = []
    for run in (ops.experts_linear, expert_by_expert):
        torch.manual_seed(3)
        x = torch.randn(6, 128, requires_grad=True)
        bias = torch.randn(4, 12, requires_grad=True)
        run(x, index, qweight, scale, bias, 12, "int8_per_token", multiplier).backward(dy)
        found.append((x.grad, bias.grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_device_without_the_call_goes_expert_by_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    qweight, scale, multiplier = make(4, 12, 128, "per_group")
    args = (torch.randn(6, 128), draw(6, 2, 4), qweight, scale, None, 12, "int8_per_token")
    expected = ops.experts_linear(*args, multiplier)
    counts = []
    run = CpuKernels.linear

    def counted(*given: Any, **named: Any) -> Tensor:
        counts.append(len(given[1]))
        return run(*given, **named)

    assert not counts_on_host("cpu", "int8_per_token")
    assert counts_on_host("cpu", "float")
    monkeypatch.setattr(CpuKernels, "linear", counted)
    assert torch.equal(ops.experts_linear(*args, multiplier), expected)
    assert counts == []
    monkeypatch.delattr(CpuExperts, "experts_linear")
    monkeypatch.delattr(CpuExperts, "prepare_experts")
    assert counts_on_host("cpu", "int8_per_token")
    assert torch.equal(ops.experts_linear(*args, multiplier), expected)
    index = args[1]
    assert sum(counts) == int(((index >= 0) & (index < 4)).sum())
    prepared = PreparedExperts(*args[2:], multiplier)
    assert torch.equal(prepared(*args[:2]), expected)


def test_compiled_without_a_graph_break() -> None:
    qweight, scale, _ = make(4, 12, 128, "per_channel")

    def run(x: Tensor, index: Tensor) -> Tensor:
        return ops.experts_linear(x, index, qweight, scale, None, 12, "int8_per_token") * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for tokens in (3, 5):
        x, index = torch.randn(tokens, 128), draw(tokens, 2, 4)
        # One graph for any number of tokens, or an error.
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(index, 0)
        assert torch.equal(compiled(x, index), run(x, index))
    with pytest.raises(ArgumentError, match="index must have as many entries for each of 3 tokens"):
        compiled(torch.randn(3, 128), draw(4, 1, 4))


@pytest.mark.parametrize("counts", [[1, 70, 0, 3, 24, 9], [4, 4, 4, 4, 4, 4]])
def test_work_is_shared_whatever_the_counts(counts: list[int]) -> None:
    """Numbers of threads whose shares end within an expert, and just where one does: no block is
    left out.
    """
    kernels = native_kernels()
    qweight, scale, _ = make(6, 330, 256, "per_channel")
    index = torch.cat([torch.full((count,), e) for e, count in enumerate(counts)])
    index = index[torch.randperm(len(index))][:, None]
    args = (torch.randn(len(index), 256), index, qweight, scale, None, 330, "int8_per_token")
    expected = reference.experts_linear(*args, torch.float32)
    for threads in range(1, 9):
        torch.set_num_threads(threads)
        assert torch.equal(kernels.experts_linear(*args, torch.float32), expected)
