"""The report in a real browser: its plots are there, its script runs, nothing complains."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bitlab_hf.report import read_run, render
from bitlab_hf.report.vega import scripts
from bitlab_hf.train.statistics_files import STATISTICS_FILE
from tests.bitlab_hf.report.made import make_run
from tests.bitlab_hf.report.parsed import Drawn, Page
from tests.bitlab_hf.report.test_report import assert_complete

pytestmark = pytest.mark.ci

# Moves the pointer over the step in the middle; the plots are drawn after the page's script.
_HOVER = """<script>
setTimeout(() => {
  const cells = document.querySelectorAll("#loss [class*=voronoi] path");
  const cell = cells[5], frame = cell.getBoundingClientRect();
  for (const kind of ["pointerover", "pointermove"]) cell.dispatchEvent(new PointerEvent(kind, {
    bubbles: true, clientX: frame.left + frame.width / 2, clientY: frame.top + 50}));
  document.title = getComputedStyle(document.querySelector("#loss .role-mark path")).stroke;
}, 500);
</script>"""


def browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found:
            return found
    pytest.fail("No headless browser was found: install Debian's package `chromium`.")


def opened(page: Path, dark: bool = False) -> tuple[str, list[str]]:
    """Returns the document after its scripts ran, and what the page's console said."""
    command = [
        browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={page.parent / 'profile'}", "--enable-logging=stderr",
        f"--blink-settings=preferredColorScheme={int(not dark)}", "--virtual-time-budget=3000",
        "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=80)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, said


def with_script(html: str, script: str) -> str:
    """Returns the page with one more script at its end."""
    before, after = html.rsplit("</body>", 1)
    return f"{before}{script}</body>{after}"


def assert_drawn(html: str, document: str) -> None:
    """Every mark that the page's specifications ask for is there."""
    page, drawn = Page(html), Drawn(document)
    assert list(drawn.plots) == list(page.plots)
    for name, plot in page.plots.items():
        marks = drawn.plots[name]
        assert marks.get("line", []) == list(plot.lines.values()), name
        rectangles = sum(plot.rows.values()) + plot.bars + sum(plot.panels.values())
        assert len(marks.get("rect", [])) == rectangles, name
        # One for the pointer at each step, one for each level and for each threshold.
        steps = len(page.specs[name]["data"]["values"]) if plot.lines else 0
        assert len(marks.get("rule", [])) == steps + plot.levels + 2 * len(plot.panels), name


def test_page_in_a_browser(tmp_path: Path) -> None:
    html = render(read_run(make_run(tmp_path / "run")))
    assert_complete(Page(html), 2, 12)
    path = tmp_path / "report.html"
    path.write_text(html)
    document, said = opened(path)
    assert said == []
    assert_drawn(html, document)
    # The console is heard: the policy refuses a script that is not the page's own. Without the
    # policy, the pointer shows the values under it.
    assert "vg-tooltip-element" not in Page(document).ids
    path.write_text(with_script(html, _HOVER))
    document, said = opened(path)
    assert len(said) == 1
    assert "Content Security Policy" in said[0]
    colours = set()
    for dark in (False, True):
        path.write_text(with_script(re.sub(r"<meta http-equiv[^>]*>", "", html), _HOVER))
        document, said = opened(path, dark)
        assert said == []
        tip = re.search(r'<div id="vg-tooltip-element" class="[^"]*visible[^>]*>.*', document)
        assert tip is not None
        shown = re.findall(r'<td class="value">(.*?)</td>', tip.group())
        assert shown == ["30", "1.5"]
        colours |= {*re.findall("<title>(.*?)</title>", document)}
    # A line's colour is its theme's.
    assert len(colours) == 2
    assert all(colour.startswith("rgb(") for colour in colours)


def test_odd_runs_in_a_browser(tmp_path: Path) -> None:
    """Evaluations at steps of their own, losses beyond all bounds, zeros, gaps, a single log."""
    run = make_run(tmp_path / "run", logs=9)
    path = run / STATISTICS_FILE
    header, *lines = path.read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    for entry in entries:
        if entry["step"] == 25:
            entry["logs"] |= {"eval_other_loss": 2.5, "eval_loss": 1000.0}
        if entry["step"] == 10 and "flipped" in entry:
            entry["flipped"][:3] = [0.0, None, 1.0]
        if entry["step"] == 15 and "saturated" in entry:
            entry["saturated"] = [None] * len(entry["saturated"])
    path.write_text("\n".join([header, *map(json.dumps, entries)]) + "\n")
    (tmp_path / "single").mkdir()
    shutil.copy(path, tmp_path / "single")
    single = tmp_path / "single" / STATISTICS_FILE
    last = [entry for entry in entries if "flipped" in entry][-1]
    single.write_text("\n".join([header, json.dumps(last)]) + "\n")
    for folder in (run, tmp_path / "single"):
        html = render(read_run(folder))
        page = tmp_path / "report.html"
        page.write_text(html)
        document, said = opened(page)
        assert said == []
        assert_drawn(html, document)
        assert "NaN" not in document.replace(scripts(), "")
