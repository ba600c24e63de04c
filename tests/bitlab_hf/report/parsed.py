"""A page as its elements: what its HTML holds, and what a browser has drawn of it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any


@dataclass
class Plot:
    """What one plot shows, from its specification."""

    lines: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    bars: int = 0
    panels: dict[str, int] = field(default_factory=dict)
    levels: int = 0


def plot_of(spec: dict[str, Any]) -> Plot:
    plot = Plot()
    for layer in spec.get("layer", []):
        y = layer["encoding"].get("y", {})
        if layer["mark"]["type"] == "line":
            name = layer["encoding"]["color"]["datum"]
            plot.lines[name] = sum(y["field"] in row for row in spec["data"]["values"])
        plot.levels += layer["mark"]["type"] == "rule" and "datum" in y
    if "hconcat" in spec:
        cells, bars = (part["data"]["values"] for part in spec["hconcat"])
        plot.rows = {row["row"]: sum(one is not None for one in row["share"]) for row in cells}
        plot.bars = len(bars)
    if "facet" in spec:
        plot.panels = dict(Counter(row["panel"] for row in spec["data"]["values"]))
    return plot


class Page(HTMLParser):
    """Plots by their ids, headings, and everything that could fetch or run something."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.specs: dict[str, dict[str, Any]] = {}
        self.heads: list[str] = []
        self.scripts: list[dict[str, str | None]] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.ids: set[str | None] = set()
        self.text = ""
        self._within: str | None = None
        self.feed(html)
        self.plots = {name: plot_of(spec) for name, spec in self.specs.items()}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._within = tag
        given = dict(attrs)
        self.tags.add(tag)
        self.ids.add(given.get("id"))
        self.addresses += [
            str(value) for key, value in attrs if key in ("src", "href", "xlink:href", "action")
        ]
        if tag == "script":
            self.scripts.append(given)

    def handle_endtag(self, tag: str) -> None:
        self._within = None

    def handle_data(self, data: str) -> None:
        if self._within != "script":
            self.text += data
        elif "data-for" in self.scripts[-1]:
            self.specs[str(self.scripts[-1]["data-for"])] = json.loads(data)
        if self._within == "h2":
            self.heads.append(data)


class Drawn(HTMLParser):
    """What a browser has drawn: of each plot the marks by their kinds, each with its points."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.plots: dict[str, dict[str, list[int]]] = {}
        self._plot: dict[str, list[int]] = {}
        self._kind: str | None = None
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        style = (given.get("class") or "").split()
        if "vega-embed" in style:
            self._plot = self.plots.setdefault(str(given["id"]), {})
        elif tag == "g":
            self._kind = style[0] if "role-mark" in style else None
        elif self._kind and tag in ("path", "line"):
            path = given.get("d") or ""
            points = path.count("M") + path.count("L")
            self._plot.setdefault(self._kind.removeprefix("mark-"), []).append(points)

    def handle_endtag(self, tag: str) -> None:
        if tag == "g":
            self._kind = None
