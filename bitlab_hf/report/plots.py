"""What a report shows: each function makes one plot of a run."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from bitlab_hf.report.run import Run
from bitlab_hf.report.vega import (
    CODES,
    COLOURS,
    FAINT,
    PERCENT,
    Line,
    Spec,
    histograms,
    line_plot,
    row_plot,
)

_EVAL_LOSS = re.compile(r"eval_(?:(.+)_)?loss")
_MOST_KINDS = len(COLOURS)
_MOST_CELLS = 9000
# A perplexity above exp(50) tells nothing more.
_MOST_NATS = 50.0


@dataclass(frozen=True)
class Panel:
    """A plot with what is said around it.

    Attributes:
        name: The element's id.
        head: Its heading.
        spec: The plot; None where the run did not record what it needs.
        note: How to read it, or what was missing.
        wide: Whether it takes the page's whole width.
    """

    name: str
    head: str
    spec: Spec | None
    note: str
    wide: bool = False


def panels(run: Run) -> list[Panel]:
    """Returns all plots, in the order of the page."""
    return [
        loss(run), perplexity(run), by_layer(run), codes(run), flips(run), scales(run),
        saturation(run), weights(run),
    ]  # fmt: skip


def short_names(layers: Sequence[str]) -> list[str]:
    """Returns names without the part that all of them begin with."""
    parts = [name.split(".") for name in layers]
    # The last part always stays.
    ahead = zip(*(part[:-1] for part in parts), strict=False)
    common = len([*takewhile(lambda column: len({*column}) == 1, ahead)])
    return [".".join(part[common:]) for part in parts]


def kinds(layers: Sequence[str]) -> dict[str, list[int]]:
    """Groups layers by the last part of their names, such as q_proj: name and places of each."""
    groups: dict[str, list[int]] = {}
    for place, name in enumerate(layers):
        groups.setdefault(name.rpartition(".")[2], []).append(place)
    if len(groups) > _MOST_KINDS:
        names = list(groups)[_MOST_KINDS - 1 :]
        groups["others"] = [place for name in names for place in groups.pop(name)]
    return groups


def loss(run: Run) -> Panel:
    """Training loss, with its terms where there are several, and its running mean."""
    terms = sorted({name for _, logs in run.logs for name in logs if name.startswith("loss_")})
    steps, values = run.logged("loss")
    head = "Training loss"
    if not steps:
        return Panel("loss", head, None, "The run logged no loss.")
    points = list(zip(steps, values, strict=True))
    reach = 4
    if len(steps) > 6 * reach:
        means = [
            sum(part) / len(part)
            for place in range(len(values))
            if (part := values[max(0, place - reach) : place + reach + 1])
        ]
        lines = [
            Line("at each log", FAINT, points, width=1.2),
            Line(f"mean of {2 * reach + 1} logs", COLOURS[0], list(zip(steps, means, strict=True))),
        ]
    else:
        lines = [Line("loss", COLOURS[0], points)]
    if len(terms) > 1:
        for term, colour in zip(terms[:4], COLOURS[1:], strict=False):
            lines.append(Line(term, colour, list(zip(*run.logged(term), strict=True))))
    note = "Nats a token" if run.recipe is None else "The recipe's terms, added up; nats a token"
    return Panel("loss", head, line_plot(head, lines, _last(run)), f"{note}.")


def perplexity(run: Run) -> Panel:
    """Perplexity on the evaluation text against the full-precision model's."""
    head = "Perplexity against full precision"
    names = sorted({n for _, logs in run.logs for n in logs if _EVAL_LOSS.fullmatch(n)})
    if not names:
        note = "The run was never evaluated: give the Trainer an eval_dataset and eval_strategy."
        return Panel("perplexity", head, None, note)
    lines = []
    for name, colour in zip(names, COLOURS, strict=False):
        steps, nats = run.logged(name)
        points = [(step, exp(one)) for step, one in zip(steps, nats, strict=True)]
        match = _EVAL_LOSS.fullmatch(name)
        part = match.group(1) if match else None
        lines.append(Line(f"ternary, {part}" if part else "ternary", colour, points, True))
    level = None if run.baseline is None else (run.baseline[1], exp(run.baseline[0]))
    note = "Evaluation text; logarithmic. "
    note += (
        "The dashed line is the full-precision model on the same text."
        if level
        else "The full-precision model's was not recorded: see record_baseline, or pass --baseline."
    )
    return Panel(
        "perplexity", head, line_plot(head, lines, _last(run), log=True, level=level), note
    )  # fmt: skip


def exp(nats: float) -> float:
    """Returns the perplexity of a loss in nats."""
    return math.exp(min(nats, _MOST_NATS))


def by_layer(run: Run) -> Panel:
    """Flipped codes of every layer over time; the shares of its codes at the end."""
    name, head = "layers", "Every layer"
    series = run.values["flipped"]
    ends = [run.values[share][-1][1] if run.values[share] else None for share in _SHARES]
    if not series or any(row is None for row in ends):
        note = "The run's weights were sharded, so no codes were counted."
        return Panel(name, head, None, note, True)
    size = -(-len(series) // max(1, _MOST_CELLS // max(1, len(run.layers))))
    blocks = [series[start : start + size] for start in range(0, len(series), size)]
    cells = [
        [_mean([row[layer] for _, row in block]) for block in blocks]
        for layer in range(len(run.layers))
    ]
    bars = [[row[layer] or 0.0 for row in ends if row] for layer in range(len(run.layers))]
    spec = row_plot(
        "Codes flipped in every layer",
        short_names(run.layers),
        [block[-1][0] for block in blocks],
        cells,
        bars,
        ("codes flipped since the last log", "codes at the end"),
    )
    note = (
        "A training that settles fades from left to right. A row that stays bright keeps changing "
        "its mind; one that is dark from the start does not learn."
    )
    return Panel(name, head, spec, note, True)


_SHARES = ("negative", "zero", "positive")


def codes(run: Run) -> Panel:
    """Shares of the codes over all layers."""
    lines = [
        Line(code, colour, list(zip(*run.logged(f"ternary/{name}"), strict=True)))
        for (code, colour), name in zip(CODES.items(), _SHARES, strict=True)
    ]
    head = "Codes over all layers"
    if not lines[1].points:
        return Panel("codes", head, None, "The run's log holds no shares of codes.")
    spec = line_plot(head, lines, _last(run), text=PERCENT)
    return Panel("codes", head, spec, "Share of the weights at each code.")


def flips(run: Run) -> Panel:
    """Flipped codes by kind of layer."""
    head = "Codes flipped since the last log"
    lines = _by_kind(run, "flipped", lambda value, _first: value)
    # Zero has no place on a logarithmic axis.
    lines = [
        Line(one.name, one.colour, [point for point in one.points if point[1] > 0]) for one in lines
    ]
    note = "Mean over the layers of a kind; logarithmic."
    return _plot_of(run, "flips", head, lines, note, log=True)


def scales(run: Run) -> Panel:
    """Scales by kind of layer, relative to the first log."""
    head = "Scale, change since the first log"
    lines = _by_kind(run, "scale", lambda value, first: value / first - 1 if first else None)
    return _plot_of(run, "scales", head, lines, "Mean over the layers of a kind.")


def saturation(run: Run) -> Panel:
    """Saturated activation codes by kind of layer."""
    head = "Activation codes at the end of their range"
    lines = _by_kind(run, "saturated", lambda value, _first: value)
    note = (
        "Share of -127 and 127. Every token has at least one, so 1/K is the least; more means a "
        "flatter distribution, not clipping."
    )
    return _plot_of(run, "saturation", head, lines, note)


def weights(run: Run) -> Panel:
    """Histograms of the latent weights, coloured by their codes."""
    head = "Latent weights around the thresholds"
    found = []
    for snapshot in run.snapshots:
        sums = [
            [float(sum(column)) for column in zip(*rows, strict=True)]
            for rows in zip(*snapshot.counts.values(), strict=True)
        ]
        total = sum(map(sum, sums))
        if total > 0:
            shares = [[count / total for count in row] for row in sums]
            found.append((f"step {snapshot.step:,}", shares))
    if not found:
        return Panel("weights", head, None, "The run took no histograms.", True)
    note = (
        "All layers; the colour is the code that a weight has. Absmean rounds at half a scale "
        "(dashed): weights that gather there flip easily. What lies beyond is in the last bins."
    )
    return Panel("weights", head, histograms(head, found, run.edge), note, True)


def _plot_of(
    run: Run, name: str, head: str, lines: list[Line], note: str, *, log: bool = False
) -> Panel:
    lines = [line for line in lines if line.points]
    if not lines:
        return Panel(name, head, None, "The run did not record it.")
    return Panel(name, head, line_plot(head, lines, _last(run), text=PERCENT, log=log), note)


def _last(run: Run) -> int:
    return max(1, run.steps)


def _by_kind(
    run: Run, quantity: str, of: Callable[[float, float | None], float | None]
) -> list[Line]:
    series = run.values[quantity]
    lines = []
    for (kind, places), colour in zip(kinds(run.layers).items(), COLOURS, strict=False):
        points = []
        for step, row in series:
            found = [
                of(value, series[0][1][place])
                for place in places
                if (value := row[place]) is not None
            ]
            mean = _mean(found)
            if mean is not None:
                points.append((float(step), mean))
        lines.append(Line(kind, colour, points))
    return lines


def _mean(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None
