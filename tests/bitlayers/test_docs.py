"""Runs every code block of docs/layers.md whole, on its own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bitcore import BitQuantConfig, ops
from bitlayers import (
    LAYER_REGISTRY,
    BitLayerBase,
    BitLinear,
    compare_layers,
    estimate_memory_usage,
    register_layer,
)

TEXT = (Path(__file__).parents[2] / "docs" / "layers.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
# Every name of the reference.
NAMES = [
    "in_features",
    "out_features",
    "bias",
    "init_method",
    "xavier_uniform",
    "kaiming_uniform",
    "quant_config",
    "forward",
    "train",
    "eval",
    "deploy",
    "use_bias",
    "weight",
    "qweight",
    "qweight_scale",
    "is_deployed",
    "BitLayerBase",
    "_train_forward",
    "_eval_forward",
    "_on_enter_training_mode",
    "_on_enter_eval_mode",
    "_perform_deployment",
    "register_layer",
    "LAYER_REGISTRY",
    "estimate_memory_usage",
    "original",
    "quantized",
    "savings",
    "compare_layers",
    "reduction",
    "speedup",
    "from_linear",
    "device",
    "dtype",
    "activation_dtype",
    "activation_granularity",
    "weight_granularity",
    "group_size",
    "per_tensor",
    "per_channel",
    "per_token",
]


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    before = dict(LAYER_REGISTRY)
    yield
    LAYER_REGISTRY.clear()
    LAYER_REGISTRY.update(before)


def seed() -> dict[str, Any]:
    """What a block may use without making it: torch, x, layer, config and the imports."""
    return {
        "torch": torch,
        "x": torch.randn(3, 512),
        "layer": BitLinear(512, 256),
        "config": BitQuantConfig(),
        "BitLinear": BitLinear,
        "BitLayerBase": BitLayerBase,
        "BitQuantConfig": BitQuantConfig,
        "ops": ops,
        "register_layer": register_layer,
        "LAYER_REGISTRY": LAYER_REGISTRY,
        "estimate_memory_usage": estimate_memory_usage,
        "compare_layers": compare_layers,
    }


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_block(index: int) -> None:
    exec(compile(BLOCKS[index], f"docs/layers.md block {index + 1}", "exec"), seed())


def test_there_are_blocks_and_they_assert() -> None:
    assert len(BLOCKS) >= 13
    assert all("assert" in block or "output = " in block for block in BLOCKS)


@pytest.mark.parametrize("name", NAMES)
def test_name_is_explained(name: str) -> None:
    assert re.search(rf"\b{name}\b", TEXT)
