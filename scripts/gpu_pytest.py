"""Runs pytest in a visit to a GPU: what came of a test is on the disk before the next begins.

    python scripts/gpu_pytest.py REPORT [pytest's options]

pytest writes its own reports at the end, which a cut-off or a kernel that hangs does not let it
reach. A line of REPORT is the number of tests, the name of one that begins, or what came of it.
With --timeout a test that takes longer fails; where it does not return to Python, as when a kernel
hangs, the process ends, half that time later.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest


class Lines:
    """A plugin of pytest that writes the report."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", buffering=1)
        # pytest keeps to itself what goes to stderr.
        self._stderr = os.fdopen(os.dup(sys.stderr.fileno()), "w")
        self._most = 0.0

    def _write(self, **line: Any) -> None:
        self._file.write(json.dumps(line) + "\n")

    def pytest_configure(self, config: pytest.Config) -> None:
        """Takes --timeout."""
        self._most = 1.5 * (config.getoption("timeout", None) or 0)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Notes how many there are."""
        self._write(tests=len(session.items))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Notes one that begins."""
        self._write(begun=nodeid)
        if self._most:
            faulthandler.dump_traceback_later(self._most, exit=True, file=self._stderr)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Notes what came of one; a fixture that fails behind a test fails it."""
        if report.when == "call" or not report.passed:
            self._write(test=report.nodeid, outcome=report.outcome)

    def pytest_sessionfinish(self) -> None:
        """Ends no process that does something else."""
        faulthandler.cancel_dump_traceback_later()


def read_report(path: Path) -> dict[str, Any] | None:
    """Returns how many tests there were and passed, which failed, and with which one the process
    ended too early, if with one; None where it ended before all of them.
    """
    text = path.read_text() if path.is_file() else ""
    lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    if not lines:
        return None
    begun = [line["begun"] for line in lines if "begun" in line]
    outcomes = {line["test"]: line["outcome"] for line in lines if "test" in line}
    names: dict[str, list[str]] = {"passed": [], "failed": [], "skipped": []}
    for test, outcome in outcomes.items():
        names[outcome].append(test)
    return {
        "tests": lines[0]["tests"],
        "passed": len(names["passed"]),
        "skipped": len(names["skipped"]),
        "failed": names["failed"],
        "ended_in": begun[-1] if begun and begun[-1] not in outcomes else None,
    }


if __name__ == "__main__":
    import pytest

    options = ["-v", "-p", "no:cacheprovider", *sys.argv[2:]]
    sys.exit(pytest.main(options, plugins=[Lines(Path(sys.argv[1]))]))
