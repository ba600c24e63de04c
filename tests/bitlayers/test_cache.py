"""A latent layer in eval mode computes with its weight, however the weight was written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bitcore.config import BitQuantConfig
from bitlayers import BitLinear
from bitlayers.training import Fingerprint

Write = Callable[[torch.nn.Parameter, Tensor], None]


def _assign(parameter: torch.nn.Parameter, value: Tensor) -> None:
    parameter.data = value.clone()


def _through_numpy(parameter: torch.nn.Parameter, value: Tensor) -> None:
    parameter.detach().numpy()[...] = value.numpy()


WRITES: dict[str, Write] = {
    "data.copy_": lambda parameter, value: parameter.data.copy_(value),
    "data =": _assign,
    "data +=": lambda parameter, value: parameter.data.add_(value - parameter.data),
    "copy_": lambda parameter, value: parameter.detach().copy_(value),
    "numpy": _through_numpy,
    "transposed": lambda parameter, value: setattr(parameter, "data", value.t().contiguous().t()),
}


@pytest.mark.parametrize("shape", [(30, 128), (1, 64), (257, 65), (3, 1)])
@pytest.mark.parametrize("write", WRITES)
def test_a_write_is_seen(write: str, shape: tuple[int, int]) -> None:
    rows, columns = shape
    layer, x = BitLinear(columns, rows).eval(), torch.randn(4, columns)
    layer(x)
    value = torch.randn(rows, columns)
    WRITES[write](layer.weight, value)
    fresh = BitLinear(columns, rows)
    fresh.load_state_dict({"weight": value, "bias": layer.bias})
    assert torch.equal(layer(x), fresh.eval()(x))


def test_a_write_to_one_element_is_seen() -> None:
    layer, x = BitLinear(640, 300).eval(), torch.randn(4, 640)
    layer(x)
    for index in ((7, 11), (0, 0), (299, 639)):
        layer.weight.data[index] += 10
        fresh = BitLinear(640, 300)
        fresh.load_state_dict(layer.state_dict())
        assert torch.equal(layer(x), fresh.eval()(x))
        step = x[:, None]
        assert torch.equal(layer(step), fresh(step))


@pytest.mark.parametrize("write", WRITES)
def test_a_write_amid_decoding_is_seen(write: str) -> None:
    layer, step = BitLinear(128, 30).eval(), torch.randn(4, 1, 128)
    layer(step)
    value = torch.randn(30, 128)
    WRITES[write](layer.weight, value)
    fresh = BitLinear(128, 30)
    fresh.load_state_dict({"weight": value, "bias": layer.bias})
    assert torch.equal(layer(step), fresh.eval()(step))


def test_a_learned_scale_is_watched_too() -> None:
    config = BitQuantConfig(weight_quantizer="lsq", weight_granularity="per_channel")
    layer, x = BitLinear(64, 30, quant_config=config).eval(), torch.randn(4, 64)
    before = layer(x)
    assert layer.learned_scale is not None
    layer.learned_scale.data.mul_(3)
    after = layer(x)
    assert not torch.equal(before, after)
    layer.invalidate_cache()
    assert torch.equal(layer(x), after)


def test_decoding_does_not_pack_again(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = BitLinear(64, 30).eval(), torch.randn(4, 1, 64)
    expected = layer(x)
    monkeypatch.setattr(layer, "_pack", lambda: pytest.fail("packed again"))
    assert torch.equal(layer(x), expected)
    layer.deploy  # noqa: B018  (reading is no write)
    layer(x[:1])


def test_a_fingerprint_holds_a_few_dozen_elements() -> None:
    weight = torch.randn(1000, 999)
    mark = Fingerprint([weight])
    assert mark._values[0].numel() <= 64
    assert mark.matches([weight])
    assert not mark.matches([weight.clone()])


def test_where_no_write_can_be_seen_it_is_packed_each_time() -> None:
    with torch.inference_mode():
        layer = BitLinear(64, 8).eval()
        x = torch.randn(2, 64)
        layer(x)
        layer.weight.copy_(torch.randn(8, 64))
        seen = layer(x)
        layer.invalidate_cache()
        assert torch.equal(layer(x), seen)
