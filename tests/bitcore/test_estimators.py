from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bitcore import BitQuantConfig, estimators, ops, register_estimator
from bitcore.errors import ArgumentError, ConfigError
from bitcore.estimators import ESTIMATORS
from bitcore.quantize import dequantize, ternarize

GRANULARITIES = ["per_tensor", "per_channel", "per_group"]
SHAPES = {"per_tensor": (1,), "per_channel": (9,), "per_group": (9, 2)}


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    before = dict(ESTIMATORS)
    yield
    ESTIMATORS.clear()
    ESTIMATORS.update(before)


def groups_of(weight: Tensor, granularity: str) -> Tensor:
    return weight.reshape(
        {"per_tensor": (1, -1), "per_channel": (9, -1)}.get(granularity, (18, 64))
    )


@pytest.mark.parametrize("name", ["absmean", "absmax", "twn", "lsq"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_scales_are_the_formulas(name: str, granularity: str) -> None:
    weight = torch.randn(9, 128)
    step, scale = ops.estimate(weight, name, granularity, 64 if "group" in granularity else None)
    assert step.shape == scale.shape == SHAPES[granularity]
    most = groups_of(weight, granularity).double().abs()
    mean = most.mean(1)
    kept = most > 0.7 * mean.unsqueeze(1)
    expected = {
        "absmean": (mean, mean),
        "absmax": (most.amax(1), most.amax(1)),
        "twn": (1.4 * mean, (most * kept).sum(1) / kept.sum(1)),
        "lsq": (2 * mean, 2 * mean),
    }[name]
    for ours, theirs in zip((step, scale), expected, strict=True):
        torch.testing.assert_close(ours.flatten().double(), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["absmean", "absmax", "twn", "lsq"])
def test_odd_weights(name: str, num_threads: int) -> None:
    weight = torch.randn(9, 128)
    weight[1], weight[2, 3], weight[4, 5] = 0, math.nan, math.inf
    step, scale = ops.estimate(weight, name, "per_channel", None)
    assert step[[2, 4]].isnan().all()
    assert scale[[2, 4]].isnan().all()
    rest = [0, 1, 3, 5, 6, 7, 8]
    assert (step[rest] > 0).all()
    assert (scale[rest] > 0).all()
    assert ops.estimate(torch.randn(9, 128), name, "per_tensor", None)[0].isfinite().all()


def test_absmax_reads_ternary_weights_exactly() -> None:
    codes, scale = torch.randint(-1, 2, (9, 128), dtype=torch.int8), torch.rand(9, 2) + 0.1
    weight = dequantize(codes, scale, torch.float32)
    step, again = ops.estimate(weight, "absmax", "per_group", 64)
    assert torch.equal(again, scale)
    assert torch.equal(ternarize(weight, step), codes)


def test_twn_errs_less_than_absmean() -> None:
    weight = torch.randn(64, 256)
    errors = {}
    for name in ("absmean", "twn"):
        step, scale = ops.estimate(weight, name, "per_tensor", None)
        errors[name] = (dequantize(ternarize(weight, step), scale, torch.float32) - weight).norm()
    assert errors["twn"] < errors["absmean"]


def test_packing_with_a_step(backend: str) -> None:
    weight = torch.randn(9, 128)
    for shape in SHAPES.values():
        step = torch.rand(shape) + 0.5
        torch.library.opcheck(torch.ops.bitlab.pack_codes.default, (weight, step))
        codes = ops.unpack_weight(ops.pack_codes(weight, step), torch.ones(1), 9, torch.float32)
        assert torch.equal(codes, ternarize(weight, step).float())
    with pytest.raises(ArgumentError, match=r"step must be \[1\], \[9\]"):
        ops.pack_codes(weight, torch.ones(3))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("activation", ["int8_per_token", "float"])
def test_gradients_of_a_learned_scale(backend: str, granularity: str, activation: str) -> None:
    x, dy = torch.randn(5, 128), torch.randn(5, 9)
    weight = torch.randn(9, 128, requires_grad=True)
    scale = (torch.rand(SHAPES[granularity]) + 0.3).requires_grad_()
    args = (x, weight, None, granularity, 64, activation, torch.float32, None, scale)
    torch.library.opcheck(torch.ops.bitlab.qat_linear.default, args)
    ops.qat_linear(x, weight, None, granularity, 64, activation, None, scale).backward(dy)
    assert weight.grad is not None
    assert scale.grad is not None
    x_hat = x.double()
    if activation != "float":
        codes, x_scale = torch.ops.bitlab.quantize_activation(x, False)
        x_hat = codes.double() * x_scale
    g = dy.double().t() @ x_hat
    v = groups_of(weight.detach().double(), granularity) / scale.detach().double().view(-1, 1)
    g, inside = groups_of(g, granularity), v.abs() < 1.5
    q = v.round().clamp(-1, 1)
    expected = (g * torch.where(inside, q - v, q)).sum(1) / v.shape[1] ** 0.5
    torch.testing.assert_close(scale.grad.double().flatten(), expected, rtol=1e-4, atol=1e-4)
    kept = torch.where(inside, g, 0.0).view(9, 128)
    torch.testing.assert_close(weight.grad.double(), kept, rtol=1e-4, atol=1e-4)
    # The same formulas, by autograd.
    other, own = weight.detach().requires_grad_(), scale.detach().requires_grad_()
    mixed = estimators.learned_weight(other, own)
    (x_hat.float() @ mixed.t()).backward(dy)
    assert other.grad is not None
    assert own.grad is not None
    torch.testing.assert_close(other.grad, weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own.grad, scale.grad, rtol=1e-4, atol=1e-4)


def test_constant_scales_pass_gradients_straight_through(backend: str) -> None:
    x, dy = torch.randn(5, 128), torch.randn(5, 9)
    weight = torch.randn(9, 128, requires_grad=True)
    step, scale = ops.estimate(weight, "twn", "per_channel", None)
    args = (x, weight, None, "per_channel", 0, "int8_per_token", torch.float32, step, scale)
    torch.library.opcheck(torch.ops.bitlab.qat_linear.default, args)
    y = ops.qat_linear(x, weight, None, "per_channel", None, "int8_per_token", step, scale)
    y.backward(dy)
    qweight = ops.pack_codes(weight.detach(), step)
    assert torch.equal(y, ops.linear(x, qweight, scale, None, 9, "int8_per_token"))
    codes, x_scale = torch.ops.bitlab.quantize_activation(x, False)
    torch.testing.assert_close(weight.grad, dy.t() @ (codes.float() * x_scale))


def test_registry() -> None:
    @register_estimator("half")
    def half(groups: Tensor) -> tuple[Tensor, Tensor]:
        return groups.amax(1) / 2, groups.amax(1)

    assert BitQuantConfig(weight_quantizer="half").weight_quantizer == "half"
    step, scale = ops.estimate(torch.randn(9, 128), "half", "per_tensor", None)
    assert torch.equal(2 * step, scale)
    with pytest.raises(ArgumentError, match="must be new, got 'half'"):
        register_estimator("half")(half)
    with pytest.raises(ArgumentError, match="non-empty string"):
        register_estimator("")
    register_estimator("wrong")(lambda groups: (groups, groups))
    with pytest.raises(ArgumentError, match=r"must be \[1\], one a group"):
        ops.estimate(torch.randn(9, 128), "wrong", "per_tensor", None)
    with pytest.raises(ConfigError, match=r"one of \('absmean', 'absmax', 'twn', 'lsq'"):
        BitQuantConfig(weight_quantizer="unknown")
