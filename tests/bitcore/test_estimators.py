from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bitcore import BitQuantConfig, estimators, ops, register_estimator
from bitcore.errors import ArgumentError, ConfigError
from bitcore.estimators import ESTIMATORS
from bitcore.quantize import dequantize, group_scale, ternarize, two_levels
from tests.bitcore.opcheck import opcheck

GRANULARITIES = ["per_tensor", "per_channel", "per_group_float32"]
GROUPED = ["per_group", "per_group_float32"]
# Of steps.
SHAPES = {
    "per_tensor": (1,),
    "per_channel": (9,),
    "per_group": (9, 2),
    "per_group_float32": (9, 2),
}


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


@pytest.mark.parametrize("name", ["absmean", "absmax", "twn", "lsq"])
def test_two_levels_of_scales(name: str, backend: str) -> None:
    """What float scales of groups come to: the step too, where the estimator has one for both."""
    weight = torch.randn(9, 1152) * torch.rand(9, 18).repeat_interleave(64, 1)
    step, scale, multiplier = ops.estimate(weight, name, "per_group", 64)
    float_step, float_scale = ops.estimate(weight, name, "per_group_float32", 64)
    row, expected = two_levels(float_scale)
    assert torch.equal(scale, row)
    assert torch.equal(multiplier, expected)
    assert multiplier.unique().numel() > 20
    own_step = float_step if name == "twn" else group_scale(row, expected)
    assert torch.equal(step, own_step)
    if name == "absmean":
        # The packer's own, in one pass.
        qweight, packed_scale, packed_multiplier = ops.pack_weight(weight, "per_group", 64)
        assert torch.equal(packed_scale, scale)
        assert torch.equal(packed_multiplier, multiplier)
        assert torch.equal(qweight, ops.pack_codes(weight, step))


@pytest.mark.parametrize("name", ["absmean", "absmax", "twn", "lsq"])
def test_nan_spoils_its_row_of_groups_only(name: str, backend: str) -> None:
    weight = torch.randn(9, 128)
    weight[1], weight[2, 3], weight[4, 100] = 0, math.nan, math.inf
    step, scale, multiplier = ops.estimate(weight, name, "per_group", 64)
    bad = torch.tensor([row in (2, 4) for row in range(9)])
    assert torch.equal(scale.isnan(), bad)
    assert multiplier[bad].eq(1).all()
    assert multiplier[~bad].amax(1).eq(127).all()
    assert (step[~bad] > 0).all()
    # A step of its own is NaN where its group is.
    assert torch.equal(step.isnan().any(1), bad)


def test_absmax_reads_ternary_weights_exactly() -> None:
    codes, scale = torch.randint(-1, 2, (9, 128), dtype=torch.int8), torch.rand(9, 2) + 0.1
    weight = dequantize(codes, scale, torch.float32)
    step, again = ops.estimate(weight, "absmax", "per_group_float32", 64)
    assert torch.equal(again, scale)
    assert torch.equal(ternarize(weight, step), codes)


@pytest.mark.parametrize("group", [64, 128])
def test_absmax_reads_ternary_weights_of_two_levels(group: int) -> None:
    """Codes and multipliers exactly; the scale to its last place, as ``127 scale`` is rounded."""
    codes = torch.randint(-1, 2, (2000, 5 * group), dtype=torch.int8)
    row, multiplier = two_levels(torch.rand(2000, 5) + 1e-3)
    weight = dequantize(codes, row, torch.float32, multiplier)
    step, again, multiplier_again = ops.estimate(weight, "absmax", "per_group", group)
    assert torch.equal(multiplier_again, multiplier)
    assert torch.equal(ternarize(weight, step), codes)
    off = again.view(torch.int32) - row.view(torch.int32)
    assert int(off.abs().max()) <= 1
    assert float((off == 0).float().mean()) > 0.97
    # From then on nothing changes where nothing did.
    kept = off == 0
    assert torch.equal(dequantize(codes, again, torch.float32, multiplier)[kept], weight[kept])


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
        opcheck(torch.ops.bitlab.pack_codes.default, (weight, step), graphs=backend == "cpu")
        codes = ops.unpack_weight(ops.pack_codes(weight, step), torch.ones(1), 9, torch.float32)
        assert torch.equal(codes, ternarize(weight, step).float())
    with pytest.raises(ArgumentError, match=r"step must be \[1\], \[9\]"):
        ops.pack_codes(weight, torch.ones(3))


@pytest.mark.parametrize("granularity", [*GRANULARITIES, "per_group"])
@pytest.mark.parametrize("activation", ["int8_per_token", "float"])
def test_gradients_of_a_learned_scale(backend: str, granularity: str, activation: str) -> None:
    x, dy = torch.randn(5, 128), torch.randn(5, 9)
    weight = torch.randn(9, 128, requires_grad=True)
    scale = (torch.rand(SHAPES[granularity]) + 0.3).requires_grad_()
    args = (x, weight, None, granularity, 64, activation, torch.float32, None, scale)
    opcheck(torch.ops.bitlab.qat_linear.default, args, graphs=backend == "cpu")
    ops.qat_linear(x, weight, None, granularity, 64, activation, None, scale).backward(dy)
    assert weight.grad is not None
    assert scale.grad is not None
    x_hat = x.double()
    if activation != "float":
        codes, x_scale = torch.ops.bitlab.quantize_activation(x, False)
        x_hat = codes.double() * x_scale
    g = dy.double().t() @ x_hat
    # In two levels the step is what these come to; the scale's gradient passes their rounding.
    step = estimators.learned_scales(scale.detach(), granularity)[0]
    assert torch.equal(step, scale) == (granularity != "per_group")
    v = groups_of(weight.detach().double(), granularity) / step.double().view(-1, 1)
    g, inside = groups_of(g, granularity), v.abs() < 1.5
    q = v.round().clamp(-1, 1)
    expected = (g * torch.where(inside, q - v, q)).sum(1) / v.shape[1] ** 0.5
    torch.testing.assert_close(scale.grad.double().flatten(), expected, rtol=1e-4, atol=1e-4)
    kept = torch.where(inside, g, 0.0).view(9, 128)
    torch.testing.assert_close(weight.grad.double(), kept, rtol=1e-4, atol=1e-4)
    # The same formulas, by autograd.
    other, own = weight.detach().requires_grad_(), scale.detach().requires_grad_()
    mixed = estimators.learned_weight(other, own, granularity)
    (x_hat.float() @ mixed.t()).backward(dy)
    assert other.grad is not None
    assert own.grad is not None
    torch.testing.assert_close(other.grad, weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(own.grad, scale.grad, rtol=1e-4, atol=1e-4)


def test_a_learned_scale_trains_deployed_bits(backend: str) -> None:
    """The forward of training is that of what is packed from the Parameter."""
    x, weight, learned = torch.randn(5, 128), torch.randn(9, 128), torch.rand(9, 2) + 0.1
    learned[3], learned[4, 1], learned[5] = 1e-7, -0.2, torch.tensor([1.0, 1e-3])
    for granularity in GROUPED:
        trained = ops.qat_linear(x, weight, None, granularity, 64, "int8_per_token", None, learned)
        step, scale, multiplier = estimators.learned_scales(learned, granularity)
        assert (multiplier is None) == (granularity == "per_group_float32")
        qweight = ops.pack_codes(weight, step)
        packed = ops.linear(x, qweight, scale, None, 9, "int8_per_token", multiplier)
        assert torch.equal(trained, packed)


@pytest.mark.parametrize("granularity", ["per_channel", *GROUPED])
@pytest.mark.parametrize("tokens", [5, 130])
def test_constant_scales_pass_gradients_straight_through(
    backend: str, granularity: str, tokens: int
) -> None:
    x, dy = torch.randn(tokens, 128, requires_grad=True), torch.randn(tokens, 9)
    weight = torch.randn(9, 128, requires_grad=True)
    group = 64 if granularity in GROUPED else 0
    scales = ops.estimate(weight, "twn", granularity, group)
    step, scale, *multiplier = scales
    args = (x, weight, None, granularity, group, "int8_per_token", torch.float32, *scales)
    opcheck(torch.ops.bitlab.qat_linear.default, args, graphs=backend == "cpu")
    y = ops.qat_linear(x, weight, None, granularity, group, "int8_per_token", *scales)
    y.backward(dy)
    qweight = ops.pack_codes(weight.detach(), step)
    assert torch.equal(y, ops.linear(x, qweight, scale, None, 9, "int8_per_token", *multiplier))
    codes, x_scale = torch.ops.bitlab.quantize_activation(x.detach(), False)
    torch.testing.assert_close(weight.grad, dy.t() @ (codes.float() * x_scale))
    dense = ops.unpack_weight(qweight, scale, 9, torch.float64, *multiplier)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), dy.double() @ dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [True, False])
def test_mixed_weights_whose_rows_repeat_and_whose_scales_lie_across(rows: bool) -> None:
    """Any layout of either: products of the two may lie so that they cannot be viewed as [N, K]."""
    repeated = torch.randn((1, 192) if rows else (15, 1)).expand(15, 192)
    across = (torch.rand(3, 15) + 0.1).t()
    weight = estimators.learned_weight(repeated, across, "per_group")
    plain = repeated.contiguous(), across.contiguous()
    assert torch.equal(weight, estimators.learned_weight(*plain, "per_group"))


def test_scales_that_do_not_belong_together() -> None:
    x, weight = torch.randn(5, 128), torch.randn(9, 128)
    step, scale, multiplier = ops.estimate(weight, "twn", "per_group", 64)
    calls: list[tuple[tuple[Tensor | None, ...], str]] = [
        ((step, None, None), "scale must be given with a step, got None"),
        ((None, None, multiplier), "scale must be given with multipliers, got None"),
        ((None, scale, multiplier), "step must be given with multipliers, got None"),
        ((step, step, multiplier), r"weight_scale must be \[9\] beside multipliers"),
        ((step, scale, multiplier[:, :1].contiguous()[:5]), r"multiplier must be \[9, 128 / group"),
    ]
    for device in ("cpu", "meta"):
        for scales, message in calls:
            moved = [one if one is None else one.to(device) for one in scales]
            with pytest.raises(ArgumentError, match=message):
                ops.qat_linear(
                    x.to(device), weight.to(device), None, "per_group", 64, "float", *moved
                )


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
