"""Plots as Vega-Lite specifications, and the scripts that draw them in the page.

What is drawn where is Vega-Lite's business; what is said here is what belongs to this report: the
page's colours, which are CSS variables and so follow the reader's theme, and the values that are
shown under the pointer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

from bitcore.errors import MissingExtraError

Spec = dict[str, Any]

MOST_POINTS = 400
PERCENT = ".3~p"
NUMBER = ",.4~r"
COLOURS = tuple(f"var(--k{place})" for place in range(7))
FAINT = "var(--nil)"
# The codes -1, 0 and +1.
CODES = {"-1": "var(--neg)", "0": "var(--nil)", "+1": "var(--pos)"}

_TEXT = {"labelColor": "var(--dim)", "titleColor": "var(--dim)", "titleFontWeight": "normal"}
_SIZES = {"labelFontSize": 11.5, "titleFontSize": 11.5}
_CONFIG: Spec = {
    "background": None,
    "padding": {"left": 0, "right": 12, "top": 4, "bottom": 2},
    # As the page's; Vega measures words with it, so it has to be named.
    "font": "system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif",
    "view": {"stroke": None},
    "axis": {"gridColor": "var(--grid)", "domainColor": "var(--dim)", "tickColor": "var(--dim)",
             **_TEXT, **_SIZES},
    "axisX": {"grid": False, "titleAnchor": "end"},
    "axisY": {"domain": False, "ticks": False, "labelPadding": 7, "title": None},
    "legend": {"orient": "top", "columnPadding": 14, "labelOffset": 5, **_TEXT, **_SIZES,
               "labelColor": "var(--ink)", "titleColor": "var(--ink)"},
    "header": {"labelColor": "var(--ink)", "labelFontSize": 12, "title": None},
    # As English has it, but for what a line lacks at a step.
    "locale": {"number": {"decimal": ".", "thousands": ",", "grouping": [3],
                          "currency": ["$", ""], "nan": "-"}},
}  # fmt: skip
_DASHED = [5, 4]
_STEPS = {"title": "step", "tickCount": 6}
_START = f"""
for (const holder of document.querySelectorAll("script[data-for]")) {{
  vegaEmbed(document.getElementById(holder.dataset.for), JSON.parse(holder.textContent), {{
    mode: "vega-lite", renderer: "svg", actions: false, ast: true, defaultStyle: false,
    tooltip: {{disableDefaultStyle: true}}, config: {json.dumps(_CONFIG)},
  }});
}}
"""


@dataclass(frozen=True)
class Line:
    """One line of a plot: name, colour, points, whether each of them is marked, width."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]
    dots: bool = False
    width: float = 2

    def drawn(self) -> list[tuple[float, float]]:
        """Returns the points, or means of neighbours where there are more than can be seen."""
        size = -(-len(self.points) // MOST_POINTS)
        if size <= 1:
            return list(self.points)
        return [
            (sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part))
            for start in range(0, len(self.points), size)
            if (part := self.points[start : start + size])
        ]


@cache
def scripts() -> str:
    """Returns the text of the one script that draws every plot of a page.

    Vega evaluates its expressions itself (``ast``), so a policy without ``unsafe-eval`` does.

    Raises:
        MissingExtraError: The package ``vl-convert-python``, which carries Vega, is not installed.
    """
    try:
        import vl_convert
    except ImportError as error:
        raise MissingExtraError(
            "report: the package vl-convert-python must be installed, got none\n"
            'In BitLab\'s clone, run `pip install ".[report]"`.'
        ) from error
    return vl_convert.javascript_bundle(_START).replace("</script", "<\\/script")


def line_plot(
    title: str,
    lines: Sequence[Line],
    last: float,
    *,
    text: str = NUMBER,
    log: bool = False,
    level: tuple[str, float] | None = None,
) -> Spec:
    """Returns lines over steps, and all of their values at the step under the pointer.

    Args:
        title: What is shown.
        lines: At least one of them with a point.
        last: The steps are 0 to this.
        text: How d3-format writes a value.
        log: Whether equal heights are equal ratios; all values are above 0.
        level: Name and value of a dashed line across all of the plot.
    """
    drawn = [line.drawn() for line in lines]
    values = [value for points in drawn for _, value in points] + ([level[1]] if level else [])
    text = text if max(map(abs, values)) < 1e7 else ".3~g"
    rows: dict[float, dict[str, float]] = {}
    for place, points in enumerate(drawn):
        for step, value in points:
            rows.setdefault(step, {"step": step})[f"y{place}"] = _short(value)
    names = [line.name for line in lines]
    colours = [line.colour for line in lines]
    dashes = [[1, 0] for _ in lines]
    scale: Spec = {"zero": False}
    if log:
        scale = {"type": "log", "nice": False, "domain": [min(values) / 1.1, max(values) * 1.1]}
    y = {"type": "quantitative", "scale": scale, "axis": {"format": text, "tickCount": 5}}
    layer: list[Spec] = [
        {
            "mark": {"type": "line", "invalid": "filter", "strokeWidth": line.width,
                     "point": {"size": 36} if line.dots or len(line.points) == 1 else False},
            "encoding": {"y": {"field": f"y{place}", **y}, **_named(line.name)},
        }
        for place, line in enumerate(lines)
    ]  # fmt: skip
    if level:
        name, value = level
        layer.append({
            "data": {"values": [{}]},
            "mark": {"type": "rule", "strokeWidth": 1.4},
            "encoding": {"x": None, "y": {"datum": value, **y}, **_named(name)},
        })  # fmt: skip
        for row in rows.values():
            row[f"y{len(names)}"] = _short(value)
        names, colours, dashes = [*names, name], [*colours, "var(--ink)"], [*dashes, _DASHED]
    # What the pointer is nearest to: a rule at its step, unseen elsewhere.
    layer.append({
        "params": [{"name": "near", "select": {
            "type": "point", "encodings": ["x"], "nearest": True, "on": "pointermove",
            "clear": "pointerout",
        }}],
        "mark": {"type": "rule", "color": "var(--dim)"},
        "encoding": {
            "opacity": {"condition": {"param": "near", "empty": False, "value": 1}, "value": 0},
            # With a space behind it no name reads as a whole number, which JavaScript puts first.
            "tooltip": [_number("step", format=",.0f")]
            + [_number(f"y{n}", title=f"{name} ", format=text) for n, name in enumerate(names)],
        },
    })  # fmt: skip
    legend = {"title": None, "symbolType": "stroke", "symbolSize": 160, "symbolStrokeWidth": 2}
    legend |= {"labelLimit": 300} if len(names) < 6 else {"labelLimit": 100, "columns": 4}
    return {
        "description": title,
        "width": 560,
        "height": 290,
        "autosize": {"type": "fit", "contains": "padding"},
        "data": {"values": [rows[step] for step in sorted(rows)]},
        "encoding": {
            "x": _number("step", scale={"domain": [0, last]}, axis=_STEPS),
            "color": {"scale": {"domain": names, "range": colours}, "legend": legend},
            "strokeDash": {"scale": {"domain": names, "range": dashes}, "legend": legend},
        },
        "layer": layer,
    }


def row_plot(
    title: str,
    names: Sequence[str],
    steps: Sequence[int],
    cells: Sequence[Sequence[float | None]],
    bars: Sequence[Sequence[float]],
    heads: tuple[str, str],
) -> Spec:
    """Returns a heat map of rows over steps, with a stacked bar of the three codes for each row.

    Args:
        title: What is shown.
        names: Of the rows.
        steps: At which the columns end; a column begins where the one before it ends.
        cells: One list a row, one share a column; None where there is none.
        bars: One list of three shares a row, which add up to 1.
        heads: Above the map and above the bars.
    """
    found = [value for row in cells for value in row if value]
    high = max(found, default=1e-3)
    low = max(min(found, default=high), high / 1000)
    low = low if low < high else high / 10
    # The first column is as wide as the second.
    starts = [max(0, 2 * steps[0] - steps[1]) if len(steps) > 1 else 0, *steps[:-1]]
    height = len(names) * min(22.0, max(2.5, 470 / len(names)))
    row = {"field": "row", "sort": None, "scale": {"padding": 0.03}}
    layer = _name("row", title="layer")
    heat = {
        "width": 640,
        "height": height,
        "data": {"values": [
            {"row": name, "share": [None if share is None else _short(share) for share in shares]}
            for name, shares in zip(names, cells, strict=True)
        ]},
        "transform": [
            {"flatten": ["share"]},
            {"window": [{"op": "row_number", "as": "column"}], "groupby": ["row"]},
            {"filter": "isValid(datum.share)"},
            {"calculate": f"{starts}[datum.column - 1]", "as": "start"},
            {"calculate": f"{[*steps]}[datum.column - 1]", "as": "step"},
        ],
        "mark": "rect",
        "encoding": {
            "x": _number("start", scale={"domain": [starts[0], steps[-1]]}, axis=_STEPS),
            "x2": {"field": "step"},
            "y": {**row, "axis": {"labelFontSize": 9.5, "labelOverlap": True}},
            "color": _number(
                "share",
                scale={"type": "log", "scheme": "cividis", "domain": [low, high], "clamp": True},
                legend={"title": heads[0], "format": ".2~p", "values": [low, high],
                        "gradientLength": 190, "gradientThickness": 11},
            ),
            "tooltip": [
                layer,
                _number("step", format=",.0f"),
                _number("share", title=heads[0], format=PERCENT),
            ],
        },
    }  # fmt: skip
    ends = {
        "width": 300,
        "height": height,
        "data": {"values": [
            {"row": name, "order": order, "code": code, "share": _short(share)}
            for name, shares in zip(names, bars, strict=True)
            for order, (code, share) in enumerate(zip(CODES, shares, strict=True))
        ]},
        "mark": "bar",
        "encoding": {
            "x": _number("share", scale={"domain": [0, 1]},
                         axis={"title": None, "format": "%", "tickCount": 5}),
            "y": {**row, "axis": None},
            "order": {"field": "order"},
            "color": {**_CODE, "legend": {"title": heads[1], "symbolType": "square"}},
            "tooltip": [layer, _name("code"), _number("share", format=".1%")],
        },
    }  # fmt: skip
    return {
        "description": title,
        "hconcat": [heat, ends],
        "spacing": 28,
        "resolve": {"scale": {"color": "independent"}},
    }


def histograms(
    title: str, panels: Sequence[tuple[str, Sequence[Sequence[float]]]], edge: float
) -> Spec:
    """Returns small histograms side by side, on one scale, with the thresholds at half a scale.

    Args:
        title: What is shown.
        panels: Of each its head, and for each of the three codes one share a bin.
        edge: The bins are equal parts of -edge to edge.
    """
    bins = len(panels[0][1][0])
    edges = [round(2 * edge * place / bins - edge, 4) for place in range(bins + 1)]
    bars = {
        "mark": {"type": "bar", "binSpacing": 0.6},
        "encoding": {
            "x": _number("low", bin="binned", scale={"domain": [-edge, edge]},
                         axis={"title": "weight / scale", "tickCount": 5, "format": "d"}),
            "x2": {"field": "high"},
            "y": _number("share", axis={"format": PERCENT, "tickCount": 5}),
            "order": {"field": "order"},
            "color": {**_CODE, "legend": None},
            "tooltip": [_number("low", title="scales, from"), _number("high", title="to"),
                        _name("code"), _number("share", format=PERCENT)],
        },
    }  # fmt: skip
    thresholds = {
        "data": {"values": [{"at": -0.5}, {"at": 0.5}]},
        "mark": {"type": "rule", "strokeDash": _DASHED, "color": "var(--ink)"},
        "encoding": {"x": _number("at")},
    }
    gap = 14
    return {
        "description": title,
        "data": {"values": [
            {"panel": head, "low": low, "high": high, "order": order, "code": code,
             "share": _short(share)}
            for head, counts in panels
            for order, (code, shares) in enumerate(zip(CODES, counts, strict=True))
            for (low, high), share in zip(pairwise(edges), shares, strict=True)
            if share > 0
        ]},
        "facet": {"column": _name("panel", sort=[head for head, _ in panels])},
        "spacing": gap,
        "spec": {
            "width": (1060 - gap * (len(panels) - 1)) / len(panels),
            "height": 190,
            "layer": [bars, thresholds],
        },
    }  # fmt: skip


def _number(field: str, **more: Any) -> Spec:
    return {"field": field, "type": "quantitative", **more}


def _name(field: str, **more: Any) -> Spec:
    return {"field": field, "type": "nominal", **more}


def _named(name: str) -> Spec:
    """Returns what gives a line the colour and the dashes of its name, and one entry for both."""
    return {"color": {"datum": name}, "strokeDash": {"datum": name}}


_CODE = _name("code", scale={"domain": [*CODES], "range": [*CODES.values()]})


def _short(value: float) -> float:
    """Returns a value with as many digits as anyone reads, for the size of the page."""
    return float(f"{value:.5g}")
