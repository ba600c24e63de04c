from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bitcore import ops, ops_int8, ops_qat, ops_ternary
from bitcore.errors import ArgumentError, ArgumentTypeError
from bitcore.prepared import PreparedLinear
from tests.bitcore.opcheck import opcheck

OPS = torch.ops.bitlab
ACTIVATIONS = ["int8_per_token", "int8_per_tensor", "float"]
GRANULARITIES = ["per_tensor", "per_channel", "per_group", "per_group_float32"]


def packed(granularity: str = "per_tensor", out_features: int = 9) -> tuple[Tensor, ...]:
    """A packed weight, its scale, and multipliers of groups of several sizes, if it has any."""
    sizes = torch.rand(out_features, 2).repeat_interleave(64, 1)
    return ops.pack_weight(torch.randn(out_features, 128) * sizes, granularity, 64)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_opcheck_of_the_simple_ops(backend: str, granularity: str) -> None:
    graphs = backend == "cpu"
    qweight, scale, *rest = packed(granularity)
    opcheck(OPS.pack_weight.default, (torch.randn(9, 128), granularity, 64), graphs=graphs)
    for name in ("absmean", "twn"):
        args = (torch.randn(9, 128), name, granularity, 64)
        opcheck(OPS.estimate.default, args, graphs=graphs)
    args = (qweight, scale, 9, torch.bfloat16, *rest)
    opcheck(OPS.unpack_weight.default, args, graphs=graphs)
    dy = torch.randn(2, 3, 9)
    args = (dy, qweight, scale, 9, torch.bfloat16, *rest)
    opcheck(OPS.input_gradient.default, args, graphs=graphs)


def test_opcheck_of_the_ops_without_granularity(backend: str) -> None:
    graphs = backend == "cpu"
    x, codes = torch.randn(2, 3, 128), torch.randint(-128, 128, (3, 128), dtype=torch.int8)
    opcheck(OPS.quantize_activation.default, (x, True), graphs=graphs)
    opcheck(OPS.matmul.default, (codes, packed()[0], 9), graphs=graphs)
    weight, row_scale = torch.randint(-127, 128, (5, 128), dtype=torch.int8), torch.rand(5)
    args = (x, weight, row_scale, None, torch.float32)
    opcheck(OPS.linear_int8.default, args, graphs=graphs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_opcheck_of_the_linear_ops(backend: str, granularity: str, activation: str) -> None:
    """Graphs of every granularity with every activation, and of each of them with every bias."""
    turn = GRANULARITIES.index(granularity) + ACTIVATIONS.index(activation)
    qweight, scale, *rest = packed(granularity)
    x = torch.randn(2, 3, 128, requires_grad=True)
    weight = torch.randn(9, 128, requires_grad=True)
    learned = torch.randn(9, requires_grad=True)
    for number, bias in enumerate((None, torch.randn(9), learned)):
        args = (x, qweight, scale, bias, 9, activation, torch.float32, *rest)
        opcheck(OPS.linear.default, args, graphs=backend == "cpu" and turn % 3 == number)
    for number, bias in enumerate((None, learned)):
        args = (x, weight, bias, granularity, 64, activation, torch.float32)
        opcheck(OPS.qat_linear.default, args, graphs=backend == "cpu" and turn % 2 == number)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_group", "per_group_float32"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("tokens", [5, 130])
def test_straight_through_gradients(
    backend: str, tokens: int, activation: str, granularity: str
) -> None:
    """Many tokens pack the weight again in the backward pass."""
    x = torch.randn(tokens, 128, requires_grad=True)
    weight = torch.randn(9, 128, requires_grad=True)
    bias = torch.randn(9, requires_grad=True)
    dy = torch.randn(tokens, 9)
    ops.qat_linear(x, weight, bias, granularity, 64, activation).backward(dy)
    qweight, scale, *rest = ops.pack_weight(weight.detach(), granularity, 64)
    dense = ops.unpack_weight(qweight, scale, 9, torch.float64, *rest)
    x_hat = x.detach().double()
    if activation != "float":
        codes, x_scale = OPS.quantize_activation(x.detach(), activation == "int8_per_tensor")
        x_hat = codes.double() * x_scale.double()
    assert x.grad is not None
    assert weight.grad is not None
    assert bias.grad is not None
    # K (or M) products of float32, each and every sum rounded.
    torch.testing.assert_close(x.grad.double(), dy.double() @ dense, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), dy.double().t() @ x_hat, rtol=1e-5, atol=3e-5)
    torch.testing.assert_close(bias.grad.double(), dy.double().sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_group"])
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_input", [False, True])
def test_packed_linear_gives_gradients_to_its_input_and_bias(
    backend: str, bias_dtype: torch.dtype | None, of_input: bool, granularity: str
) -> None:
    qweight, scale, *rest = packed(granularity)
    x = torch.randn(2, 3, 128, requires_grad=of_input)
    dy = torch.randn(2, 3, 9)
    bias = None
    if bias_dtype is not None:
        bias = torch.randn(9).to(bias_dtype).requires_grad_()
    elif not of_input:
        assert not ops.linear(x, qweight, scale, None, 9, "int8_per_token", *rest).requires_grad
        return
    y = ops.linear(x, qweight, scale, bias, 9, "int8_per_token", *rest)
    y.backward(dy)
    with torch.no_grad():
        assert torch.equal(y, ops.linear(x, qweight, scale, bias, 9, "int8_per_token", *rest))
    if of_input:
        dense = ops.unpack_weight(qweight, scale, 9, torch.float64, *rest)
        assert x.grad is not None
        torch.testing.assert_close(x.grad.double(), dy.double() @ dense, rtol=1e-5, atol=1e-5)
    if bias is not None:
        assert bias.grad is not None
        exact = dy.double().sum((0, 1))
        torch.testing.assert_close(bias.grad, exact.to(bias.dtype), rtol=1e-2, atol=1e-5)
        if bias.dtype == torch.float32:
            torch.testing.assert_close(bias.grad.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_training_and_packed_forwards_are_equal(
    backend: str, num_threads: int, activation: str
) -> None:
    x, weight, bias = torch.randn(7, 128), torch.randn(70, 128), torch.randn(70)
    for granularity in GRANULARITIES:
        for group in (64, 128):
            trained = ops.qat_linear(x, weight, bias, granularity, group, activation)
            qweight, scale, *rest = ops.pack_weight(weight, granularity, group)
            packed_y = ops.linear(x, qweight, scale, bias, 70, activation, *rest)
            assert torch.equal(trained, packed_y)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_group"])
def test_autocast_decides_the_output_dtype(backend: str, granularity: str) -> None:
    qweight, scale, *rest = packed(granularity)
    x = torch.randn(5, 128, requires_grad=True)
    full = ops.linear(x, qweight, scale, None, 9, "int8_per_token", *rest)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = ops.linear(x, qweight, scale, None, 9, "int8_per_token", *rest)
        weight = torch.randn(9, 128, requires_grad=True)
        trained = ops.qat_linear(x, weight, None, granularity, 64, "int8_per_token")
        trained.float().sum().backward()
    assert half.dtype == trained.dtype == torch.bfloat16
    # x is quantized from float32, and the output is rounded once.
    assert torch.equal(half, full.bfloat16())
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("granularity", ["per_tensor", "per_group"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(backend: str, dynamic: bool, granularity: str) -> None:
    qweight, scale, *rest = packed(granularity)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        y = ops.linear(x, qweight, scale, None, 9, "int8_per_token", *rest)
        scales = ops.estimate(weight, "twn", granularity, 64)
        y = y + ops.qat_linear(x, weight, None, granularity, 64, "int8_per_token", *scales)
        return y + ops.qat_linear(x, weight, None, granularity, 64, "int8_per_token")

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
    for tokens in (3, 5):
        grads = []
        for run in (function, compiled):
            torch.manual_seed(1)
            x = torch.randn(tokens, 128, requires_grad=True)
            weight = torch.randn(9, 128, requires_grad=True)
            y = run(x, weight)
            y.sum().backward()
            grads.append((y, x.grad, weight.grad))
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs)


BAD_LINEAR: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": torch.zeros(2, 127)}, ArgumentError, r"x must be \[..., 128\]"),
    ({"x": torch.zeros(2, 128, dtype=torch.float64)}, ArgumentTypeError, "x must be float32"),
    ({"x": torch.zeros(2, 128, dtype=torch.int8)}, ArgumentTypeError, "x must be float32"),
    ({"x": torch.tensor(1.0)}, ArgumentError, "x must be"),
    (
        {"qweight": torch.zeros(2, 128, dtype=torch.uint8)},
        ArgumentError,
        r"qweight must be \[3, K\]",
    ),
    ({"qweight": torch.zeros(3, 128)}, ArgumentTypeError, "qweight must be torch.uint8"),
    ({"qweight": torch.zeros(3, 0, dtype=torch.uint8)}, ArgumentError, "qweight must be"),
    ({"scale": torch.ones(8)}, ArgumentError, "weight_scale must be"),
    ({"scale": torch.ones(9, 3)}, ArgumentError, "weight_scale must be"),
    ({"scale": torch.ones(1, dtype=torch.bfloat16)}, ArgumentTypeError, "weight_scale must be"),
    ({"bias": torch.zeros(8)}, ArgumentError, r"bias must be \[9\]"),
    ({"bias": torch.zeros(9, dtype=torch.int32)}, ArgumentTypeError, "bias must be float32"),
    ({"activation": "int4"}, ArgumentError, "activation must be one of"),
    ({"out_dtype": torch.float64}, ArgumentTypeError, "out_dtype must be"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_LINEAR)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_arguments_of_linear(
    device: str, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    """The fake and the real op refuse the same things with the same words."""
    qweight, scale, *_ = packed()
    args: dict[str, Any] = {
        "x": torch.zeros(2, 128),
        "qweight": qweight,
        "scale": scale,
        "bias": None,
        "out_features": 9,
        "activation": "int8_per_token",
        "out_dtype": torch.float32,
        **change,
    }
    moved = [v.to(device) if isinstance(v, Tensor) else v for v in args.values()]
    with pytest.raises(error, match=message):
        OPS.linear(*moved)


# With scales in two levels: the scale, multipliers, and what is wrong with them.
BAD_GROUPS: list[tuple[Tensor, Tensor, type[Exception], str]] = [
    (torch.ones(9), torch.ones(9, 2), ArgumentTypeError, r"multiplier must be torch\.uint8"),
    (torch.ones(9).double(), torch.ones(9, 2).byte(), ArgumentTypeError, "weight_scale must be"),
    (torch.ones(1), torch.ones(9, 2).byte(), ArgumentError, r"weight_scale must be \[9\] beside"),
    (torch.ones(9, 2), torch.ones(9, 2).byte(), ArgumentError, r"weight_scale must be \[9\] besi"),
    (torch.ones(9), torch.ones(9, 3).byte(), ArgumentError, r"multiplier must be \[9, 128 / group"),
    (torch.ones(9), torch.ones(8, 2).byte(), ArgumentError, "groups of 64 or 128, got .8, 2."),
    (torch.ones(9), torch.ones(18).byte(), ArgumentError, "groups of 64 or 128, got .18."),
    (torch.ones(9), torch.ones(9, 0).byte(), ArgumentError, "groups of 64 or 128, got .9, 0."),
]


@pytest.mark.parametrize(("scale", "multiplier", "error", "message"), BAD_GROUPS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_multipliers(
    device: str, scale: Tensor, multiplier: Tensor, error: type[Exception], message: str
) -> None:
    """Every op that takes them says the same."""
    qweight, scale = packed()[0].to(device), scale.to(device)
    multiplier = multiplier.to(device)
    x, dy = torch.zeros(2, 128, device=device), torch.zeros(2, 9, device=device)
    calls = {
        "linear": (x, qweight, scale, None, 9, "float", torch.float32, multiplier),
        "unpack_weight": (qweight, scale, 9, torch.float32, multiplier),
        "input_gradient": (dy, qweight, scale, 9, torch.float32, multiplier),
    }
    for name, args in calls.items():
        with pytest.raises(error, match=f"^bitlab::{name}: .*{message}"):
            getattr(OPS, name)(*args)
    if device == "cpu":
        with pytest.raises(error, match=message):
            PreparedLinear(qweight, scale, None, 9, "float", multiplier)


def test_groups_of_two_levels_are_of_64_or_128() -> None:
    for group in (0, 32, 192, 256):
        for device in ("cpu", "meta"):
            weight = torch.zeros(4, 768, device=device)
            with pytest.raises(ArgumentError, match=rf"one of \(64, 128\), got {group}"):
                OPS.pack_weight(weight, "per_group", group)
            with pytest.raises(ArgumentError, match=rf"one of \(64, 128\), got {group}"):
                OPS.estimate(weight, "absmax", "per_group", group)
    qweight, scale, none = OPS.pack_weight(torch.randn(4, 768), "per_group_float32", 192)
    assert (qweight.shape, scale.shape, none.shape) == ((1, 768), (4, 4), (0,))
    assert none.dtype == torch.uint8


def test_bad_weights() -> None:
    for shape in ((0, 4), (4, 0), (4,)):
        with pytest.raises(ArgumentError, match="N and K at least 1"):
            OPS.pack_weight(torch.zeros(shape), "per_tensor", 0)
    with pytest.raises(ArgumentTypeError, match=r"float32, bfloat16 or float16, got torch\.int8"):
        OPS.pack_weight(torch.zeros(4, 4, dtype=torch.int8), "per_tensor", 0)
    with pytest.raises(ArgumentError, match="multiple of group_size 64, got 100"):
        OPS.pack_weight(torch.zeros(4, 100), "per_group", 64)
    with pytest.raises(ArgumentError, match="at most 131071"):
        OPS.pack_weight(torch.zeros(1, 131072), "per_tensor", 0)


def test_bad_matmul_and_schemes() -> None:
    qweight, _ = packed()
    for device in ("cpu", "meta"):
        codes = torch.zeros(2, 100000, dtype=torch.int8, device=device)
        with pytest.raises(ArgumentError, match=r"codes must be \[\.\.\., 128\]"):
            OPS.matmul(codes, qweight.to(device), 9)
        with pytest.raises(ArgumentTypeError, match=r"codes must be torch\.int8"):
            OPS.matmul(torch.zeros(2, 128, device=device), qweight.to(device), 9)
        for shape in ((2, 0), ()):
            with pytest.raises(ArgumentError, match="K at least 1"):
                OPS.quantize_activation(torch.zeros(shape, device=device), False)
    with pytest.raises(ArgumentError, match="granularity must be one of"):
        OPS.pack_weight(torch.zeros(4, 64), "per_row", 0)
    with pytest.raises(ArgumentError, match="group_size must be a multiple of 64, got 5"):
        OPS.pack_weight(torch.zeros(4, 65), "per_group_float32", 5)


def test_outputs_are_contiguous_as_the_fakes_say(backend: str) -> None:
    weight, x = torch.randn(128, 9).t(), torch.randn(128, 5).t()
    for granularity in GRANULARITIES:
        opcheck(OPS.pack_weight.default, (weight, granularity, 64), graphs=False)
        qweight, scale, *rest = ops.pack_weight(weight, granularity, 64)
        args = (qweight, scale, 9, torch.float32, *rest)
        opcheck(OPS.unpack_weight.default, args, graphs=False)
        for activation in ACTIVATIONS:
            args = (x, qweight, scale, None, 9, activation, torch.float32, *rest)
            opcheck(OPS.linear.default, args, graphs=False)
    opcheck(OPS.quantize_activation.default, (x, False), graphs=False)
    codes = torch.randint(-9, 9, (128, 5), dtype=torch.int8).t()
    opcheck(OPS.matmul.default, (codes, qweight, 9), graphs=False)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_group"])
def test_empty_and_high_rank_inputs(backend: str, granularity: str) -> None:
    qweight, scale, *rest = packed(granularity)
    for shape in ((0, 128), (2, 0, 128), (128,), (2, 3, 4, 128)):
        y = ops.linear(torch.randn(shape), qweight, scale, None, 9, "int8_per_token", *rest)
        assert y.shape == (*shape[:-1], 9)
    weight = torch.randn(9, 128, requires_grad=True)
    ops.qat_linear(
        torch.randn(0, 128), weight, None, granularity, 64, "int8_per_token"
    ).sum().backward()
    assert weight.grad is not None
    assert weight.grad.eq(0).all()


def test_tensors_on_two_devices_are_refused_before_any_kernel_sees_a_pointer() -> None:
    """The implementations themselves, as the dispatcher calls them for CPU and CUDA mixed."""
    x, codes = torch.randn(2, 64), torch.ones(2, 64, dtype=torch.int8)
    qweight, scale = ops.pack_weight(torch.randn(8, 64), "per_tensor", None)
    bias, rows = torch.zeros(8), torch.ones(8, 64, dtype=torch.int8)
    two_levels, multiplier = torch.ones(8), torch.ones(8, 1, dtype=torch.uint8).to("meta")
    calls = (
        (ops_ternary.linear, (x, qweight, scale, bias), (8, "int8_per_token", torch.float32)),
        (ops_ternary._matmul, (codes, qweight), (8,)),
        (ops_ternary._unpack_weight, (qweight, scale), (8, torch.float32)),
        (ops_ternary._input_gradient_op, (torch.randn(2, 8), qweight, scale), (8, torch.float32)),
        (ops_int8._linear_int8, (x, rows, torch.ones(8), bias), (torch.float32,)),
        (ops_qat._pack_codes, (torch.randn(8, 64), scale), ()),
    )
    for call, tensors, rest in calls:
        for index in range(1, len(tensors)):
            mixed = [t.to("meta") if i == index else t for i, t in enumerate(tensors)]
            with pytest.raises(ArgumentError, match="all tensors must be on cpu, got one on meta"):
                call(*mixed, *rest)
    for call, args in (
        (ops_ternary.linear, (x, qweight, two_levels, None, 8, "float", torch.float32)),
        (ops_ternary._unpack_weight, (qweight, two_levels, 8, torch.float32)),
        (
            ops_ternary._input_gradient_op,
            (torch.randn(2, 8), qweight, two_levels, 8, torch.float32),
        ),
        (PreparedLinear, (qweight, two_levels, None, 8, "int8_per_token")),
    ):
        with pytest.raises(ArgumentError, match="all tensors must be on cpu, got one on meta"):
            call(*args, multiplier)
    with pytest.raises(ArgumentError, match="all tensors must be on cpu, got one on meta"):
        PreparedLinear(qweight, scale, bias.to("meta"), 8, "int8_per_token")
