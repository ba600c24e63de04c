"""Takes every architecture of transformers through BitLab, and writes what came of it."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.bitlab_hf.sweep import experts
from tests.bitlab_hf.sweep.models import architectures
from tests.bitlab_hf.sweep.results import Result, document
from tests.bitlab_hf.sweep.run import sweep


def main() -> None:
    """Runs the sweep; exit code 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architectures", nargs="*", help="which (default: all)")
    parser.add_argument("--processes", type=int, default=1, help="how many at a time")
    parser.add_argument("--json", type=Path, help="where to write the results, one a line")
    parser.add_argument("--results", type=Path, help="take the results from such a file instead")
    parser.add_argument("--write", type=Path, help="where to write the table, of all architectures")
    parser.add_argument(
        "--experts", action="store_true", help="the classes of experts, instead of whole models"
    )
    arguments = parser.parse_args()
    if arguments.experts:
        rows = _experts(arguments.architectures or experts.with_experts())
        if arguments.write:
            arguments.write.write_text(experts.document(rows, date.today().isoformat()))
        sys.exit(not all(row.holds() for row in rows))
    names = arguments.architectures or architectures()
    if arguments.results:
        lines = arguments.results.read_text().splitlines()
        results = [Result(**json.loads(line)) for line in lines]
    else:
        results = _run(names, arguments.processes, arguments.json)
    if arguments.write:
        arguments.write.write_text(document(results, date.today().isoformat()))
    sys.exit(any(result.outcome in ("fault", "not swept") for result in results))


def _run(names: list[str], processes: int, path: Path | None) -> list[Result]:
    start = time.monotonic()
    results = []
    for result in sweep(names, processes):
        results.append(result)
        passed = time.monotonic() - start
        print(
            f"{passed:6.0f} s {result.architecture}: {result.outcome} {result.reason}", flush=True
        )
        for step, what in result.faults:
            print(f"           {step}: {what}", flush=True)
        if path:
            with path.open("a") as file:
                print(json.dumps(result.to_dict()), file=file)
    return results


def _experts(names: list[str]) -> list[experts.Row]:
    rows = []
    for name in names:
        with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
            for row in experts.looked_at(name, Path(folder)):
                rows.append(row)
                print(row.line(), flush=True)
    return rows


if __name__ == "__main__":
    main()
