from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bitcore import ops, ops_int8, ops_qat
from bitcore.errors import ArgumentError, ArgumentTypeError
from bitcore.prepared import PreparedLinear

OPS = torch.ops.bitlab
ACTIVATIONS = ["int8_per_token", "int8_per_tensor", "float"]


def packed(granularity: str = "per_tensor") -> tuple[Tensor, Tensor]:
    pair: tuple[Tensor, Tensor] = OPS.pack_weight(torch.randn(9, 128), granularity, 64)
    return pair


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
def test_opcheck_of_the_simple_ops(backend: str, granularity: str) -> None:
    qweight, scale = packed(granularity)
    torch.library.opcheck(OPS.pack_weight.default, (torch.randn(9, 128), granularity, 64))
    torch.library.opcheck(OPS.unpack_weight.default, (qweight, scale, 9, torch.bfloat16))
    torch.library.opcheck(OPS.quantize_activation.default, (torch.randn(2, 3, 128), True))
    codes = torch.randint(-128, 128, (3, 128), dtype=torch.int8)
    torch.library.opcheck(OPS.matmul.default, (codes, qweight, 9))
    dy = torch.randn(2, 3, 9)
    torch.library.opcheck(OPS.input_gradient.default, (dy, qweight, scale, 9, torch.bfloat16))
    weight, row_scale = torch.randint(-127, 128, (5, 128), dtype=torch.int8), torch.rand(5)
    x = torch.randn(2, 3, 128)
    torch.library.opcheck(OPS.linear_int8.default, (x, weight, row_scale, None, torch.float32))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
def test_opcheck_of_the_linear_ops(backend: str, granularity: str, activation: str) -> None:
    qweight, scale = packed(granularity)
    x = torch.randn(2, 3, 128, requires_grad=True)
    weight = torch.randn(9, 128, requires_grad=True)
    for bias in (None, torch.randn(9)):
        args = (x, qweight, scale, bias, 9, activation, torch.float32)
        torch.library.opcheck(OPS.linear.default, args)
        if bias is not None:
            bias.requires_grad_()
            torch.library.opcheck(OPS.linear.default, args)
        args = (x, weight, bias, granularity, 64, activation, torch.float32)
        torch.library.opcheck(OPS.qat_linear.default, args)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_straight_through_gradients(backend: str, activation: str) -> None:
    x = torch.randn(5, 128, requires_grad=True)
    weight = torch.randn(9, 128, requires_grad=True)
    bias = torch.randn(9, requires_grad=True)
    dy = torch.randn(5, 9)
    ops.qat_linear(x, weight, bias, "per_tensor", None, activation).backward(dy)
    qweight, scale = ops.pack_weight(weight.detach(), "per_tensor", None)
    dense = ops.unpack_weight(qweight, scale, 9, torch.float64)
    x_hat = x.detach().double()
    if activation != "float":
        codes, x_scale = OPS.quantize_activation(x.detach(), activation == "int8_per_tensor")
        x_hat = codes.double() * x_scale.double()
    assert x.grad is not None
    assert weight.grad is not None
    assert bias.grad is not None
    # K (or M) products of float32, each and every sum rounded.
    torch.testing.assert_close(x.grad.double(), dy.double() @ dense, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), dy.double().t() @ x_hat, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias.grad.double(), dy.double().sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_input", [False, True])
def test_packed_linear_gives_gradients_to_its_input_and_bias(
    backend: str, bias_dtype: torch.dtype | None, of_input: bool
) -> None:
    qweight, scale = packed()
    x = torch.randn(2, 3, 128, requires_grad=of_input)
    dy = torch.randn(2, 3, 9)
    bias = None
    if bias_dtype is not None:
        bias = torch.randn(9).to(bias_dtype).requires_grad_()
    elif not of_input:
        assert not ops.linear(x, qweight, scale, None, 9, "int8_per_token").requires_grad
        return
    y = ops.linear(x, qweight, scale, bias, 9, "int8_per_token")
    y.backward(dy)
    with torch.no_grad():
        assert torch.equal(y, ops.linear(x, qweight, scale, bias, 9, "int8_per_token"))
    if of_input:
        dense = ops.unpack_weight(qweight, scale, 9, torch.float64)
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
    for granularity, group in (("per_tensor", None), ("per_channel", None), ("per_group", 64)):
        trained = ops.qat_linear(x, weight, bias, granularity, group, activation)
        qweight, scale = ops.pack_weight(weight, granularity, group)
        assert torch.equal(trained, ops.linear(x, qweight, scale, bias, 70, activation))


def test_autocast_decides_the_output_dtype(backend: str) -> None:
    qweight, scale = packed()
    x = torch.randn(5, 128, requires_grad=True)
    full = ops.linear(x, qweight, scale, None, 9, "int8_per_token")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = ops.linear(x, qweight, scale, None, 9, "int8_per_token")
        weight = torch.randn(9, 128, requires_grad=True)
        trained = ops.qat_linear(x, weight, None, "per_tensor", None, "int8_per_token")
        trained.float().sum().backward()
    assert half.dtype == trained.dtype == torch.bfloat16
    # x is quantized from float32, and the output is rounded once.
    assert torch.equal(half, full.bfloat16())
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(backend: str, dynamic: bool) -> None:
    qweight, scale = packed()

    def function(x: Tensor, weight: Tensor) -> Tensor:
        y = ops.linear(x, qweight, scale, None, 9, "int8_per_token")
        return y + ops.qat_linear(x, weight, None, "per_tensor", None, "int8_per_token")

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
    qweight, scale = packed()
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
        OPS.pack_weight(torch.zeros(4, 65), "per_group", 5)


def test_outputs_are_contiguous_as_the_fakes_say(backend: str) -> None:
    weight, x = torch.randn(128, 9).t(), torch.randn(128, 5).t()
    for granularity in ("per_tensor", "per_channel", "per_group"):
        torch.library.opcheck(OPS.pack_weight.default, (weight, granularity, 64))
        qweight, scale = OPS.pack_weight(weight, granularity, 64)
        torch.library.opcheck(OPS.unpack_weight.default, (qweight, scale, 9, torch.float32))
        for activation in ACTIVATIONS:
            args = (x, qweight, scale, None, 9, activation, torch.float32)
            torch.library.opcheck(OPS.linear.default, args)
    torch.library.opcheck(OPS.quantize_activation.default, (x, False))
    codes = torch.randint(-9, 9, (128, 5), dtype=torch.int8).t()
    torch.library.opcheck(OPS.matmul.default, (codes, qweight, 9))


def test_empty_and_high_rank_inputs(backend: str) -> None:
    qweight, scale = packed()
    for shape in ((0, 128), (2, 0, 128), (128,), (2, 3, 4, 128)):
        y = ops.linear(torch.randn(shape), qweight, scale, None, 9, "int8_per_token")
        assert y.shape == (*shape[:-1], 9)
    weight = torch.randn(9, 128, requires_grad=True)
    ops.qat_linear(
        torch.randn(0, 128), weight, None, "per_tensor", None, "int8_per_token"
    ).sum().backward()
    assert weight.grad is not None
    assert weight.grad.eq(0).all()


def test_tensors_on_two_devices_are_refused_before_any_kernel_sees_a_pointer() -> None:
    """The implementations themselves, as the dispatcher calls them for CPU and CUDA mixed."""
    x, codes = torch.randn(2, 64), torch.ones(2, 64, dtype=torch.int8)
    qweight, scale = ops.pack_weight(torch.randn(8, 64), "per_tensor", None)
    bias, rows = torch.zeros(8), torch.ones(8, 64, dtype=torch.int8)
    calls = (
        (ops._linear, (x, qweight, scale, bias), (8, "int8_per_token", torch.float32)),
        (ops._matmul, (codes, qweight), (8,)),
        (ops._unpack_weight, (qweight, scale), (8, torch.float32)),
        (ops._input_gradient_op, (torch.randn(2, 8), qweight, scale), (8, torch.float32)),
        (ops_int8._linear_int8, (x, rows, torch.ones(8), bias), (torch.float32,)),
        (ops_qat._pack_codes, (torch.randn(8, 64), scale), ()),
    )
    for call, tensors, rest in calls:
        for index in range(1, len(tensors)):
            mixed = [t.to("meta") if i == index else t for i, t in enumerate(tensors)]
            with pytest.raises(ArgumentError, match="all tensors must be on cpu, got one on meta"):
                call(*mixed, *rest)
    with pytest.raises(ArgumentError, match="all tensors must be on cpu, got one on meta"):
        PreparedLinear(qweight, scale, bias.to("meta"), 8, "int8_per_token")
