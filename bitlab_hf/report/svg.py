"""Plots as inline SVG: lines, a heat map with bars beside it, small histograms.

Drawn here rather than by a plotting library: the page takes its colours from the reader's light or
dark theme through classes, every mark carries its value as text, and no library is needed to make
or to show it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from bitlab_hf.report.axes import Axis

MOST_POINTS = 400
# About the width of a letter in the page's font.
_LETTER = 6.3


@dataclass(frozen=True)
class Line:
    """One line of a plot: its name, its class in the style sheet, its points."""

    name: str
    style: str
    points: Sequence[tuple[float, float]]
    dots: bool = False

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


@dataclass(frozen=True)
class Box:
    """A rectangle in a drawing, with an axis along each side."""

    left: float
    top: float
    width: float
    height: float
    x: Axis
    y: Axis

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Returns the coordinates of a point."""
        return (
            self.left + self.x.at(x) * self.width,
            self.top + (1 - self.y.at(y)) * self.height,
        )

    def grid(self, y_lines: bool = True) -> str:
        """Returns the lines, the numbers and the labels of both axes."""
        parts = []
        bottom, right = self.top + self.height, self.left + self.width
        for tick in self.y.ticks:
            height = self.place(self.x.low, tick)[1]
            if y_lines:
                parts.append(
                    f'<line class="grid" x1="{self.left:.1f}" x2="{right:.1f}" '
                    f'y1="{height:.1f}" y2="{height:.1f}"/>'
                )
            parts.append(text(self.left - 7, height + 4, self.y.text(tick), "tick end"))
        for tick in self.x.ticks:
            across = self.place(tick, self.y.low)[0]
            parts.append(
                f'<line class="axis" x1="{across:.1f}" x2="{across:.1f}" y1="{bottom:.1f}" '
                f'y2="{bottom + 4:.1f}"/>'
            )
            parts.append(text(across, bottom + 17, self.x.text(tick), "tick middle"))
        parts.append(
            f'<line class="axis" x1="{self.left:.1f}" x2="{right:.1f}" y1="{bottom:.1f}" '
            f'y2="{bottom:.1f}"/>'
        )
        if self.x.label:
            parts.append(text(right, bottom + 32, self.x.label, "label end"))
        return "".join(parts)


def text(x: float, y: float, words: str, style: str = "") -> str:
    """Returns words at a place."""
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'


def drawing(name: str, width: float, height: float, content: str, title: str) -> str:
    """Returns an SVG element of this size, which scales with the page."""
    return (
        f'<svg id="{escape(name)}" role="img" aria-label="{escape(title)}" '
        f'viewBox="0 0 {width:g} {height:g}" xmlns="http://www.w3.org/2000/svg">{content}</svg>'
    )


def line_plot(
    name: str,
    title: str,
    lines: Sequence[Line],
    x: Axis,
    y: Axis,
    *,
    level: tuple[str, float] | None = None,
    size: tuple[float, float] = (560, 290),
) -> str:
    """Returns lines over steps, with a legend; a level is a dashed line across all of it.

    The values also stand in a script element of data, for the page's read-out.
    """
    width, height = size
    box = Box(58, 34, width - 58 - 16, height - 34 - 42, x, y)
    parts = [box.grid(), _legend([(line.name, line.style) for line in lines], level)]
    if level is not None:
        height_of = box.place(x.low, level[1])[1]
        parts.append(
            f'<line class="level" x1="{box.left:.1f}" x2="{box.left + box.width:.1f}" '
            f'y1="{height_of:.1f}" y2="{height_of:.1f}"/>'
        )
    for line in lines:
        places = [box.place(*point) for point in line.drawn()]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        parts.append(
            f'<polyline class="line {line.style}" data-series="{escape(line.name)}" '
            f'points="{path}"/>'
        )
        if line.dots or len(places) == 1:
            parts += [
                f'<circle class="dot {line.style}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>'
                for a, b in places
            ]
    held = {
        "box": [box.left, box.top, box.width, box.height],
        "x": [x.low, x.high],
        "level": None if level is None else [level[0], y.text(level[1])],
        "lines": [
            {
                "name": line.name,
                "style": line.style,
                "points": [
                    [round(a, 2), round(box.place(a, b)[1], 1), y.text(b)] for a, b in line.drawn()
                ],
            }
            for line in lines
        ],
    }
    data = json.dumps(held, separators=(",", ":")).replace("<", "\\u003c")
    return (
        drawing(name, width, height, "".join(parts), title)
        + f'<script type="application/json" data-for="{escape(name)}">{data}</script>'
    )


def _legend(names: Iterable[tuple[str, str]], level: tuple[str, float] | None) -> str:
    entries = [*names, *([(level[0], "level")] if level else [])]
    mark, gap = (18.0, 16.0) if len(entries) < 6 else (12.0, 9.0)
    wide = sum(mark + 5 + _LETTER * len(words) + gap for words, _ in entries)
    parts, left = [], 58.0 if wide < 490 else 6.0
    for words, style in entries:
        parts.append(
            f'<line class="line {style}" x1="{left:.1f}" x2="{left + mark:.1f}" y1="16" y2="16"/>'
        )
        parts.append(text(left + mark + 5, 20, words, "legend"))
        left += mark + 5 + _LETTER * len(words) + gap
    return "".join(parts)


@dataclass(frozen=True)
class Rows:
    """A heat map with a bar beside each row.

    Attributes:
        names: Of the rows.
        steps: Of the columns.
        cells: One list a row, one value a column; None where there is none.
        colour: The axis of the colours.
        bars: One list of shares a row, which add up to 1.
        bar_names: Of the parts of a bar, with the classes of the style sheet.
    """

    names: Sequence[str]
    steps: Sequence[int]
    cells: Sequence[Sequence[float | None]]
    colour: Axis
    bars: Sequence[Sequence[float]]
    bar_names: Sequence[tuple[str, str]]


SHADES = 24


def row_plot(name: str, title: str, rows: Rows, heads: tuple[str, str], width: float = 1144) -> str:
    """Returns a heat map of rows over steps, with a stacked bar for each row."""
    count = max(1, len(rows.names))
    pitch = min(22.0, max(2.5, 470 / count))
    every = max(1, -(-11 // int(max(1, pitch))))
    left, top, gap, bars_width = 136.0, 40.0, 28.0, 300.0
    map_width = width - left - gap - bars_width - 24
    bottom = top + pitch * count
    column = map_width / max(1, len(rows.steps))
    parts = [text(left, 14, heads[0], "head"), _shades(rows.colour, left + map_width)]
    bars_left = left + map_width + gap
    parts.append(text(bars_left, 14, heads[1], "head"))
    across = bars_left
    for words, style in rows.bar_names:
        parts.append(f'<rect class="{style}" x="{across:.1f}" y="22" width="11" height="11"/>')
        parts.append(text(across + 16, 31.5, words, "legend"))
        across += 16 + 7 * len(words) + 16
    for row, words in enumerate(rows.names):
        above = top + row * pitch
        if row % every == 0:
            parts.append(text(left - 7, above + pitch / 2 + 3.2, words, "row end"))
        parts.append(f'<g data-row="{escape(words)}">')
        for place, value in enumerate(rows.cells[row]):
            if value is None:
                continue
            shade = min(SHADES - 1, int(rows.colour.at(value) * SHADES))
            parts.append(
                f'<rect class="h{shade}" x="{left + place * column:.2f}" y="{above:.2f}" '
                f'width="{column + 0.3:.2f}" height="{pitch - 0.5:.2f}"><title>{escape(words)}, '
                f"step {rows.steps[place]}: {escape(rows.colour.text(value))}</title></rect>"
            )
        parts.append("</g>")
        start = bars_left
        for share, (part, style) in zip(rows.bars[row], rows.bar_names, strict=True):
            parts.append(
                f'<rect class="{style} bar" x="{start:.2f}" y="{above:.2f}" '
                f'width="{share * bars_width:.2f}" height="{pitch - 0.5:.2f}">'
                f"<title>{escape(words)}: {escape(part)} {100 * share:.1f} %</title></rect>"
            )
            start += share * bars_width
    parts += _columns(rows.steps, left, column, bottom)
    for share in (0, 25, 50, 75, 100):
        parts.append(
            text(bars_left + share / 100 * bars_width, bottom + 16, f"{share} %", "tick middle")
        )
    return drawing(name, width, bottom + 36, "".join(parts), title)


def _columns(steps: Sequence[int], left: float, column: float, bottom: float) -> list[str]:
    axis = Axis.over(steps, tight=True, parts=7)
    parts = []
    for tick in axis.ticks:
        place = min(range(len(steps)), key=lambda one: abs(steps[one] - tick))
        across = left + (place + 0.5) * column
        parts.append(text(across, bottom + 16, f"{steps[place]:,}", "tick middle"))
    parts.append(text(left + column * len(steps), bottom + 31, "step", "label end"))
    return parts


def _shades(colour: Axis, right: float) -> str:
    """Returns the key of the colours, ending at the right."""
    width, top = 8.0, 22.0
    left = right - SHADES * width - 46
    parts = [
        f'<rect class="h{shade}" x="{left + shade * width:.1f}" y="{top}" width="{width + 0.3}" '
        f'height="11"/>'
        for shade in range(SHADES)
    ]
    parts.append(text(left - 6, top + 9.5, colour.text(colour.low), "tick end"))
    parts.append(text(right, top + 9.5, colour.text(colour.high), "tick end"))
    return "".join(parts)


def histograms(
    name: str,
    title: str,
    panels: Sequence[tuple[str, Sequence[Sequence[float]]]],
    edge: float,
    styles: Sequence[str],
    text_of: Callable[[float], str],
    width: float = 1144,
) -> str:
    """Returns small histograms side by side, on one scale.

    Args:
        name: The element's id.
        title: What is shown.
        panels: Of each its head, and for each style one share a bin.
        edge: The bins are equal parts of -edge to edge.
        styles: Classes of what is stacked in a bin.
        text_of: Writes a share.
        width: Of the drawing.
    """
    left, gap, top, height = 58.0, 14.0, 26.0, 190.0
    each = (width - left - 12 - gap * (len(panels) - 1)) / max(1, len(panels))
    totals = [[sum(parts) for parts in zip(*rows, strict=True)] for _, rows in panels]
    y = Axis.over((max(bins) for bins in totals), zero=True, text=text_of)
    x = Axis(-edge, edge, (-2.0, -1.0, 0.0, 1.0, 2.0))
    parts = []
    for index, (head, rows) in enumerate(panels):
        box = Box(left + index * (each + gap), top, each, height, x, y)
        axis = y if index == 0 else Axis(y.low, y.high, ())
        parts.append(Box(box.left, top, each, height, x, axis).grid())
        parts.append(text(box.left + each / 2, 14, head, "head middle"))
        bins = len(totals[index])
        wide = each / bins
        parts.append(f'<g data-panel="{escape(head)}">')
        for place in range(bins):
            base = 0.0
            for row, style in zip(rows, styles, strict=True):
                share = row[place]
                if share <= 0:
                    continue
                upper, lower = box.place(0, base + share)[1], box.place(0, base)[1]
                parts.append(
                    f'<rect class="{style}" x="{box.left + place * wide:.2f}" y="{upper:.2f}" '
                    f'width="{max(0.5, wide - 0.6):.2f}" height="{lower - upper:.2f}"><title>'
                    f"{(place + 0.5) * 2 * edge / bins - edge:.2f} scales: "
                    f"{escape(text_of(share))}</title></rect>"
                )
                base += share
        parts.append("</g>")
        for at in (-0.5, 0.5):
            across = box.place(at, 0)[0]
            parts.append(
                f'<line class="level" x1="{across:.1f}" x2="{across:.1f}" y1="{top:.1f}" '
                f'y2="{top + height:.1f}"/>'
            )
    parts.append(text(width - 12, top + height + 32, "weight / scale", "label end"))
    return drawing(name, width, top + height + 40, "".join(parts), title)
