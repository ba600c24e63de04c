"""Takes every architecture of transformers through BitLab, and writes what came of it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.bitlab_hf.sweep.models import architectures
from tests.bitlab_hf.sweep.run import sweep


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architectures", nargs="*", help="which (default: all)")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the results here, one a line")
    arguments = parser.parse_args()
    out = arguments.json.open("w") if arguments.json else None
    start = time.monotonic()
    for result in sweep(arguments.architectures or architectures(), arguments.processes):
        print(f"{time.monotonic() - start:6.0f} s {result.architecture}: {result.outcome}", flush=True)
        for step, what in result.faults:
            print(f"           {step}: {what}", flush=True)
        if out:
            print(json.dumps(result.to_dict()), file=out, flush=True)


if __name__ == "__main__":
    main()
