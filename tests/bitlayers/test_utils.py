from __future__ import annotations

import pytest
import torch
from torch import nn

from bitcore import BitQuantConfig
from bitlayers import BitLinear, Int8Linear, compare_layers, estimate_memory_usage


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        (BitQuantConfig(), 4),
        (BitQuantConfig(weight_granularity="per_channel"), 4 * 30),
        (BitQuantConfig(weight_granularity="per_group", group_size=64), 4 * 30 + 60),
        (
            BitQuantConfig(
                weight_granularity="per_group", group_size=64, group_scale_dtype="float32"
            ),
            4 * 60,
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_estimate_in_every_state(config: BitQuantConfig, scales: int, dtype: torch.dtype) -> None:
    layer = BitLinear(128, 30, quant_config=config, dtype=dtype)
    size = dtype.itemsize
    expected = {"original": (30 * 128 + 30) * size, "quantized": 8 * 128 + scales + 30 * size}
    for state in ("train", "eval", "deploy"):
        getattr(layer, state)()
        before = (layer.training, layer.is_deployed, layer._cache)
        usage = estimate_memory_usage(layer)
        assert (layer.training, layer.is_deployed, layer._cache) == before
        assert usage["original"] == expected["original"]
        assert usage["quantized"] == expected["quantized"]
        assert usage["savings"] == pytest.approx(1 - expected["quantized"] / expected["original"])
    actual = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
    assert actual == expected["quantized"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_estimate_of_int8(dtype: torch.dtype) -> None:
    layer = Int8Linear.from_linear(nn.Linear(128, 30, dtype=dtype))
    usage = estimate_memory_usage(layer)
    assert usage["original"] == (30 * 128 + 30) * dtype.itemsize
    assert usage["quantized"] == 30 * 128 + 4 * 30 + 30 * dtype.itemsize
    assert usage["quantized"] == sum(t.nbytes for t in layer.state_dict().values())


@pytest.mark.parametrize("deployed", [False, True])
def test_compare_measures_and_changes_nothing(deployed: bool) -> None:
    regular, quantized = nn.Linear(256, 128), BitLinear(256, 128)
    if deployed:
        quantized.deploy()
    result = compare_layers(regular, quantized, tokens=3, repeats=5)
    assert regular.training
    assert quantized.training is not deployed
    assert quantized.is_deployed is deployed
    assert result["regular_bytes"] == (256 * 128 + 128) * 4
    assert result["quantized_bytes"] == 32 * 256 + 4 + 128 * 4
    assert result["reduction"] == 1 - result["quantized_bytes"] / result["regular_bytes"]
    assert result["speedup"] == result["regular_seconds"] / result["quantized_seconds"] > 0
    assert (result["tokens"], result["threads"]) == (3, torch.get_num_threads())


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="must be a BitLayerBase, got Linear"):
        estimate_memory_usage(nn.Linear(4, 4))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="quantized must be a BitLayerBase"):
        compare_layers(nn.Linear(4, 4), nn.Linear(4, 4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(4, 8\), got \(4, 4\)"):
        compare_layers(nn.Linear(4, 4), BitLinear(4, 8))
