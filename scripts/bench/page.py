"""Makes the tables of docs/benchmarks.md and docs/serving.md out of the files in docs/benchmarks.

    python scripts/bench/page.py                              # writes the tables anew
    python scripts/bench/page.py --check                      # fails where that would change one
    python scripts/bench/page.py --take out/bench/linear.json --label "Zen 5"
    python scripts/bench/page.py --take out/gpu/gpu.json      # all parts of scripts/gpu.sh

A file is one run: where and when it was, its command, and what that found (`page_runs.py`). A table
is one question (`page_tables.py`); in the documents it stands between `<!-- NAME -->` and
`<!-- /NAME -->`, and `<!-- runs -->` marks where the runs are described. Nothing else is touched.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from page_runs import Run, load_runs, runs_of, take
from page_tables import GPU_TABLES, TABLES

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs/benchmarks"
DOCUMENTS = tuple(
    ROOT / f"docs/{name}.md" for name in ("benchmarks", "benchmarks-notes", "serving")
)
RUNS = "runs"
MARKED = re.compile(r"<!-- ([a-z0-9-]+) -->\n.*?<!-- /\1 -->", re.DOTALL)


def render(name: str, runs: list[Run], page: str = "") -> str:
    """Returns a table in Markdown.

    Args:
        name: Of the table, or `RUNS`.
        runs: All that there are.
        page: Where the runs are described, as seen from the document.
    """
    if name == RUNS:
        return "\n\n".join(run.section() for run in runs)
    table = TABLES[name]
    found = [(run, cells) for run in runs for cells in table.rows(run)]
    if not found:
        return "Not measured."
    columns = [*table.columns, "machine", "date", "run"]
    rule = ["---" if index < table.left else "--:" for index in range(len(table.columns))]
    rows = [columns, [*rule, "---", "---", "---"]]
    for run, cells in found:
        rows.append([*cells, run.label, run.date, f"[{run.name}]({page}#{run.name})"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def fill(text: str, runs: list[Run], page: str = "") -> str:
    """Returns a document with its tables written anew.

    Raises:
        SystemExit: It has a mark that no table answers to.
    """
    unknown = [name for name in MARKED.findall(text) if name != RUNS and name not in TABLES]
    if unknown:
        raise SystemExit(f"page: a mark must be of {sorted(TABLES)}, got {', '.join(unknown)}")

    def written(mark: re.Match[str]) -> str:
        return f"<!-- {mark[1]} -->\n{render(mark[1], runs, page)}\n<!-- /{mark[1]} -->"

    return MARKED.sub(written, text)


def visit_tables(result: dict[str, object]) -> str:
    """Returns the tables of a GPU's run of scripts/gpu.sh, as the page would have them."""
    runs = runs_of(result)
    return "\n\n".join(f"## {name}\n\n{render(name, runs)}" for name in GPU_TABLES)


def main() -> None:
    """Takes what is given, writes or compares."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing, compare")
    parser.add_argument("--take", type=Path, metavar="JSON", help="a benchmark's result")
    parser.add_argument("--label", help="of its machine, in two or three words")
    options = parser.parse_args()
    if options.take is not None:
        for path in take(options.take, options.label, FOLDER):
            print(f"wrote {path.relative_to(ROOT)}")
    runs = load_runs(FOLDER)
    stale = []
    for path in DOCUMENTS:
        text = path.read_text()
        filled = fill(text, runs, "" if path == DOCUMENTS[0] else DOCUMENTS[0].name)
        if filled != text and not options.check:
            path.write_text(filled)
        elif filled != text:
            stale.append(str(path.relative_to(ROOT)))
    if stale:
        sys.exit(f"{', '.join(stale)}: not what scripts/bench/page.py makes of docs/benchmarks")


if __name__ == "__main__":
    main()
