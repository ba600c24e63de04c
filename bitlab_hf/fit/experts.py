"""Calibration of experts: each one's two matrices by the tokens that its router sends to it.

Which tokens these are, the ternary stream says: its router picks by what it sees behind ternary
layers, and these are the tokens that the expert will have to serve. What each of them should become
is what this same expert makes of the same token in the original stream, also where the original
router sent it elsewhere: the two streams stay token by token beside each other, and an expert is
never asked to imitate another one, whose weights its own are far from.

Where the sum of the experts goes into the stream, the second matrices also take back what is
missing there, one expert after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional as F

from bitlab_hf.fit.kept import KeptLayers, LayerReport
from bitlab_hf.fit.matrix import ExpertMatrix, Matrix, quantized
from bitlab_hf.fit.solve import Moments
from bitlab_hf.fit.streams import Originals, Unit
from bitlab_hf.fit.taps import Batch, ExpertsTap

Solve = Callable[[Matrix, Moments], LayerReport]


@dataclass
class _Share:
    """The tokens of a batch that go to one expert: where they stand, [m], and how much they count,
    float32 [m, 1].
    """

    rows: Tensor
    weights: Tensor


class _Visits:
    """What the experts of a module are given in one batch.

    Attributes:
        original: The tokens in the original stream, [M, H].
        ternary: The same tokens in the ternary stream.
    """

    def __init__(self, original: Tensor, ternary: Tensor, index: Tensor, weights: Tensor) -> None:
        self.original, self.ternary = original, ternary
        self._chosen = index.shape[-1]
        self._numbers, self._order = index.reshape(-1).sort(stable=True)
        self._weights = weights.reshape(-1).float()

    def of(self, expert: int) -> _Share:
        """Returns what goes to an expert."""
        wanted = torch.tensor([expert, expert + 1], device=self._numbers.device)
        first, last = torch.searchsorted(self._numbers, wanted).tolist()
        places = self._order[first:last]
        return _Share(places // self._chosen, self._weights[places].unsqueeze(1))


def fit_experts(
    tap: ExpertsTap,
    unit: Unit,
    batches: list[Batch],
    originals: Originals,
    kept: KeptLayers | None,
    solve: Solve,
) -> Iterator[tuple[Matrix, LayerReport | None]]:
    """Gives experts their ternary weights, or those that are kept; all first projections before
    the second ones.

    Args:
        tap: Of the experts.
        unit: The part of the model that they are in.
        batches: What it is called with.
        originals: What it does in the original stream.
        kept: What was found before.
        solve: Chooses the codes of a matrix by its moments.

    Yields:
        Each matrix with its report, None of one that keeps its rounding.

    Numerics:
        One expert's Hessians are held at a time, beside the tokens of all batches as both streams
        have them before the experts, and once more what is missing behind.
    """
    if kept is not None and kept.has(tap.matrices):
        yield from ((matrix, _read(matrix, kept)) for matrix in tap.matrices)
        return
    visits: dict[int, _Visits] = {}
    for number, batch in enumerate(batches):
        pair = unit.inputs(tap, number, batch, originals)
        if pair is not None and tap.routing is not None:
            original, ternary = pair
            if not tap.experts.keeps_tokens:
                # What stands in a row of the original stream is another token.
                original = ternary
            visits[number] = _Visits(original, ternary, *tap.routing)
    *firsts, second = tap.stages
    for number, matrix in chain.from_iterable(map(enumerate, firsts)):
        shares = [(one, one.of(number)) for one in visits.values()]
        yield matrix, _fit(matrix, shares, partial(_first_moments, matrix, shares), kept, solve)
    missing = _missing(tap, unit, batches, originals, visits)
    gaps = [missing[at] for at in visits] if missing else None
    for number, matrix in enumerate(second):
        shares = [(one, one.of(number)) for one in visits.values()]
        inputs = [_second_inputs(tap, number, one, share) for one, share in shares]
        moments = partial(_second_moments, matrix, shares, inputs, gaps)
        report = _fit(matrix, shares, moments, kept, solve)
        if gaps is not None:
            _pass_on(matrix, shares, inputs, gaps)
        yield matrix, report


_Shares = list[tuple[_Visits, _Share]]


def _read(matrix: ExpertMatrix, kept: KeptLayers) -> LayerReport | None:
    report = kept.read(matrix)
    matrix.keeps_rounding = report is None
    return report


def _fit(
    matrix: ExpertMatrix,
    shares: _Shares,
    moments: Callable[[], Moments],
    kept: KeptLayers | None,
    solve: Solve,
) -> LayerReport | None:
    """Gives one matrix its ternary weight."""
    if kept is not None and kept.has([matrix]):
        return _read(matrix, kept)
    report = None
    # One token is enough to be better than rounding, on others too: damping does the rest.
    if any(len(share.rows) for _, share in shares):
        report = solve(matrix, moments())
    else:
        matrix.keeps_rounding = True
    if kept is not None:
        kept.write(matrix, report)
    return report


def _first_moments(matrix: ExpertMatrix, shares: _Shares) -> Moments:
    moments = Moments.zeros(matrix.weight.shape[1], matrix.weight.device)
    for visits, share in shares:
        if len(share.rows):
            inputs = quantized(visits.ternary[share.rows], matrix.config)
            moments.add(visits.original[share.rows], inputs)
    return moments


def _second_inputs(
    tap: ExpertsTap, number: int, visits: _Visits, share: _Share
) -> tuple[Tensor, Tensor]:
    """Returns what an expert's second projection reads: originally, and as it is multiplied."""
    original = tap.inner(visits.original[share.rows], number, original=True)
    inner = tap.inner(visits.ternary[share.rows], number, original=False)
    return original, quantized(inner, tap.stages[-1][number].config) if len(inner) else inner


def _missing(
    tap: ExpertsTap,
    unit: Unit,
    batches: list[Batch],
    originals: Originals,
    visits: dict[int, _Visits],
) -> dict[int, Tensor]:
    """Returns what is missing in the sum behind the experts, float32 [M, H] of each batch; nothing
    where what they give is not added as it is.
    """
    if tap.experts.has_post_expert_norm or not tap.experts.keeps_tokens:
        return {}
    found = {
        number: unit.missing(tap, number, batch, originals)
        for number, batch in enumerate(batches)
        if number in visits
    }
    return {number: gap.view(-1, gap.shape[-1]) for number, gap in found.items() if gap is not None}


def _second_moments(
    matrix: ExpertMatrix,
    shares: _Shares,
    inputs: list[tuple[Tensor, Tensor]],
    gaps: list[Tensor] | None,
) -> Moments:
    """Sums up what an expert's second projection reads, and what it is to give.

    Where its output is added to the stream it also takes back what is missing there: what stands
    wrong before the experts, and what those that were solved before it have put wrong.
    """
    weight = matrix.weight
    moments = Moments.zeros(weight.shape[1], weight.device)
    for at, ((_, share), (original, inner)) in enumerate(zip(shares, inputs, strict=True)):
        if not len(share.rows):
            continue
        weighted = inner * share.weights
        if gaps is None:
            moments.add(original * share.weights, weighted)
        else:
            moments.add_wanted(_product(weighted, weight) + gaps[at][share.rows], weighted)
    return moments


def _pass_on(
    matrix: ExpertMatrix,
    shares: _Shares,
    inputs: list[tuple[Tensor, Tensor]],
    gaps: list[Tensor],
) -> None:
    """Adds what an expert puts wrong to what the next ones find missing."""
    ternary = matrix.ternary()
    if ternary is None:
        return
    error = matrix.weight.float() - ternary
    for (_, share), (_, inner), gap in zip(shares, inputs, gaps, strict=True):
        gap.index_add_(0, share.rows, _product(inner * share.weights, error))


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """Returns ``x @ W^T`` in float32, also under autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), weight.float())
