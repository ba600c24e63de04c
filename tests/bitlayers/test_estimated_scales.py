"""Scales that no loader takes are not deployed: what an estimator has to give."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitcore import BitQuantConfig, register_estimator
from bitcore.errors import ArgumentError
from bitcore.estimators import ESTIMATORS
from bitlab_hf import deploy
from bitlayers import BitLinear
from tests.bitlayers.test_experts import ternary

CHANNEL = {"weight_granularity": "per_channel"}
GROUP = {"weight_granularity": "per_group", "group_size": 64}
FLOATS = {**GROUP, "group_scale_dtype": "float32"}


@pytest.fixture(params=[0.0, -127.0, math.inf, math.nan])
def bad(request: pytest.FixtureRequest) -> Iterator[str]:
    """Registers an estimator that gives this for groups of zeros; yields how messages say it."""

    @register_estimator("bad")
    def scales(groups: Tensor) -> tuple[Tensor, Tensor]:
        mean = groups.mean(1)
        scale = torch.where(mean > 0, mean, request.param)
        return scale, scale

    # In two levels it is divided by 127.
    yield r"-1(27)?\.0" if request.param < 0 else str(request.param)
    del ESTIMATORS["bad"]


def layer(fields: dict[str, Any]) -> BitLinear:
    made = BitLinear(128, 8, quant_config=BitQuantConfig(weight_quantizer="bad", **fields))
    with torch.no_grad():
        made.weight[3 if fields else slice(None)] = 0
    return made


@pytest.mark.parametrize("fields", [{}, CHANNEL, GROUP, FLOATS], ids=str)
def test_a_layer(fields: dict[str, Any], bad: str) -> None:
    made = layer(fields)
    with pytest.raises(ArgumentError, match=rf"estimator 'bad': .* got {bad} at .* of BitLinear\("):
        made.deploy()
    assert not made.is_deployed
    with pytest.raises(ArgumentError, match=rf"got {bad} at \[.*\] of mlp\.up\n.*clamp"):
        made.build_deployment("mlp.up")
    with torch.no_grad():
        made.weight.fill_(1)
    assert made.deploy().is_deployed


def test_a_model_is_deployed_whole_or_not_at_all(bad: str) -> None:
    model = nn.Sequential(BitLinear(64, 128), layer(CHANNEL))
    with pytest.raises(ArgumentError, match="estimator 'bad'"):
        deploy(model)
    assert not any(one.is_deployed for one in model)


@pytest.mark.parametrize("kind", ["plain", "transposed"])
@pytest.mark.parametrize("fields", [{}, CHANNEL, GROUP], ids=str)
def test_experts(fields: dict[str, Any], kind: str, bad: str) -> None:
    module = ternary(kind, weight_quantizer="bad", **fields)
    weight = module.get_parameter("down_proj")
    with torch.no_grad():
        weight[3] = 0
    with pytest.raises(ArgumentError, match=rf"'bad': .* {bad} at \[3, 0\] of experts\.down_proj"):
        module.deploy()
    assert not module.is_packed("gate_up_proj")
    with torch.no_grad():
        weight[3] = 1
    assert module.deploy().is_deployed


def test_a_weight_that_is_not_finite_is_its_own_error() -> None:
    """A load packs first, and names such weights in the end."""
    made = BitLinear(128, 8)
    with torch.no_grad():
        made.weight[3, 4] = math.nan
    _, scale = made.build_deployment()  # type: ignore[misc]
    assert scale.isnan()
