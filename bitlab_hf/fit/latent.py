"""Latent weights that ternarize to given codes and scales, as near to other weights as can be."""

from __future__ import annotations

import torch
from torch import Tensor

from bitcore.config import BitQuantConfig
from bitcore.errors import ConfigError
from bitcore.estimators import get_estimator
from bitlab_hf.fit.solve import Scales

# How far from its threshold every weight stays, in thresholds: more than a rounding to 16 bits.
MARGIN = 1 / 16
# Thresholds in units of the scale, for estimators whose step is their scale.
_HALF = 0.5
# Ternary Weight Networks: zero is what lies below 0.7 of the mean.
_TWN = 0.7


def check_estimator(config: BitQuantConfig) -> None:
    """Checks that `latent_weight` knows the estimator.

    Raises:
        ConfigError: It is neither learned nor one of BitLab's own.
    """
    name = config.weight_quantizer
    if not get_estimator(name).learned and name not in ("absmean", "absmax", "twn"):
        raise ConfigError(
            "calibrate: weight_quantizer must be 'absmean', 'absmax', 'twn' or a learned one, got "
            f"{name!r}"
        )


def shift_into(values: Tensor, low: Tensor, high: Tensor, totals: Tensor) -> Tensor:
    """The nearest values within bounds that add up to given totals: ``clip(values + shift)``.

    That is the Euclidean projection onto a box cut by a plane; the shift is found by bisection.

    Args:
        values: float64 [groups, elements].
        low: Lower bounds, of the same shape.
        high: Upper bounds; may be infinite.
        totals: [groups], each between the sums of the bounds.
    """
    wanted = totals.unsqueeze(1)
    # From all at their lower bound to one of them holding everything that is missing.
    left = (low - values).amin(1, keepdim=True)
    finite = torch.where(torch.isfinite(high), high, low + wanted)
    right = (finite - values).amax(1, keepdim=True)
    for _ in range(100):
        middle = (left + right) / 2
        sums = (values + middle).clamp(low, high).sum(1, keepdim=True)
        left = torch.where(sums < wanted, middle, left)
        right = torch.where(sums < wanted, right, middle)
    return (values + right).clamp(low, high)


def _twn_magnitudes(magnitudes: Tensor, kept: Tensor, scale: Tensor) -> Tensor:
    """Magnitudes whose mean over the kept ones is the scale, and whose threshold parts the two."""
    count = kept.double().sum(1, keepdim=True)
    size = magnitudes.shape[1]
    least = count * scale / size
    # The threshold is 0.7 of the mean: zeros reach it, and stay below, up to this mean.
    most = least / (1 - _TWN * (1 - MARGIN) * (1 - count / size))
    mean = magnitudes.mean(1, keepdim=True).clamp(least, torch.minimum(most, scale))
    threshold = _TWN * mean
    zeros = magnitudes.new_zeros(())
    low = torch.where(kept, threshold * (1 + MARGIN), zeros)
    high = torch.where(kept, torch.inf, zeros)
    ones = shift_into(magnitudes, low, high, (count * scale).squeeze(1))
    high = torch.where(kept, zeros, threshold * (1 - MARGIN))
    rest = shift_into(magnitudes, zeros.expand_as(high), high, ((mean - least) * size).squeeze(1))
    return torch.where(kept, ones, rest)


def latent_weight(
    original: Tensor, codes: Tensor, scales: Scales, config: BitQuantConfig
) -> Tensor:
    """Returns a latent weight near the original that has these codes and, but for rounding, scales.

    With absmean the magnitudes have to average to the scale, those of ones to lie above half of it
    and those of zeros below: the original magnitudes are shifted and clipped so, all of a group by
    one shift, which is the least change. A group without any ones becomes zeros.

    Args:
        original: float [N, K].
        codes: float64 [N, K].
        scales: Of the codes.
        config: Whose estimator will ternarize the weight.

    Returns:
        Of the original's dtype, [N, K].
    """
    elements = codes.numel() // scales.values.numel()
    values, ones = original.double().reshape(-1, elements), codes.reshape(-1, elements)
    scale = scales.values.reshape(-1, 1)
    kept = ones != 0
    # A weight whose sign was changed starts from the other side of zero.
    magnitudes = torch.where(kept, ones * values, values.abs())
    threshold = _HALF * scale
    zeros = magnitudes.new_zeros(())
    low = torch.where(kept, threshold * (1 + MARGIN), zeros)
    high = torch.where(kept, torch.inf, threshold * (1 - MARGIN))
    if config.weight_quantizer == "absmean":
        magnitudes = shift_into(magnitudes, low, high, scale.squeeze(1) * elements)
    elif config.weight_quantizer == "absmax":
        magnitudes = magnitudes.clamp(low, torch.where(kept, scale, high))
        largest = torch.where(kept, magnitudes, -torch.inf).argmax(1, keepdim=True)
        magnitudes = magnitudes.scatter(1, largest, scale)
    elif config.weight_quantizer == "twn":
        magnitudes = _twn_magnitudes(magnitudes, kept, scale)
    else:
        magnitudes = magnitudes.clamp(low, high)
    signs = torch.where(kept, ones, torch.where(values < 0, -1.0, 1.0))
    empty = ~kept.any(1, keepdim=True)
    latent = torch.where(empty, zeros, signs * magnitudes)
    return latent.reshape(original.shape).to(original.dtype)
