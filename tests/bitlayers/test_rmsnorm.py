"""RMSNormBitLinear: a norm, then BitLinear, through a layer's whole life."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from bitcore.norm import EPSILON
from bitlayers import BitLinear, RMSNormBitLinear
from bitlayers.rmsnorm import InputRMSNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_is_transformers_norm(dtype: torch.dtype) -> None:
    ours, theirs = InputRMSNorm(65, dtype=dtype), LlamaRMSNorm(65, EPSILON).to(dtype)
    with torch.no_grad():
        ours.weight.normal_()
        theirs.weight.copy_(ours.weight)
    x = torch.randn(7, 65, dtype=dtype)
    assert torch.equal(ours(x), theirs(x))


def test_life() -> None:
    linear = nn.Linear(64, 33)
    layer = RMSNormBitLinear.from_linear(linear)
    assert layer.weight is linear.weight
    assert layer.rms_norm.weight.shape == (64,)
    with torch.no_grad():
        layer.rms_norm.weight.normal_()
    x = torch.randn(5, 64, requires_grad=True)
    trained = layer.train()(x)
    trained.sum().backward()
    assert layer.rms_norm.weight.grad is not None
    inner = BitLinear.from_linear(linear)
    assert torch.equal(trained, inner(layer.rms_norm(x)))
    evaluated = layer.eval()(x)
    deployed = layer.deploy()
    assert torch.equal(evaluated, trained)
    assert torch.equal(deployed(x), trained)
    assert set(deployed.state_dict()) == {"qweight", "qweight_scale", "bias", "rms_norm.weight"}
    skeleton = RMSNormBitLinear.packed_skeleton(64, 33, True, device="cpu")
    skeleton.load_state_dict(deployed.state_dict())
    assert torch.equal(skeleton(x), trained)
