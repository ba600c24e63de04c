"""Estimators: how a ternary weight gets its step, which decides the codes, and its scale, which
multiplies them.

``codes = clamp(round(W * (1 / step)), -1, 1)`` and the layer computes with ``codes * scale``. The
packer needs the step only and stores whatever scale it is given, so an estimator costs a
deployed layer nothing. Each one works over the tensor, the row or the group: it sees a matrix of
groups, one a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bitcore.checks import GROUPED, check_group_size, check_weight
from bitcore.errors import ArgumentError, ConfigError
from bitcore.quantize import group_scale, two_levels, weight_scale

Scales = tuple[Tensor, Tensor]
# What a group of zeros gets: positive and normal in float32.
_LEAST = 1e-30
# A learned scale below it acts as it: its codes stay defined while training brings it back.
LEAST_LEARNED = 1e-5
# From here on, in steps, a weight takes no part in rounding any more: the middle of the outer bins.
LEARNED_BOUND = 1.5
# torch adds up so many elements in one thread, in an order of its own that no thread count changes.
_SERIAL = 32768


@dataclass(frozen=True)
class Estimator:
    """How weights are ternarized.

    Attributes:
        name: What ``weight_quantizer`` calls it.
        scales: Takes magnitudes float32 [groups, elements] and returns ``(step, scale)``, float32
            [groups] each and positive.
        learned: Whether that is only the start of a trained Parameter, which is both step and
            scale from then on.
    """

    name: str
    scales: Callable[[Tensor], Scales]
    learned: bool = False


ESTIMATORS: dict[str, Estimator] = {}


def register_estimator(
    name: str, *, learned: bool = False
) -> Callable[[Callable[[Tensor], Scales]], Callable[[Tensor], Scales]]:
    """Returns a decorator that makes a function known as ``weight_quantizer=name``.

    Args:
        name: The name; it belongs to one estimator.
        learned: See `Estimator`.

    Raises:
        ArgumentError: name is no non-empty string, or is taken.
    """
    if not isinstance(name, str) or not name:
        raise ArgumentError(f"register_estimator: name must be a non-empty string, got {name!r}")

    def decorate(scales: Callable[[Tensor], Scales]) -> Callable[[Tensor], Scales]:
        if name in ESTIMATORS:
            raise ArgumentError(f"register_estimator: name must be new, got {name!r}")
        ESTIMATORS[name] = Estimator(name, scales, learned)
        return scales

    return decorate


def get_estimator(name: str) -> Estimator:
    """Returns a registered estimator.

    Raises:
        ConfigError: The name is not registered; the message lists those that are.
    """
    estimator = ESTIMATORS.get(name) if isinstance(name, str) else None
    if estimator is None:
        raise ConfigError(
            f"BitQuantConfig: weight_quantizer must be one of {tuple(ESTIMATORS)}, got {name!r}\n"
            "Call bitcore.register_estimator first to use one of your own."
        )
    return estimator


@torch.no_grad()
def estimate(
    weight: Tensor, name: str, granularity: str, group_size: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the step and the scale of a weight, and multipliers of groups.

    Args:
        weight: float32, bfloat16 or float16 [N, K].
        name: A registered estimator.
        granularity: ``"per_tensor"``, ``"per_channel"``, ``"per_group"`` or
            ``"per_group_float32"``.
        group_size: G of groups.

    Returns:
        step and scale, float32 [1], [N] or [N, K / G], and None; for ``"per_group"`` the scale in
        two levels, [N] and uint8 [N, K / G], which are the step too where the estimator has one
        value for both. NaN where a group (in two levels: its row) holds NaN or infinity.

    Raises:
        ConfigError: The estimator is not registered.
        ArgumentError: It returns another shape.
    """
    estimator = get_estimator(name)
    check_weight("estimate", weight)
    out_features, in_features = weight.shape
    check_group_size("estimate", in_features, granularity, group_size)
    if name == "absmean":
        # Its order of additions is part of the format.
        scale = weight_scale(weight, granularity, group_size)
        return _levels(scale, scale, granularity)
    rows, shape = {
        "per_tensor": (1, (1,)),
        "per_channel": (out_features, (out_features,)),
    }.get(granularity, (-1, (out_features, -1)))
    width = group_size if granularity in GROUPED else weight.numel() // rows
    groups = weight.detach().reshape(-1, width).float().abs()
    finite = torch.isfinite(groups.amax(1))
    parts = estimator.scales(groups)
    step, scale = (
        torch.where(finite, _checked(name, part, groups).float(), torch.nan).view(shape)
        for part in parts
    )
    return _levels(scale if parts[0] is parts[1] else step, scale, granularity)


def _levels(step: Tensor, scale: Tensor, granularity: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Brings a scale to two levels where the granularity asks for it, and with it a step that is
    the same tensor.
    """
    if granularity != "per_group":
        return step, scale, None
    row, multiplier = two_levels(scale)
    return group_scale(row, multiplier) if step is scale else step, row, multiplier


def _checked(name: str, part: Tensor, groups: Tensor) -> Tensor:
    if not isinstance(part, Tensor) or part.shape != groups.shape[:1]:
        got = list(part.shape) if isinstance(part, Tensor) else repr(part)
        raise ArgumentError(
            f"estimator {name!r}: step and scale must be [{groups.shape[0]}], one a group, "
            f"got {got}"
        )
    return part


def check_scales(scale: Tensor, weight: Tensor | None, name: str, said: str) -> None:
    """Checks the scales that a weight is to be deployed with, since no file with others is loaded;
    waits for them on a GPU.

    Args:
        scale: float32 of any shape, what multiplies the codes.
        weight: What they are the scales of, or None. They are not looked at where it holds NaN or
            infinity: that is its own error.
        name: The estimator.
        said: What messages call the layer.

    Raises:
        ArgumentError: A scale is not finite, or not above zero.
    """
    if scale.is_meta:
        return
    valid = torch.isfinite(scale) & (scale > 0)
    if bool(valid.all()) or (weight is not None and not bool(torch.isfinite(weight).all())):
        return
    place = (~valid).nonzero()[0].tolist()
    raise ArgumentError(
        f"estimator {name!r}: scales must be finite and positive to be deployed, got "
        f"{float(scale[tuple(place)])} at {place} of {said}\n"
        "Let it clamp them, as to 1e-5: weights that are all zero have a scale too."
    )


def sum_groups(groups: Tensor) -> Tensor:
    """Returns the float64 sums [groups] of float32 [groups, elements], the same for every thread
    count.
    """
    sums = torch.zeros(groups.shape[0], dtype=torch.float64, device=groups.device)
    for part in torch.split(groups, _SERIAL if groups.shape[0] == 1 else groups.shape[1], dim=1):
        sums += part.sum(1, dtype=torch.float64)
    return sums


def mean_above(groups: Tensor, threshold: Tensor) -> Tensor:
    """Returns the mean of the magnitudes above a threshold, float32 [groups]; of the largest where
    none is above.

    It is the scale of the least squared error for the codes that the threshold gives:
    ``sum(|W| codes^2) / sum(codes^2)``.

    Args:
        groups: Magnitudes, float32 [groups, elements].
        threshold: float32 [groups].
    """
    kept = groups > threshold.unsqueeze(1)
    # Sums of up to 2^53 ones are exact.
    count = sum_groups(kept.float())
    mean = (sum_groups(groups * kept) / count.clamp(min=1)).float()
    return torch.where(count > 0, mean, groups.amax(1)).clamp(min=_LEAST)


@register_estimator("absmean")
def absmean(groups: Tensor) -> Scales:
    """``step = scale = max(mean|W|, 1e-5)``.

    Source: BitNet b1.58, arXiv 2402.17764, equations 1 to 3.
    """
    # `estimate` goes another way to the same value, in the packer's own order of additions.
    scale = (sum_groups(groups) / groups.shape[1]).float().clamp(min=1e-5)
    return scale, scale


@register_estimator("absmax")
def absmax(groups: Tensor) -> Scales:
    """``step = scale = max|W|``: reads weights that are ternary already, group by group, exactly.

    It is the format of Ternary Bonsai (groups of 128). On ordinary weights it zeroes most codes:
    all below half of the largest magnitude.
    """
    scale = groups.amax(1).clamp(min=_LEAST)
    return scale, scale


@register_estimator("twn")
def twn(groups: Tensor) -> Scales:
    """``step = 1.4 mean|W|``, so that weights above ``0.7 mean|W|`` keep their sign, and ``scale``
    the mean of their magnitudes.

    Source: Ternary Weight Networks, arXiv 1605.04711, equations 4 and 6.
    """
    mean = (sum_groups(groups) / groups.shape[1]).float()
    return (1.4 * mean).clamp(min=_LEAST), mean_above(groups, 0.7 * mean)


@register_estimator("lsq", learned=True)
def lsq(groups: Tensor) -> Scales:
    """A trained scale, which is the step too; it starts at ``2 mean|W| / sqrt(Qp)``, Qp = 1.

    `bitcore.reference.learned_gradients` has its gradients.

    Source: Learned Step Size Quantization, arXiv 1902.08153, section 2.1.
    """
    scale = (2 * sum_groups(groups) / groups.shape[1]).float().clamp(min=LEAST_LEARNED)
    return scale, scale


def learned_step(scale: Tensor) -> Tensor:
    """Returns a learned scale as the forward uses it, ``max(scale, 1e-5)``; NaN stays."""
    return scale.clamp(min=LEAST_LEARNED)


def learned_scales(scale: Tensor, granularity: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns what a learned scale comes to: the step, the scale that multiplies, and multipliers
    where it is brought to two levels.

    Args:
        scale: The learned scale, float32 [1], [N] or [N, K / G].
        granularity: Whose it is, as `estimate` takes it.
    """
    learned = learned_step(scale)
    return _levels(learned, learned, granularity)


def _grouped(values: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Views [N, K] and a scale [1], [N] or [N, K / G] so that they can be multiplied."""
    columns = scale.shape[1] if scale.dim() == 2 else 1
    return values.view(values.shape[0], columns, -1), scale.view(scale.shape[0], columns, 1)


def learned_weight(weight: Tensor, scale: Tensor, granularity: str) -> Tensor:
    """``codes * s`` in float32, differentiable with the gradients of
    `bitcore.reference.learned_gradients`; for a weight that is mixed with others rather than
    packed.

    Args:
        weight: float [N, K].
        scale: The learned scale, float32 [1], [N] or [N, K / G].
        granularity: Whose it is.
    """
    factor = (weight.numel() / scale.numel()) ** -0.5
    # Values pass unchanged; gradients are scaled, and pass the lower bound.
    step = (learned_scales(scale, granularity)[0] - scale).detach() + scale
    step = (step - step * factor).detach() + step * factor
    grouped, step = _grouped(weight.float(), step)
    ratio = (grouped / step).clamp(-LEARNED_BOUND, LEARNED_BOUND)
    exact = grouped.detach() * (1.0 / step.detach())
    codes = (exact > 0.5).float() - (exact < -0.5).float()
    return ((ratio + (codes - ratio).detach()) * step).reshape(weight.shape)
