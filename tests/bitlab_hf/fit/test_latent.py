"""Latent weights that an estimator ternarizes to given codes and scales."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitcore import BitQuantConfig
from bitcore.estimators import estimate
from bitcore.packing import unpack_ternary
from bitcore.quantize import group_scale, ternarize, two_levels
from bitlab_hf.fit.latent import latent_weight
from bitlab_hf.fit.solve import Scales
from bitlayers import BitLinear

QUANTIZERS = ["absmean", "absmax", "twn", "lsq"]
SHAPES = {"per_tensor": (1, 1), "per_channel": (24, 1), "per_group_float32": (24, 2)}


def quantization(granularity: str, quantizer: str = "absmean") -> BitQuantConfig:
    grouped = granularity.startswith("per_group")
    return BitQuantConfig(
        weight_granularity="per_group" if grouped else granularity,
        group_size=64 if grouped else None,
        group_scale_dtype="float32" if granularity == "per_group_float32" else None,
        weight_quantizer=quantizer,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("granularity", SHAPES)
def test_latent_weights_hold_the_codes(
    granularity: str, quantizer: str, dtype: torch.dtype
) -> None:
    """Whatever the codes: those of the weight, unrelated ones, hardly any, and none."""
    torch.manual_seed(0)
    config = quantization(granularity, quantizer)
    original = (0.05 * torch.randn(24, 128)).to(dtype)
    scales = Scales(0.03 + 0.1 * torch.rand(SHAPES[granularity], dtype=torch.float64), 128)
    for share in (0.6, 0.02, 1.0):
        codes = torch.randint(0, 2, (24, 128)).double() * 2 - 1
        codes *= torch.rand(24, 128) < share
        if granularity != "per_tensor":
            codes[5] = 0
        latent = latent_weight(original, codes, scales, config)
        assert latent.dtype == dtype
        step, scale, _ = estimate(latent, quantizer, granularity, config.group_size or 0)
        wanted = scales.values.reshape(step.shape)
        if quantizer == "lsq":
            step = scale = wanted.float()
        assert torch.equal(ternarize(latent, step).double(), codes)
        # Each magnitude was rounded once, and their mean once more.
        kept = scales.sums(codes.abs()).reshape(step.shape) > 0
        tolerance = torch.finfo(dtype).eps
        torch.testing.assert_close(
            scale.double()[kept], wanted[kept], rtol=tolerance, atol=0, check_dtype=False
        )


def test_latent_weights_stay_where_they_can() -> None:
    """With the codes and the scale that a weight has by itself it changes by less than the margin
    asks for.
    """
    torch.manual_seed(0)
    config, original = quantization("per_tensor"), 0.05 * torch.randn(24, 128)
    scale = estimate(original, "absmean", "per_tensor")[0]
    codes = ternarize(original, scale).double()
    latent = latent_weight(original, codes, Scales(scale.double().view(1, 1), 128), config)
    moved = (latent - original).abs() / scale
    assert moved.max() < 0.04
    assert moved.median() < 1e-3


def leveled_case(kind: str, share: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Returns a weight [20, 576], codes of which a share are ones, and scales in two levels."""
    torch.manual_seed(0)
    rows, groups = 20, 9
    original = (0.05 * torch.randn(rows, 64 * groups)).to(dtype)
    scales = 0.03 + 0.1 * torch.rand(rows, groups)
    if kind == "large":
        scales[:, 4] *= 300
    elif kind == "wide":
        scales *= torch.exp(3 * torch.randn(rows, groups))
    row, multiplier = two_levels(scales.clamp(min=1e-3))
    codes = torch.randint(0, 2, (rows, groups, 64)) * 2 - 1
    codes *= torch.rand(rows, groups, 64) < share
    codes[5:9, 0] = 0
    codes[7, 1:] = 0
    # The calibration sees to it that the group with the largest scale has ones, if any has.
    codes[torch.arange(rows), multiplier.int().argmax(1), 0] = 1
    codes[7] = 0
    return original, codes.double().view(rows, -1), group_scale(row, multiplier)


def packed_from(
    latent: Tensor, scales: Tensor, config: BitQuantConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the codes, row scales and multipliers that a layer packs a latent weight to."""
    rows, columns = latent.shape
    layer = BitLinear(columns, rows, bias=False, quant_config=config, dtype=latent.dtype)
    with torch.no_grad():
        layer.weight.copy_(latent)
        if layer.learned_scale is not None:
            layer.learned_scale.copy_(scales)
    qweight, scale, multiplier = layer.deploy().packed()
    return unpack_ternary(qweight, rows).double(), scale, multiplier


@pytest.mark.parametrize("share", [0.6, 0.02, 1.0])
@pytest.mark.parametrize("kind", ["plain", "large", "wide"])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_two_levels_come_back_exactly(quantizer: str, kind: str, share: float) -> None:
    """Codes, scale and multipliers, where there is a code to multiply: with groups and a row of
    zeros, with one group far above the rest (m = 1), with scales of all sizes.
    """
    config = quantization("per_group", quantizer)
    original, codes, scales = leveled_case(kind, share, torch.float32)
    latent = latent_weight(original, codes, Scales(scales.double(), 576, True), config)
    found, scale, multiplier = packed_from(latent, scales, config)
    assert torch.equal(found, codes)
    used = (codes.view(20, 9, 64) != 0).any(2)
    assert not used[7].any()
    row, wanted = two_levels(scales)
    assert (int(wanted.min()) == 1) == (kind != "plain")
    assert torch.equal(scale[used.any(1)], row[used.any(1)])
    assert torch.equal(multiplier[used], wanted[used])


@pytest.mark.parametrize("kind", ["plain", "large", "wide"])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_two_levels_in_bfloat16(quantizer: str, kind: str) -> None:
    """The codes are the same; a scale is as near as the dtype allows, a multiplier one off at most,
    and with absmean, whose scale is a mean of many weights, none.
    """
    config = quantization("per_group", quantizer)
    for share in (0.6, 0.02, 1.0):
        original, codes, scales = leveled_case(kind, share, torch.bfloat16)
        latent = latent_weight(original, codes, Scales(scales.double(), 576, True), config)
        found, scale, multiplier = packed_from(latent, scales, config)
        assert torch.equal(found, codes)
        used = (codes.view(20, 9, 64) != 0).any(2)
        row, wanted = two_levels(scales)
        torch.testing.assert_close(scale[used.any(1)], row[used.any(1)], rtol=2**-8, atol=0)
        moved = (multiplier[used].int() - wanted[used].int()).abs()
        assert moved.max() <= (1 if quantizer == "absmax" else 0)
