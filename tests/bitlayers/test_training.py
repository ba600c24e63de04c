from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitcore import BitQuantConfig
from bitcore.errors import ArgumentError, NonFiniteError
from bitlayers import BitLinear, set_quant_strength

GRANULARITIES = [("per_tensor", None), ("per_channel", None), ("per_group", 64)]


def make(name: str, granularity: str = "per_tensor", group: int | None = None) -> BitLinear:
    config = BitQuantConfig(weight_quantizer=name, weight_granularity=granularity, group_size=group)
    return BitLinear(128, 9, quant_config=config)


@pytest.mark.parametrize("name", ["absmean", "absmax", "twn", "lsq"])
@pytest.mark.parametrize(("granularity", "group"), GRANULARITIES)
def test_one_forward_in_every_state(name: str, granularity: str, group: int | None) -> None:
    layer, x = make(name, granularity, group), torch.randn(3, 128)
    trained = layer(x)
    trained.sum().backward()
    assert layer.weight.grad is not None
    assert torch.equal(layer.eval()(x), trained)
    assert torch.equal(layer.deploy()(x), trained)
    assert layer.learned_scale is None
    multiplier = {"qweight_multiplier"} if group else set()
    assert set(layer.state_dict()) == {"qweight", "qweight_scale", "bias"} | multiplier


def test_learned_scale_is_state_and_trains() -> None:
    layer, x = make("lsq"), torch.randn(3, 128)
    assert set(layer.state_dict()) == {"weight", "bias", "learned_scale"}
    torch.testing.assert_close(layer.learned_scale, 2 * layer.weight.abs().mean().view(1))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-2)
    before = layer.learned_scale.detach().clone()
    layer(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(layer.learned_scale, before)
    # The cache of eval mode follows the scale.
    first = layer.eval().qweight_scale
    with torch.no_grad():
        layer.learned_scale.mul_(2)
    torch.testing.assert_close(layer.qweight_scale, 2 * first)
    other = make("lsq")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.eval()(x), layer(x))
    # A float layer's state dict has none: the scale starts from the weight.
    linear = nn.Linear(128, 9)
    other.load_state_dict(linear.state_dict())
    torch.testing.assert_close(other.learned_scale, 2 * linear.weight.abs().mean().view(1))
    assert torch.equal(
        BitLinear.from_linear(linear, other.quant_config).learned_scale, other.learned_scale
    )


def test_learned_scale_stays_float32() -> None:
    layer = make("lsq")
    before = layer.learned_scale.detach().clone()
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.learned_scale, before)


@pytest.mark.parametrize("value", [0.0, -0.5])
@pytest.mark.parametrize(("granularity", "group"), GRANULARITIES)
def test_a_scale_that_fell_below_zero_is_deployed_as_it_ran(
    value: float, granularity: str, group: int | None
) -> None:
    layer = make("lsq", granularity, group)
    with torch.no_grad():
        layer.learned_scale[..., :1] = value
    x = torch.randn(3, 128)
    trained = layer(x).detach()
    latent = layer.eval()(x)
    assert torch.equal(trained, latent)
    layer.deploy()
    assert torch.equal(layer(x), latent)
    assert bool(latent.isfinite().all())


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_bad_learned_scale_is_not_deployed(value: float) -> None:
    layer = make("lsq")
    with torch.no_grad():
        layer.learned_scale.fill_(value)
    layer(torch.randn(3, 128)).sum().backward()
    with pytest.raises(NonFiniteError, match=r"learned_scale must be finite, got"):
        layer.deploy()
    assert not layer.is_deployed


def mixed(layer: BitLinear, x: Tensor, s: float) -> Tensor:
    codes, scale = torch.ops.bitlab.quantize_activation(x, False)
    w = layer.weight
    x = x + s * (codes.float() * scale - x)
    w = w + s * (layer.dequantized_weight() - w)
    return F.linear(x, w, layer.bias)


@pytest.mark.parametrize("name", ["absmean", "twn", "lsq"])
def test_quantization_strength(name: str) -> None:
    layer, x = make(name, "per_group", 64), torch.randn(3, 128, requires_grad=True)
    full = layer(x)
    set_quant_strength(layer, 0.25)
    y = layer(x)
    layer.eval()
    torch.testing.assert_close(y, mixed(layer, x, 0.25))
    # Evaluation is always quantized in full.
    assert torch.equal(layer(x), full)
    layer.train()
    y.sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is not None
    if name == "lsq":
        assert layer.learned_scale.grad is not None
    else:
        torch.testing.assert_close(
            layer.weight.grad, torch.ones(9, 3) @ mixed_input(x.detach(), 0.25)
        )
    set_quant_strength(layer, 0)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    set_quant_strength(layer, 1.0)
    assert torch.equal(layer(x), full)
    assert "quant_strength" not in layer.state_dict()
    layer.deploy()
    assert torch.equal(layer(x), full)


def mixed_input(x: Tensor, s: float) -> Tensor:
    codes, scale = torch.ops.bitlab.quantize_activation(x, False)
    return x + s * (codes.float() * scale - x)


@pytest.mark.parametrize("value", [-0.1, 1.5, True, "1", float("nan")])
def test_strength_is_checked(value: object) -> None:
    with pytest.raises(ArgumentError, match="value must be a number from 0 to 1"):
        set_quant_strength(make("absmean"), value)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="must hold quantized layers"):
        set_quant_strength(nn.Linear(2, 2), 1.0)
