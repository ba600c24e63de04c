"""One matrix at a time: codes and scales that keep a layer's outputs, from sums over its inputs.

Everything here minimises ``tr((T - C s) H (T - C s)^T)``: T is the weight that is wanted, C the
codes, s their scales and H the inputs' second moments. For ``H = X^T X`` it is the squared
difference of the outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from bitcore.checks import MOST_MULTIPLIER
from bitcore.quantize import group_scale, two_levels

# Columns that are handled one by one before the rest of the matrix hears of it.
_BLOCK = 32
# A scale never falls below it: a row of zeros has to keep one.
_LEAST = 1e-5


@dataclass
class Moments:
    """Sums over a layer's input tokens.

    Attributes:
        hessian: ``X^T X`` of the inputs as the ternary model has them, float64 [K, K].
        cross: ``F^T X``, F the inputs as the original model has them, float64 [K, K]; None without
            any.
        wanted: ``Y^T X``, Y the outputs that are wanted, float64 [N, K]; None for those of F.
        tokens: How many there were.
    """

    hessian: Tensor
    cross: Tensor | None = None
    wanted: Tensor | None = None
    tokens: int = 0

    @classmethod
    def zeros(cls, features: int, device: torch.device) -> Moments:
        """Returns the sums over no tokens."""
        return cls(torch.zeros(features, features, dtype=torch.float64, device=device))

    def add(self, original: Tensor, inputs: Tensor) -> None:
        """Adds tokens: inputs of both models, float [tokens, K]."""
        self.cross = _added(self.cross, original, inputs)
        self._add(inputs)

    def add_wanted(self, outputs: Tensor, inputs: Tensor) -> None:
        """Adds tokens: outputs that are wanted, float [tokens, N], and inputs [tokens, K]."""
        self.wanted = _added(self.wanted, outputs, inputs)
        self._add(inputs)

    def _add(self, inputs: Tensor) -> None:
        self.hessian = _added(self.hessian, inputs, inputs)
        self.tokens += inputs.shape[0]


def _added(sums: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Adds ``L^T R`` to sums in float64, of products in float32 wherever it is called from: rounded
    as under autocast, a Hessian with one large direction is not positive definite any more.
    """
    with torch.autocast(left.device.type, enabled=False):
        products = left.float().t() @ right.float()
    return products.double() if sums is None else sums.add_(products)


@contextmanager
def damped(hessian: Tensor, damping: float) -> Iterator[Tensor]:
    """Adds ``damping`` times the mean of the diagonal to it, for a while and in place: it can take
    gigabytes. Inputs that are always 0 get a 1.
    """
    diagonal = hessian.diagonal()
    before, mean = diagonal.clone(), diagonal.mean()
    diagonal += torch.where(mean > 0, damping * mean, torch.ones_like(mean))
    try:
        yield hessian
    finally:
        diagonal.copy_(before)


def wanted_weight(weight: Tensor, moments: Moments, damping: float) -> Tensor:
    """The weight that gives the wanted outputs for the inputs of the ternary model.

    ``T = Y^T X (X^T X)^-1``, damped towards W, with ``Y = F W^T`` where nothing else is wanted:
    what the layers before did is taken back as far as a linear layer can.

    Args:
        weight: W, float [N, K].
        moments: Of its inputs.
        damping: In units of the mean of the Hessian's diagonal.

    Returns:
        float64 [N, K].

    Source: the closed form that GPTAQ, arXiv 2504.02692, spreads over GPTQ's columns.
    """
    weight = weight.double()
    wanted = moments.wanted
    if wanted is None and moments.cross is not None:
        wanted = weight @ moments.cross
    if wanted is None:
        return weight
    drift = wanted - weight @ moments.hessian
    with damped(moments.hessian, damping) as hessian:
        factor = torch.linalg.cholesky(hessian)
    return weight + torch.cholesky_solve(drift.t(), factor).t()


class Scales:
    """Scales of a matrix and where they apply: per tensor, per row, or per row and group.

    Attributes:
        values: float64 [1, 1], [N, 1] or [N, K / G].
        leveled: Whether those of a row are multiples 1 to 127 of one float32, the largest of them
            the 127th: then `bitcore.quantize.two_levels` finds both again.
    """

    def __init__(self, values: Tensor, columns: int, leveled: bool = False) -> None:
        self.values, self.leveled = values, leveled
        self._width = columns // values.shape[1]

    def column(self, index: int) -> Tensor:
        """Returns the scale of a column, [1] or [N]."""
        return self.values[:, index // self._width]

    def full(self) -> Tensor:
        """Returns them as they multiply codes [N, K]."""
        return self.values.repeat_interleave(self._width, 1)

    def sums(self, products: Tensor) -> Tensor:
        """Adds products [N, K] up to the shape of the scales."""
        grouped = products.view(products.shape[0], self.values.shape[1], -1).sum(2)
        return grouped.sum(0, keepdim=True) if self.values.shape[0] == 1 else grouped

    def replaced(self, values: Tensor) -> Scales:
        """Returns others that apply alike."""
        return Scales(values, self.values.shape[1] * self._width, self.leveled)

    def in_two_levels(self) -> Scales:
        """Returns the nearest ones in two levels."""
        values = group_scale(*two_levels(self.values.float())).double()
        return Scales(values, self.values.shape[1] * self._width, True)


def rounded(values: Tensor, scale: Tensor) -> Tensor:
    """``clamp(round(values / scale), -1, 1)``."""
    half = scale / 2
    return (values > half).double() - (values < -half).double()


def start_scales(target: Tensor, hessian: Tensor, shape: tuple[int, int]) -> Scales:
    """Returns the scales of least squared error for rounding alone, inputs taken as independent.

    Args:
        target: float64 [N, K].
        hessian: float64 [K, K]; its diagonal counts.
        shape: Of the scales.
    """
    # For any scale the ones are what lies above half of it: the largest, so many of them.
    blocks = (shape[0] * shape[1], -1)
    magnitudes, order = target.abs().reshape(blocks).sort(1, descending=True)
    importance = hessian.diagonal().expand_as(target).reshape(blocks).gather(1, order)
    over = importance.cumsum(1)
    products = magnitudes.mul_(importance).cumsum(1)
    best = (products.square() / over).argmax(1, keepdim=True)
    values = (products.gather(1, best) / over.gather(1, best)).view(shape)
    return Scales(values.clamp(min=_LEAST), target.shape[1])


def compensated_codes(target: Tensor, hessian: Tensor, scales: Scales) -> Tensor:
    """Rounds column by column; the error of each goes into the columns that are still to come.

    Columns with the largest inputs come first. Scales stay what they are.

    Args:
        target: float64 [N, K].
        hessian: Damped, float64 [K, K].
        scales: Of the codes.

    Returns:
        Codes, float64 [N, K].

    Source: GPTQ, arXiv 2210.17323, algorithm 1, with its order by activations.
    """
    order = hessian.diagonal().argsort(descending=True)
    # Transposed, so that a column lies in one piece.
    left = target.t()[order]
    upper = _upper_of_inverse(hessian, order)
    codes = torch.empty_like(left)
    columns = order.tolist()
    for first in range(0, len(columns), _BLOCK):
        last = min(first + _BLOCK, len(columns))
        errors = left.new_empty(last - first, left.shape[1])
        for index in range(first, last):
            scale = scales.column(columns[index])
            codes[index] = rounded(left[index], scale)
            error = (left[index] - codes[index] * scale) / upper[index, index]
            left[index + 1 : last].addr_(upper[index, index + 1 : last], error, alpha=-1)
            errors[index - first] = error
        left[last:] -= upper[first:last, last:].t() @ errors
    return torch.empty_like(codes).index_copy_(0, order, codes).t().contiguous()


def _upper_of_inverse(hessian: Tensor, order: Tensor) -> Tensor:
    """Returns the upper Cholesky factor of the inverse of a Hessian [K, K] in another order."""
    # Each step lets go of what it was made of.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order.unsqueeze(1), order]))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper


def descend(target: Tensor, hessian: Tensor, codes: Tensor, scales: Scales) -> Tensor:
    """Sets every code in turn to the best one beside all others; the loss cannot rise.

    Source: coordinate descent as in QuantEase, arXiv 2309.01885, equation 9.
    """
    # Transposed, so that a column lies in one piece.
    error = (target - codes * scales.full()).t().contiguous()
    codes = codes.t().contiguous()
    diagonal = hessian.diagonal()
    for first in range(0, len(codes), _BLOCK):
        last = min(first + _BLOCK, len(codes))
        pull = hessian[first:last] @ error
        for index in range(first, last):
            scale, old = scales.column(index), codes[index]
            best = rounded(old * scale + pull[index - first] / diagonal[index], scale)
            change = (best - old) * scale
            pull[index - first + 1 :].addr_(hessian[index, index + 1 : last], change, alpha=-1)
            error[index] -= change
            codes[index] = best
    return codes.t().contiguous()


def refit(products: Tensor, hessian: Tensor, codes: Tensor, scales: Scales) -> Scales:
    """Returns scales of less loss for given codes; exact per tensor and per row.

    Per group it is one round of updates, group by group; in two levels one more, see `_leveled`.

    Args:
        products: Of target and Hessian, float64 [N, K].
        hessian: float64 [K, K].
        codes: float64 [N, K].
        scales: Of the codes, as they are.
    """
    squares, sums = _normal_equations(products, hessian, codes, scales)
    values = scales.values.clone()
    for group in range(values.shape[1]):
        values[:, group] = _best(squares, sums, values, group)
    if scales.leveled:
        values = _leveled(squares, sums, values, scales.values)
    return scales.replaced(values)


def _normal_equations(
    products: Tensor, hessian: Tensor, codes: Tensor, scales: Scales
) -> tuple[Tensor, Tensor]:
    """Returns ``A`` [R, C, C] and ``b`` [R, C]: the loss of scales s [R, C] is, a row of them,
    ``s A s - 2 b s`` and what does not depend on them.
    """
    groups, width = scales.values.shape[1], codes.shape[1] // scales.values.shape[1]
    sums = (products * codes).view(len(codes), groups, width).sum(2)
    squares = products.new_empty(len(codes), groups, groups)
    for group in range(groups):
        first = group * width
        part = codes[:, first : first + width] @ hessian[first : first + width, first:]
        beside = (part * codes[:, first:]).view(len(codes), groups - group, width).sum(2)
        squares[:, group, group:] = squares[:, group:, group] = beside
    if len(scales.values) == 1:
        return squares.sum(0, keepdim=True), sums.sum(0, keepdim=True)
    return squares, sums


def _best(squares: Tensor, products: Tensor, values: Tensor, group: int) -> Tensor:
    """Returns the best scale of a group [R] beside the others; the given one if it has no ones."""
    over = squares[:, group, group]
    step = products[:, group] - (squares[:, group] * values).sum(1)
    old = values[:, group]
    return torch.where(over > 0, old + step / over, old).clamp(min=_LEAST)


def _leveled(squares: Tensor, products: Tensor, values: Tensor, before: Tensor) -> Tensor:
    """Brings scales to two levels: group by group to the best multiple beside the others.

    The loss is a parabola in each scale, so the multiple nearest to its bottom is the best one.
    The largest scale of a row decides what they are multiples of, and stays the 127th; that of a
    group without ones is not seen by an estimator and decides nothing.

    Args:
        squares: A of `_normal_equations`, [N, C, C].
        products: b, [N, C].
        values: Scales, [N, C].
        before: Scales in two levels, kept in rows where they are as good.
    """
    used = squares.diagonal(dim1=1, dim2=2) > 0
    used = used | ~used.any(1, keepdim=True)
    deciding = torch.where(used, values, 0.0)
    row = two_levels(deciding.float())[0].double()
    top = deciding.argmax(1)
    new = values.clone()
    for group in range(values.shape[1]):
        ratio = (_best(squares, products, new, group) / row).round().clamp(1, MOST_MULTIPLIER)
        ratio = torch.where(top == group, MOST_MULTIPLIER, ratio)
        new[:, group] = (ratio.float() * row.float()).double()

    def loss(scales: Tensor) -> Tensor:
        gradient = (squares @ scales.unsqueeze(2)).squeeze(2) - 2 * products
        return (scales * gradient).sum(1)

    decides = torch.where(used, before, 0.0).amax(1) == before.amax(1)
    kept = decides & (loss(before) <= loss(new))
    return torch.where(kept.unsqueeze(1), before, new)


def loss_of(error: Tensor, hessian: Tensor) -> float:
    """``tr(E H E^T)``."""
    return float(((error @ hessian) * error).sum())


def solve(
    target: Tensor, hessian: Tensor, shape: tuple[int, int], rounds: int, leveled: bool = False
) -> tuple[Tensor, Scales]:
    """Returns codes and scales: GPTQ, then rounds of scales and codes in turn.

    Scales come to two levels in the last round: with them in all rounds a layer is as good, and
    the model was worse in each of four comparisons.

    Args:
        target: float64 [N, K].
        hessian: Damped, float64 [K, K].
        shape: Of the scales: [1, 1], [N, 1] or [N, K / G].
        rounds: How often scales and codes are improved in turn.
        leveled: Whether the scales are to be in two levels; see `Scales`.
    """
    scales = start_scales(target, hessian, shape)
    codes = compensated_codes(target, hessian, scales)
    products = target @ hessian
    for left in range(rounds, 0, -1):
        scales = scales.in_two_levels() if leveled and left == 1 else scales
        scales = refit(products, hessian, codes, scales)
        codes = descend(target, hessian, codes, scales)
    scales = scales.in_two_levels() if leveled and not rounds else scales
    return codes, refit(products, hessian, codes, scales)
