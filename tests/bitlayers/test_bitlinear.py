from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from bitcore import BitQuantConfig
from bitcore.errors import ArgumentError, ArgumentTypeError
from bitlayers import LAYER_REGISTRY, BitLayerBase, BitLinear, register_layer


def test_is_a_linear_and_a_bit_layer() -> None:
    layer = BitLinear(512, 256)
    assert isinstance(layer, nn.Linear)
    assert isinstance(layer, BitLayerBase)
    assert (layer.in_features, layer.out_features, layer.use_bias) == (512, 256, True)
    assert layer.quant_config == BitQuantConfig()


def test_without_bias() -> None:
    layer = BitLinear(16, 8, bias=False)
    assert layer.bias is None
    assert not layer.use_bias
    assert set(layer.state_dict()) == {"weight"}
    assert set(layer.deploy().state_dict()) == {"qweight", "qweight_scale"}


def test_device_and_dtype() -> None:
    layer = BitLinear(16, 8, device="meta", dtype=torch.bfloat16)
    assert layer.weight.is_meta
    assert layer.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("method", "bound"),
    [("xavier_uniform", math.sqrt(6 / (400 + 100))), ("kaiming_uniform", math.sqrt(1 / 400))],
)
def test_init_methods(method: str, bound: float) -> None:
    weight = BitLinear(400, 100, init_method=method).weight
    # 40,000 uniform samples come within a thousandth of their bound, and never above it.
    assert weight.abs().max() <= bound
    assert weight.abs().max() > 0.999 * bound


def test_from_linear_shares_everything() -> None:
    linear = nn.Linear(64, 32, dtype=torch.bfloat16).eval()
    config = BitQuantConfig(weight_granularity="per_channel")
    layer = BitLinear.from_linear(linear, config)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert layer.quant_config == config
    assert not layer.training
    assert layer.latent_dtype == torch.bfloat16
    assert BitLinear.from_linear(nn.Linear(64, 32, bias=False)).bias is None


def test_from_linear_refuses_other_things() -> None:
    for other in (nn.Conv1d(1, 1, 1), BitLinear(8, 8)):
        with pytest.raises(ArgumentTypeError, match="must be a plain nn.Linear"):
            BitLinear.from_linear(other)  # type: ignore[arg-type]


def test_it_learns() -> None:
    """A few hundred steps of straight-through training fit a ternary teacher."""
    teacher = BitLinear(32, 16, bias=False)
    student = BitLinear(32, 16, bias=False)
    with torch.no_grad():
        teacher.weight.copy_(torch.randint(-1, 2, (16, 32)).float())
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    losses = []
    for _ in range(300):
        x = torch.randn(64, 32)
        loss = (student(x) - teacher(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_the_bias_of_a_deployed_layer_can_be_trained() -> None:
    layer, x = BitLinear(30, 7), torch.randn(5, 30)
    torch.nn.init.normal_(layer.bias)
    layer.deploy()
    expected = layer(x)
    layer(x.requires_grad_()).sum().backward()
    assert layer.bias.grad is None
    layer.bias.requires_grad_()
    for one in (x.detach(), x):
        layer.bias.grad = None
        y = layer(one)
        assert torch.equal(y, expected)
        y.sum().backward()
        assert torch.equal(layer.bias.grad, torch.full((len(layer.bias),), float(len(x))))
    with torch.no_grad():
        layer.bias.add_(1)
        moved = layer(x)
    assert torch.equal(moved, layer(x))
    assert not torch.equal(moved, expected)


def test_registry() -> None:
    assert LAYER_REGISTRY["BitLinear"] is BitLinear
    assert register_layer("BitLinear")(BitLinear) is BitLinear
    with pytest.raises(ValueError, match="belongs to bitlayers.bitlinear.BitLinear"):

        @register_layer("BitLinear")
        class Other(BitLinear):
            pass

    with pytest.raises(TypeError, match="subclass of BitLayerBase"):
        register_layer("Plain")(nn.Linear)  # type: ignore[type-var]
    for name in ("", 3):
        with pytest.raises(ValueError, match="non-empty string"):
            register_layer(name)  # type: ignore[arg-type]
    assert "Plain" not in LAYER_REGISTRY


def test_compiled_layer_equals_eager() -> None:
    layer = BitLinear(64, 32)
    x = torch.randn(5, 64)
    compiled = torch.compile(layer, fullgraph=True)
    for mode in (True, False):
        layer.train(mode)
        assert torch.equal(compiled(x), layer(x))
    with torch.no_grad():
        layer.weight.neg_()
    assert torch.equal(compiled(x), layer(x))
    layer.deploy()
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))


def test_what_a_compiled_deployed_layer_looks_at() -> None:
    """Weights that a CUDA graph reads where they are, and guards that end at the modules."""
    model = nn.Sequential(BitLinear(64, 16), BitLinear(16, 8, bias=False))
    for layer in model:
        layer.deploy()
    kinds: list[str | None] = []

    def look(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        places = [node for node in graph.graph.nodes if node.op == "placeholder"]
        assert len(places) == len(inputs)
        kinds.extend(place.meta["tensor_dict"].get("_dynamo_static_input_type") for place in places)
        return graph

    def run(x: torch.Tensor) -> Any:
        return model(x)

    x = torch.randn(3, 64)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(torch.compile(run, fullgraph=True, backend=look)(x), expected)
    # x itself, then qweight, qweight_scale and bias of the layers.
    assert sorted(kind is None for kind in kinds) == [False] * 5 + [True]
    entries = torch._dynamo.eval_frame._debug_get_cache_entry_list(run.__code__)
    guards = str(entries[0].guard_manager)
    assert "qweight_scale" in guards
    assert "quant_config" not in guards


BAD_ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"in_features": 0}, ArgumentError, "in_features must be an int of at least 1, got 0"),
    ({"out_features": -3}, ArgumentError, "out_features"),
    ({"in_features": 8.0}, ArgumentError, "in_features"),
    ({"in_features": 131072}, ArgumentError, "at most 131071"),
    ({"init_method": "zeros"}, ArgumentError, "'kaiming_uniform', 'xavier_uniform'"),
    ({"quant_config": {"weight_granularity": "per_tensor"}}, ArgumentTypeError, "BitQuantConfig"),
    (
        {"quant_config": BitQuantConfig(weight_granularity="per_group", group_size=64)},
        ArgumentError,
        "multiple of group_size 64, got 100",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BitLinear(**{"in_features": 100, "out_features": 8, **change})
