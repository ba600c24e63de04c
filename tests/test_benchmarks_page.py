"""The pages of benchmarks: what their script makes of the runs, without a figure of their own."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts/bench"))

import page  # noqa: E402

NUMBER = re.compile(r"(?<![\w.-])\d[\d,]*(?:\.\d+)?(?!\w|\.\d)")
# What tables that are written by hand are of.
MEANINGS = (
    ["column", "meaning"],
    ["engine", "what it is"],
    ["option or variable", "what it does"],
    ["part", "what is served"],
    ["refused", "instead"],
)


@dataclass(frozen=True)
class Line:
    """A row of a table: its cells by column, and which of them are figures."""

    columns: list[str]
    cells: list[str]
    figures: list[bool]

    @property
    def run(self) -> dict[str, Any]:
        name = re.fullmatch(r"\[([\w-]+)\]\((?:benchmarks\.md)?#\1\)", self.cells[-1])
        assert name, self.cells
        found: dict[str, Any] = json.loads((page.FOLDER / f"{name[1]}.json").read_text())
        return found


def split(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def tables(text: str) -> Iterator[list[Line]]:
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        columns, rule, *rows = (split(line) for line in block.splitlines())
        figures = [cell == "--:" for cell in rule]
        yield [Line(columns, row, figures) for row in rows]


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from numbers(one)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def words(value: Any) -> str:
    if isinstance(value, dict | list):
        return " ".join(map(words, value.values() if isinstance(value, dict) else value))
    return str(value)


def unit(text: str) -> float:
    """Half of the last digit that is shown."""
    return 0.5 * 10.0 ** -len(text.partition(".")[2])


def value(text: str) -> float:
    return float(text.replace(",", ""))


def is_held(text: str, known: list[float]) -> bool:
    return any(abs(value(text) - one) <= unit(text) * (1 + 1e-6) for one in known)


def is_ratio(text: str, first: str, second: str) -> bool:
    """Whether a ratio is that of two figures, one over the other, as far as they are shown."""
    (low, high), (least, most) = (
        (value(one) - unit(one), value(one) + unit(one)) for one in (first, second)
    )
    return any(
        below - unit(text) <= value(text) <= above + unit(text)
        for below, above in ((low / most, high / least), (least / high, most / low))
    )


def faults(line: Line) -> list[str]:
    """The figures of a row that its run does not hold."""
    run = line.run
    known = list(numbers(run["result"]))
    told = words(run["result"])
    found = [] if run["label"] == line.cells[-3] else [line.cells[-3]]
    found += [] if run["date"] == line.cells[-2] else [line.cells[-2]]
    for place, (column, cell) in enumerate(zip(line.columns, line.cells, strict=True)):
        if place >= len(line.cells) - 3 or cell == "-":
            continue
        before = line.cells[place - 2 : place]
        if column == "ratio" and "-" not in before:
            found += [] if is_ratio(cell, *before) else [cell]
        elif line.figures[place] or column == "measured":
            found += [one for one in NUMBER.findall(cell) if not is_held(one, known)]
        elif cell not in told:
            found += [one for one in re.findall(r"\d+", cell) if one not in told]
    return found


@pytest.mark.parametrize("document", page.DOCUMENTS, ids=lambda path: path.stem)
def test_the_script_makes_the_page(document: Path) -> None:
    text = document.read_text()
    where = "" if document == page.DOCUMENTS[0] else page.DOCUMENTS[0].name
    assert page.fill(text, page.load_runs(page.FOLDER), where) == text


def test_every_question_is_on_a_page() -> None:
    marks = [name for path in page.DOCUMENTS for name in page.MARKED.findall(path.read_text())]
    assert sorted(marks) == sorted([*page.TABLES, page.RUNS])


@pytest.mark.parametrize("document", page.DOCUMENTS, ids=lambda path: path.stem)
def test_every_figure_is_in_its_run(document: Path) -> None:
    """Read from the page alone: what made it is not asked."""
    measured = 0
    for lines in tables(document.read_text()):
        if lines[0].columns in MEANINGS:
            continue
        for line in lines:
            assert not faults(line), line.cells
            measured += 1
    assert measured > 10


def test_a_figure_that_no_run_holds_is_noticed() -> None:
    lines = [
        line
        for lines in tables(page.DOCUMENTS[0].read_text())
        if lines[0].columns not in MEANINGS
        for line in lines
    ]
    changed = 0
    for line in lines:
        for place, cell in enumerate(line.cells[:-3]):
            first = NUMBER.search(cell)
            if not (line.figures[place] or line.columns[place] == "measured") or first is None:
                continue
            figure = first[0]
            wrong = str(
                round(value(figure) * 1.37 + 3 * unit(figure), len(figure.partition(".")[2]))
            )
            cells = [*line.cells]
            cells[place] = cell.replace(figure, wrong, 1)
            changed += bool(faults(Line(line.columns, cells, line.figures)))
    figures = sum(
        bool(NUMBER.search(cell))
        for line in lines
        for place, cell in enumerate(line.cells[:-3])
        if line.figures[place] or line.columns[place] == "measured"
    )
    # Another figure of a large run may be the wrong one by chance.
    assert changed > 0.97 * figures > 300
    line = lines[0]
    for place in (-3, -2):
        cells = [*line.cells]
        cells[place] = "elsewhere"
        assert faults(Line(line.columns, cells, line.figures)) == ["elsewhere"]


def test_the_readmes_figures_are_in_a_run() -> None:
    """Those of its tables, and of each paragraph that says when, or leads to a page of figures."""
    known = [
        one for path in page.FOLDER.glob("*.json") for one in numbers(json.loads(path.read_text()))
    ]
    text = re.sub(r"^```.*?^```", "", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    checked = 0
    for paragraph in re.split(r"\n\n|\n(?=- )", text):
        if not re.search(r"\d{4}-\d\d-\d\d|Benchmarks\]|all figures\]|^\|", paragraph, re.M):
            continue
        plain = re.sub(r"\d{4}-\d\d-\d\d|Zen \d|Python \d[\d.]*", "", paragraph)
        for one in NUMBER.findall(plain):
            assert is_held(one, known), f"{one} in: {paragraph}"
            checked += 1
    assert checked > 25
