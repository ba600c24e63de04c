"""The report in a real browser: its plots are there, its script runs, nothing complains."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bitlab_hf.report import read_run, render
from tests.bitlab_hf.report.made import make_run
from tests.bitlab_hf.report.parsed import Page
from tests.bitlab_hf.report.test_report import assert_complete

pytestmark = pytest.mark.ci

_HOVER = """<script>
const svg = document.getElementById("loss"), frame = svg.getBoundingClientRect();
svg.dispatchEvent(new PointerEvent("pointermove", {
  clientX: frame.left + frame.width / 2, clientY: frame.top + frame.height / 2}));
</script>"""


def browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        found = shutil.which(name)
        if found:
            return found
    pytest.fail("No headless browser was found: install Debian's package `chromium`.")


def opened(page: Path) -> tuple[str, list[str]]:
    """Returns the document after its scripts ran, and what the page's console said."""
    command = [
        browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={page.parent / 'profile'}", "--enable-logging=stderr",
        "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=80)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, said


def test_page_in_a_browser(tmp_path: Path) -> None:
    html = render(read_run(make_run(tmp_path / "run")))
    path = tmp_path / "report.html"
    path.write_text(html)
    document, said = opened(path)
    assert said == []
    assert_complete(Page(document), 2, 12)
    # The console is heard: the policy refuses a script that is not the page's own. Without the
    # policy, the page's script shows the values under the pointer.
    assert 'class="tip"' not in document
    path.write_text(html.replace("</body>", _HOVER + "</body>"))
    document, said = opened(path)
    assert len(said) == 1
    assert "Content Security Policy" in said[0]
    path.write_text(
        re.sub(r"<meta http-equiv[^>]*>", "", html).replace("</body>", _HOVER + "</body>")
    )
    document, said = opened(path)
    assert said == []
    tip = re.search(r'class="tip".*', document)
    assert tip is not None
    assert "step 30" in tip.group()
    assert "loss: 1.5" in tip.group()
