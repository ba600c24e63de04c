"""Layers whose groups have scales in two levels: three tensors wherever others have two."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitcore import BitQuantConfig
from bitcore.quantize import group_scale, ternarize, two_levels, weight_scale
from bitlayers import BitLinear
from bitlayers.checks import multiplier_problem
from bitlayers.rmsnorm import RMSNormBitLinear

GROUPS = BitQuantConfig(weight_granularity="per_group", group_size=64)
PACKED = ("qweight", "qweight_scale", "qweight_multiplier")


@pytest.fixture
def layer() -> BitLinear:
    return BitLinear(192, 30, quant_config=GROUPS)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 192)


def test_what_a_layer_holds(layer: BitLinear) -> None:
    weight = layer.weight.detach().clone()
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert not hasattr(layer, "qweight_multiplier")
    served = [getattr(layer.eval(), name) for name in PACKED]
    assert set(layer.state_dict()) == {"weight", "bias"}
    layer.deploy()
    assert set(layer.state_dict()) == {*PACKED, "bias"}
    assert set(dict(layer.named_buffers())) == set(PACKED[1:])
    held = layer.packed()
    assert layer.packed_tensors() == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in zip(PACKED, held, strict=True)
    }
    assert all(torch.equal(*pair) for pair in zip(held, served, strict=True))
    row, multiplier = two_levels(weight_scale(weight, "per_group", 64))
    assert torch.equal(layer.qweight_scale, row)
    assert torch.equal(layer.qweight_multiplier, multiplier)
    codes = ternarize(weight, group_scale(row, multiplier))
    values = codes * multiplier.repeat_interleave(64, 1)
    assert torch.equal(layer.dequantized_weight(), values.float() * row.unsqueeze(1))
    assert int(multiplier.max()) == 127


def test_other_layers_have_no_multiplier() -> None:
    other = BitQuantConfig(
        weight_granularity="per_group", group_size=64, group_scale_dtype="float32"
    )
    for config in (BitQuantConfig(), BitQuantConfig(weight_granularity="per_channel"), other):
        layer = BitLinear(128, 8, quant_config=config).eval()
        for _ in range(2):
            assert not hasattr(layer, "qweight_multiplier")
            assert len(layer.packed()) == 2
            layer.deploy() if not layer.is_deployed else None
        with pytest.raises(AttributeError, match="qweight_multiplier"):
            layer.qweight_multiplier  # noqa: B018


def test_skeleton(layer: BitLinear, x: Tensor) -> None:
    skeleton = BitLinear.packed_skeleton(192, 30, bias=True, quant_config=GROUPS, device="cpu")
    expected = layer.deploy()(x)
    skeleton.load_state_dict(layer.state_dict())
    assert torch.equal(skeleton(x), expected)
    meta = BitLinear.packed_skeleton(192, 30, bias=True, quant_config=GROUPS)
    assert meta.qweight_multiplier.is_meta
    assert meta(torch.empty(3, 192, device="meta")).shape == (3, 30)


@pytest.mark.parametrize("kind", [BitLinear, RMSNormBitLinear])
def test_copies_and_moves(kind: type[BitLinear], x: Tensor) -> None:
    layer = kind(192, 30, quant_config=GROUPS).deploy()
    expected = layer(x)
    multiplier = layer.qweight_multiplier.clone()
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(saved, weights_only=False),
    ):
        assert torch.equal(other(x), expected)
        assert other.qweight_multiplier.data_ptr() != layer.qweight_multiplier.data_ptr()
    for move in (layer.half, layer.double, lambda: layer.to("cpu", torch.bfloat16), layer.float):
        move()
        assert layer.qweight_multiplier.dtype == torch.uint8
        assert layer.qweight_scale.dtype == torch.float32
        assert torch.equal(layer.qweight_multiplier, multiplier)
    assert layer.to("meta").qweight_multiplier.is_meta


def test_the_deployed_layer_follows_its_buffers(layer: BitLinear, x: Tensor) -> None:
    first = layer.deploy()(x)
    other = BitLinear(192, 30, quant_config=GROUPS).deploy()
    layer.load_state_dict(other.state_dict())
    # Nothing prepared of the tensors before is used.
    assert torch.equal(layer(x), other(x))
    assert not torch.equal(layer(x), first)
    layer.qweight_multiplier = other.qweight_multiplier.flip(1).contiguous()
    assert not torch.equal(layer(x), other(x))


def test_a_compiled_layer(layer: BitLinear, x: Tensor) -> None:
    layer.deploy()
    compiled = torch.compile(layer, fullgraph=True)
    for tokens in (x, x[:1], torch.randn(40, 192)):
        assert torch.equal(compiled(tokens), layer(tokens))
    leaf = x.clone().requires_grad_()
    compiled(leaf).sum().backward()
    wanted = x.clone().requires_grad_()
    layer(wanted).sum().backward()
    assert torch.equal(leaf.grad, wanted.grad)


def test_a_compiled_layer_in_training(x: Tensor) -> None:
    layers = [BitLinear(192, 30, quant_config=GROUPS) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    plain, compiled = layers[0], torch.compile(layers[1], fullgraph=True)
    assert torch.equal(compiled(x), plain(x))
    for one in (plain, compiled):
        one(x).square().sum().backward()
    assert torch.equal(layers[0].weight.grad, layers[1].weight.grad)
    assert torch.equal(torch.compile(layers[1].eval(), fullgraph=True)(x), plain.eval()(x))


def test_gradient_of_the_input(layer: BitLinear, x: Tensor) -> None:
    x.requires_grad_()
    layer.deploy()(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(5, 30) @ layer.dequantized_weight())


def test_estimated_shape() -> None:
    shapes = [
        (BitQuantConfig(), (1,)),
        (BitQuantConfig(weight_granularity="per_channel"), (8,)),
        (GROUPS, (8, 2)),
        (BitQuantConfig(**{**GROUPS.to_dict(), "group_scale_dtype": "float32"}), (8, 2)),
    ]
    for config, shape in shapes:
        assert BitLinear(128, 8, quant_config=config).estimated_shape() == shape
        learned = BitQuantConfig(**{**config.to_dict(), "weight_quantizer": "lsq"})
        assert BitLinear(128, 8, quant_config=learned).learned_scale.shape == shape


def change(tensor: Tensor, index: Any, value: int) -> Tensor:
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


BAD = [
    (lambda m: change(m, (3, 1), 128), "qweight_multiplier must hold multipliers of 0 to 127, got"),
    (lambda m: change(m, 7, 0), "qweight_multiplier must hold .* in every row, got none in row 7"),
    (lambda m: m.to(torch.int8), r"qweight_multiplier must be torch.uint8, got torch.int8"),
    (lambda m: m[:, :2], "size mismatch for qweight_multiplier"),
    (lambda m: m.flatten(), "size mismatch for qweight_multiplier"),
    (lambda m: m[:0], "size mismatch for qweight_multiplier"),
]


@pytest.mark.parametrize(("damage", "message"), BAD)
def test_bad_multipliers_are_not_loaded(
    layer: BitLinear, x: Tensor, damage: Any, message: str
) -> None:
    expected = layer.deploy()(x)
    state = layer.state_dict()
    other = BitLinear(192, 30, quant_config=GROUPS).deploy()
    other.load_state_dict(state)
    damaged = {**state, "qweight_multiplier": damage(state["qweight_multiplier"])}
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=message):
            other.load_state_dict(damaged, strict=strict)
    assert torch.equal(other(x), expected)


def test_multipliers_of_zero_are_those_of_empty_groups(layer: BitLinear, x: Tensor) -> None:
    layer.deploy()
    state = layer.state_dict()
    zero = {**state, "qweight_multiplier": change(state["qweight_multiplier"], (4, 1), 0)}
    layer.load_state_dict(zero)
    assert not layer.dequantized_weight()[4, 64:128].any()
    exact = nn.functional.linear(x, layer.dequantized_weight(), layer.bias)
    torch.testing.assert_close(layer(x), exact, atol=0.1, rtol=0)


def test_state_dicts_of_other_scales_are_refused_even_if_not_strict(layer: BitLinear) -> None:
    channel = BitQuantConfig(weight_granularity="per_channel")
    deployed = BitLinear(192, 30, quant_config=channel).deploy()
    with pytest.raises(RuntimeError, match="two levels, but the layer's weights are per_channel"):
        deployed.load_state_dict(layer.deploy().state_dict(), strict=False)
    with pytest.raises(RuntimeError, match='Missing key.* "qweight_multiplier"'):
        layer.load_state_dict(deployed.state_dict())


def test_multiplier_problem() -> None:
    good = torch.tensor([[0, 127], [1, 0]], dtype=torch.uint8)
    assert multiplier_problem(good) is None
    assert "got 255" in str(multiplier_problem(change(good, (0, 0), 255)))
    assert "row 1" in str(multiplier_problem(change(good, 1, 0)))


def test_a_weight_with_nan_shows_and_is_not_deployed(layer: BitLinear, x: Tensor) -> None:
    with torch.no_grad():
        layer.weight[3, 70] = float("nan")
    for _ in range(2):
        y = layer(x)
        assert y[:, 3].isnan().all()
        assert not y[:, [0, 1, 2, *range(4, 30)]].isnan().any()
        layer.eval()
    assert layer.qweight_multiplier[3].tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="finite"):
        layer.deploy()
