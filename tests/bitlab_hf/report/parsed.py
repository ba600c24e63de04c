"""A page as its elements: what a reader of the HTML sees, with the browser's parser or Python's."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser


@dataclass
class Plot:
    """What one svg element holds."""

    lines: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    bars: int = 0
    panels: dict[str, int] = field(default_factory=dict)
    levels: int = 0


class Page(HTMLParser):
    """Plots by their ids, headings, and everything that could fetch or run something."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.plots: dict[str, Plot] = {}
        self.heads: list[str] = []
        self.scripts: list[dict[str, str | None]] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self._plot = Plot()
        self._within: dict[str, int] | None = None
        self._key = ""
        self._in_head = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        style = (given.get("class") or "").split()
        self.tags.add(tag)
        self.addresses += [
            str(value) for key, value in attrs if key in ("src", "href", "xlink:href", "action")
        ]
        if tag == "script":
            self.scripts.append(given)
        elif tag == "h2":
            self._in_head = True
        elif tag == "svg":
            self._plot = self.plots.setdefault(str(given.get("id")), Plot())
            self._within = None
        elif tag == "polyline":
            self._plot.lines[str(given["data-series"])] = len(str(given["points"]).split())
        elif tag == "g":
            self._within = self._plot.rows if "data-row" in given else self._plot.panels
            self._key = str(given.get("data-row") or given.get("data-panel"))
            self._within[self._key] = 0
        elif tag == "rect" and "bar" in style:
            self._plot.bars += 1
        elif tag == "rect" and self._within is not None:
            self._within[self._key] += 1
        elif tag == "line" and style == ["level"]:
            self._plot.levels += 1

    def handle_endtag(self, tag: str) -> None:
        if tag == "g":
            self._within = None
        elif tag == "h2":
            self._in_head = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_head:
            self.heads.append(data)
