"""A layer whose `_perform_deployment` packs it and returns nothing, as the reference shows it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitcore.errors import LifecycleError
from bitcore.packing import pack_ternary, unpack_ternary
from bitlab_hf import deploy
from bitlayers import BitLayerBase, BitLinear, estimate_memory_usage


class OwnCodes(BitLayerBase, nn.Linear):
    """Signs in a byte each and one scale; it drops its float weight itself."""

    def _train_forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.sign() * self.weight.abs().mean(), self.bias)

    def _eval_forward(self, x: Tensor) -> Tensor:
        if not self.is_deployed:
            return self._train_forward(x)
        return nn.functional.linear(x, self.signs.float() * self.step, self.bias)

    def _on_enter_training_mode(self) -> None: ...

    def _on_enter_eval_mode(self) -> None: ...

    def _perform_deployment(self) -> None:
        self.register_buffer("signs", self.weight.detach().sign().to(torch.int8))
        self.register_buffer("step", self.weight.detach().abs().mean())
        del self.weight


class OwnNames(BitLinear):
    """Registers what the eval cache serves until then, by the names of the base."""

    def _perform_deployment(self) -> Any:
        qweight, scale = self.packed()
        codes = unpack_ternary(qweight, self.out_features)
        self.register_buffer("qweight", pack_ternary(codes))
        self.register_buffer("qweight_scale", scale.clone())
        self.weight = None


class Nothing(OwnCodes):
    """The handler of the reference: a pass."""

    def _eval_forward(self, x: Tensor) -> Tensor:
        return self._train_forward(x)

    def _perform_deployment(self) -> None:
        pass


@pytest.mark.parametrize("kind", [OwnCodes, OwnNames, Nothing])
@pytest.mark.parametrize("mode", [True, False])
def test_what_the_handler_registers_is_kept(kind: type[BitLayerBase], mode: bool) -> None:
    layer = kind(64, 12).train(mode)
    x = torch.randn(3, 64)
    expected = layer.eval()(x)
    layer.train(mode)
    assert layer.deploy() is layer
    assert layer.is_deployed
    assert not layer.training
    assert torch.allclose(layer(x), expected, atol=1e-6)
    keys = {
        OwnCodes: {"signs", "step", "bias"},
        OwnNames: {"qweight", "qweight_scale", "bias"},
        Nothing: {"weight", "bias"},
    }
    assert set(layer.state_dict()) == keys[kind]
    with pytest.raises(LifecycleError, match="deployed already"):
        layer.deploy()
    with pytest.raises(LifecycleError, match="its own packing"):
        layer.dequantized_weight()
    assert estimate_memory_usage(layer)["original"] == 4 * (64 * 12 + 12)


def test_deploying_a_model_is_all_or_nothing() -> None:
    class Fails(OwnCodes):
        def _perform_deployment(self) -> None:
            super()._perform_deployment()
            raise OSError("no space")

    model = nn.Sequential(OwnCodes(64, 8), BitLinear(8, 8), Fails(8, 4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(OSError, match="no space"):
        deploy(model)
    assert not any(layer.is_deployed for layer in model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    model[2] = OwnCodes(8, 4)
    deploy(model)
    assert all(layer.is_deployed for layer in model)
