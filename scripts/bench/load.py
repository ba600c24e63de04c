"""Times `from_pretrained` of a packed model, against a dense one of as many tensors.

    python scripts/bench/load.py --work models/load     # keeps the checkpoints (0.4 GB)
    python scripts/bench/load.py --geometry 2b          # 5.7 GB

A packed layer has two or three tensors where a dense one has one, and transformers takes its time
for each tensor: it maps files, and reads nothing of them. So the peer is a dense model of more and
smaller layers. A packed file is read once, to be scanned for what no writer produces, unless a
record of an earlier load knows it: both are timed. Fresh processes that take turns, files in the
page cache, imports excluded. Writes load.json, load.md and load.png.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Disturbance, Grid, Target, close, header, pyplot
from generate import ENGINES, GEOMETRIES, QUICK, build, read_once, run_worker, weight_files
from rich.console import Console
from rich.progress import track
from safetensors import safe_open

from bitcore.user_cache import ENVIRONMENT_VARIABLE

PACKED, DENSE = "bitlab g64", "dense bf16"
PEER = "dense bf16, as many tensors"
FIRST, KNOWN = f"{PACKED}, scanned", f"{PACKED}, known"


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--geometry", choices=GEOMETRIES, default="smollm2")
    parser.add_argument("--work", type=Path, help="folder for the checkpoints, kept and reused")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9, help="processes of each engine")
    parser.add_argument("--json", type=Path, default=Path("out/bench/load.json"))
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs")
    options = parser.parse_args()
    options.device, options.cache = "cpu", "dynamic"
    options.name = "quick" if options.quick else options.geometry
    options.geometry = QUICK if options.quick else GEOMETRIES[options.geometry]
    options.rounds = 1 if options.quick else options.rounds
    return options


def count_tensors(model: Path) -> int:
    """Returns how many tensors a checkpoint holds."""
    total = 0
    for path in weight_files(model):
        with safe_open(path, "pt") as file:
            total += len(list(file.keys()))
    return total


def build_peer(work: Path, packed: Path, dense: Path, options: Any) -> Path:
    """Returns a dense checkpoint of at least as many tensors as the packed one has, and of no more
    than a layer has above it.
    """
    layers = options.geometry["num_hidden_layers"]
    # An embedding and the last norm stand beside the layers.
    each = (count_tensors(dense) - 2) // layers
    needed = -(-(count_tensors(packed) - 2) // each)
    target = work / f"dense-{needed}-layers"
    if not target.is_dir():
        small = {**QUICK, "num_hidden_layers": needed}
        request = {"do": "build", "kind": "dense", "model": str(target), "device": "cpu"}
        run_worker({**request, "geometry": small}, options.threads)
    return target


def measure(name: str, model: Path, threads: int, records: Path) -> float:
    """Returns the seconds of one load in a fresh process."""
    os.environ[ENVIRONMENT_VARIABLE] = "off" if name == FIRST else str(records)
    read_once(model)
    kind = "bitlab" if name in (FIRST, KNOWN) else "dense"
    request = {"do": "load", "kind": kind, "model": str(model), "device": "cpu"}
    seconds: float = run_worker({**request, "threads": threads}, threads)["load_seconds"]
    return seconds


def draw(engines: list[dict[str, Any]], path: Path) -> None:
    """Draws the times."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
    names = [one["engine"] for one in engines]
    bars = axis.barh(names, [one["load_seconds"] for one in engines])
    axis.bar_label(bars, fmt="%.3g")
    axis.set_xlabel("seconds of from_pretrained, median")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Builds, measures, prints, writes."""
    options = parse_arguments()
    console, disturbance = Console(), Disturbance()
    result = header(console, "bench/load.py")
    with ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work /= options.name
        records = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        packed, dense = (build(name, work, options) for name in (PACKED, DENSE))
        peer = build_peer(work, packed, dense, options)
        models = {KNOWN: packed, FIRST: packed, PEER: peer, DENSE: dense}
        times: dict[str, list[float]] = {name: [] for name in models}
        # The first writes the record, and is not counted.
        for turn in track(range(options.rounds + 1), "loading", console=console, transient=True):
            for name, model in models.items():
                seconds = measure(name, model, options.threads, records)
                times[name] += [seconds] if turn else []
        engines = [
            {
                "engine": name, "load_seconds": float(np.median(found)),
                "load_seconds_least": min(found), "tensors": count_tensors(models[name]),
            }
            for name, found in times.items()
        ]  # fmt: skip
    medians = {one["engine"]: one["load_seconds"] for one in engines}
    grid = Grid(
        f"from_pretrained, seconds, {options.threads} thread(s)",
        ["engine", "load s", "least", "tensors", "to the peer"],
    )
    for one in engines:
        figures = [f"{one[name]:.3f}" for name in ("load_seconds", "load_seconds_least")]
        ratio = f"{one['load_seconds'] / medians[PEER]:.2f}"
        grid.rows.append([one["engine"], *figures, f"{one['tensors']}", ratio])
    grid.show(console)
    title = "load, known: at most 1.1x a dense model's of as many tensors"
    targets = [Target(title, medians[KNOWN] / medians[PEER], 1.1, False, "x")]
    result |= {
        "threads": options.threads, "rounds": options.rounds, "quick": options.quick,
        "geometry": options.name,
        "group_size": ENGINES[PACKED][3]["group_size"], "engines": engines,
    }  # fmt: skip
    close(console, result, [grid], targets, disturbance, options.json, for_vnni=False)
    draw(engines, options.json.with_suffix(".png"))
    console.print(f"Results: {options.json}", highlight=False)


if __name__ == "__main__":
    main()
