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


def round_sums(
    magnitudes: Tensor, bounds: tuple[Tensor, Tensor], counted: Tensor, dtype: torch.dtype
) -> Tensor:
    """Rounds magnitudes to a dtype; one of each group takes what the sum lost by it.

    In float32 the mean of the counted ones then rounds to what it was meant to be, which two
    levels are sensitive to: the largest scale of a row decides them all.

    Args:
        magnitudes: float64 [groups, elements].
        bounds: The least and the most that the one may be, of the same shape.
        counted: Whose sum is to stay, bool of the same shape.
        dtype: Of the latent weight.
    """
    wanted = (magnitudes * counted).sum(1, keepdim=True)
    rounded = magnitudes.to(dtype).double()
    missing = wanted - (rounded * counted).sum(1, keepdim=True)
    # The smallest is the finest; one far below the mean could be less than what is missing.
    fine = counted & (magnitudes > wanted / counted.sum(1, keepdim=True) / 16)
    chosen = torch.where(fine, magnitudes, torch.inf).argmin(1, keepdim=True)
    low, high = (bound.gather(1, chosen) for bound in bounds)
    filled = (rounded.gather(1, chosen) + missing).clamp(low, high)
    return rounded.scatter(1, chosen, filled.to(dtype).double())


def _bounds(kept: Tensor, threshold: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Returns how small and how large magnitudes may be beside a threshold."""
    zeros = threshold.new_zeros(())
    low = torch.where(kept, threshold * (1 + margin), zeros)
    return low, torch.where(kept, torch.inf, threshold * (1 - margin))


def _absmean_magnitudes(
    magnitudes: Tensor, kept: Tensor, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Magnitudes whose mean is the scale, of which half parts the two."""
    totals = scale.squeeze(1) * magnitudes.shape[1]
    shifted = shift_into(magnitudes, *_bounds(kept, _HALF * scale, MARGIN), totals)
    bounds = _bounds(kept, _HALF * scale, MARGIN / 2)
    return round_sums(shifted, bounds, torch.ones_like(kept), dtype)


def _twn_magnitudes(magnitudes: Tensor, kept: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Magnitudes whose mean over the kept ones is the scale, and whose threshold parts the two."""
    count = kept.double().sum(1, keepdim=True)
    size = magnitudes.shape[1]
    least = count * scale / size
    # The threshold is 0.7 of the mean: zeros reach it, and stay below, up to this mean.
    most = least / (1 - _TWN * (1 - MARGIN) * (1 - count / size))
    mean = magnitudes.mean(1, keepdim=True).clamp(least, torch.minimum(most, scale))
    threshold = _TWN * mean
    low, high = _bounds(kept, threshold, MARGIN)
    # Each of the two shifts leaves the other's alone.
    ones = shift_into(
        torch.where(kept, magnitudes, 0.0),
        low,
        torch.where(kept, high, 0.0),
        (count * scale).squeeze(1),
    )
    rest = shift_into(
        torch.where(kept, 0.0, magnitudes),
        torch.zeros_like(low),
        torch.where(kept, 0.0, high),
        ((mean - least) * size).squeeze(1),
    )
    bounds = _bounds(kept, threshold, MARGIN / 2)
    return round_sums(torch.where(kept, ones, rest), bounds, kept, dtype)


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

    Numerics:
        In float32, scales in two levels come back exactly, but for multipliers of groups without
        any ones. In bfloat16 a row's scale moves by a few thousandths, the codes stay, and so do
        multipliers, but for large ones with absmax, which can come back one off.
    """
    elements = codes.numel() // scales.values.numel()
    values, ones = original.double().reshape(-1, elements), codes.reshape(-1, elements)
    scale, dtype = scales.values.reshape(-1, 1), original.dtype
    kept = ones != 0
    # A weight whose sign was changed starts from the other side of zero.
    magnitudes = torch.where(kept, ones * values, values.abs())
    low, high = _bounds(kept, _HALF * scale, MARGIN)
    if config.weight_quantizer == "absmean":
        magnitudes = _absmean_magnitudes(magnitudes, kept, scale, dtype)
    elif config.weight_quantizer == "absmax":
        magnitudes = magnitudes.clamp(low, torch.where(kept, scale, high))
        largest = torch.where(kept, magnitudes, -torch.inf).argmax(1, keepdim=True)
        magnitudes = magnitudes.scatter(1, largest, scale)
    elif config.weight_quantizer == "twn":
        magnitudes = _twn_magnitudes(magnitudes, kept, scale, dtype)
    else:
        magnitudes = magnitudes.clamp(low, high)
    signs = torch.where(kept, ones, torch.where(values < 0, -1.0, 1.0))
    latent = torch.where(kept.any(1, keepdim=True), signs * magnitudes, 0.0)
    return latent.reshape(original.shape).to(dtype)
