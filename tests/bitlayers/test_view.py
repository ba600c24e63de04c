"""`weight` once the float weight is gone: a view that answers as the float layer's would."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitcore.config import BitQuantConfig
from bitcore.errors import LifecycleError
from bitlayers import BitLinear, Int8Embedding, Int8Linear
from bitlayers.view import WeightView

GRANULARITIES = [
    BitQuantConfig(),
    BitQuantConfig(weight_granularity="per_channel"),
    BitQuantConfig(weight_granularity="per_group", group_size=64),
    BitQuantConfig(weight_granularity="per_group", group_size=64, group_scale_dtype="float32"),
]


def modules(dtype: torch.dtype = torch.float32) -> list[Any]:
    torch.manual_seed(1)
    layers: list[Any] = [
        BitLinear(128, rows, quant_config=config).to(dtype).deploy()
        for config, rows in zip(GRANULARITIES, (30, 33, 5, 6), strict=True)
    ]
    layers.append(Int8Linear.from_linear(nn.Linear(128, 30).to(dtype)))
    layers.append(Int8Embedding.from_embedding(nn.Embedding(30, 128).to(dtype)))
    return layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("index", range(6))
def test_it_reads_as_the_float_weight(index: int, dtype: torch.dtype) -> None:
    module = modules(dtype)[index]
    view, wanted = module.weight, module.dequantized_weight(dtype)
    assert isinstance(view, WeightView)
    assert not isinstance(view, nn.Parameter)
    assert (view.dtype, view.device, view.shape) == (dtype, wanted.device, wanted.shape)
    assert (view.numel(), view.dim(), view.size(1)) == (wanted.numel(), 2, 128)
    assert not view.requires_grad
    reads: list[Callable[[Tensor], Tensor]] = [
        lambda w: w + 0,
        lambda w: w.t() + 0,
        lambda w: w.T.contiguous(),
        lambda w: w[3],
        lambda w: w[1:4, ::2],
        lambda w: w[torch.tensor([0, 2])],
        lambda w: w.to(torch.float64),
        lambda w: w.float() * 2,
        lambda w: w.abs().mean(),
        lambda w: torch.cat([w, w]),
        lambda w: w.detach().clone(),
        lambda w: w.data.norm(),
    ]
    for read in reads:
        assert type(read(view)) is Tensor
        assert torch.equal(read(view), read(wanted))
    assert "WeightView" in repr(view)


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("tokens", [1, 7, 33])
def test_products(index: int, tokens: int) -> None:
    module = modules()[index]
    view, wanted = module.weight, module.dequantized_weight()
    x = torch.randn(2, tokens, 128)
    for product in (
        lambda w: F.linear(x, w, module.bias),
        lambda w: F.linear(x, w),
        lambda w: x @ w.t(),
        lambda w: torch.matmul(x, w.T),
        lambda w: torch.mm(x[0], w.transpose(0, 1)),
        lambda w: w @ x[0].t(),
    ):
        torch.testing.assert_close(product(view), product(wanted), atol=1e-5, rtol=1e-5)


def test_a_gradient_reaches_the_input() -> None:
    layer = modules()[0]
    x = torch.randn(5, 128)
    gradients = []
    for weight in (layer.weight, layer.dequantized_weight()):
        leaf = x.clone().requires_grad_()
        F.linear(leaf, weight).square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-5)


def test_a_ternary_weight_is_not_unpacked_to_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = modules()[0]
    monkeypatch.setattr(WeightView, "dequantized", lambda self: pytest.fail("unpacked"))
    F.linear(torch.randn(2, 128), layer.weight, layer.bias)
    torch.randn(2, 128) @ layer.weight.t()
    assert layer.weight.dtype == torch.float32


@pytest.mark.parametrize("index", range(6))
def test_it_refuses_to_be_written_or_trained(index: int) -> None:
    module = modules()[index]
    wanted = module.dequantized_weight()

    def assign() -> None:
        module.weight = nn.Parameter(wanted)

    def train() -> None:
        module.weight.requires_grad = True

    attempts: list[Callable[[], Any]] = [
        assign,
        train,
        lambda: module.weight.requires_grad_(),
        lambda: nn.Parameter(module.weight),
        lambda: module.weight.mul_(2),
        lambda: module.weight.data.copy_(wanted),
        lambda: module.weight.__setitem__(0, 1.0),
        lambda: torch.add(wanted, wanted, out=module.weight),
        lambda: nn.init.normal_(module.weight),
    ]
    for attempt in attempts:
        with pytest.raises(LifecycleError, match="weight"):
            attempt()
    assert torch.equal(module.weight, wanted)


@pytest.mark.parametrize("index", range(6))
def test_it_is_nowhere_but_where_it_is_read(index: int) -> None:
    module = modules()[index]
    state = set(module.state_dict())
    module.weight.mean()
    assert set(module.state_dict()) == state
    assert "weight" not in state
    assert "weight" not in dict(module.named_parameters())
    assert "weight" not in vars(module)
    held = copy.deepcopy(module)
    assert torch.equal(held.weight, module.weight)
    assert held.weight._qweight.data_ptr() != module.weight._qweight.data_ptr()
    assert type(copy.deepcopy(module.weight)) is Tensor
    file = io.BytesIO()
    torch.save(module.weight, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), module.dequantized_weight())


@pytest.mark.parametrize("index", range(6))
def test_its_dtype_follows_the_module(index: int) -> None:
    module = modules(torch.bfloat16)[index]
    assert module.weight.dtype == torch.bfloat16
    assert module.to(torch.float32).weight.dtype == torch.float32
    assert module.half().weight.dtype == torch.float16
    assert module.to("meta").weight.is_meta


def test_a_compiled_model_reads_it() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = modules()[0]

        def forward(self, x: Tensor) -> Tensor:
            x = x.to(self.fc.weight.dtype)
            return self.fc(x) + F.linear(x, self.fc.weight) * self.fc.weight.shape[0]

    model, x = Model(), torch.randn(3, 128)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


def test_latent_layers_keep_their_parameter() -> None:
    layer = BitLinear(128, 8)
    assert isinstance(layer.weight, nn.Parameter)
    layer.weight = nn.Parameter(torch.ones(8, 128))
    assert layer.eval().weight is layer._parameters["weight"]
