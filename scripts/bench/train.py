"""Times a training step of one transformer block against nn.Linear and other ternary trainers.

    python scripts/bench/train.py
    python scripts/bench/train.py --precisions float32 --tokens 512 --rounds 9

The block is a Llama block of BitNet-2B-4T's geometry. Times are of interleaved steps in one
process; memory is the resident memory of a fresh process for each configuration. Writes train.json,
train.md and train.png. docs/benchmarks.md says what each column means.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Disturbance, Grid, Target, close, header, pyplot
from rich.console import Console
from rich.progress import Progress
from train_block import ENGINES, PRECISIONS, copies, find_problem, has_bfloat16

from bitcore.kernels import kernels_for

Row = dict[str, Any]
MEGABYTE = 1e6
MOST_TIME = 1.15
PARTS = ("forward", "backward", "optimizer")


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--tokens", nargs="+", type=int, metavar="M")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each engine")
    parser.add_argument(
        "--limit", type=float, default=20,
        help="seconds: a step above is timed once, and its engine sits out more tokens",
    )  # fmt: skip
    parser.add_argument("--no-time", action="store_true", help="measure memory only")
    parser.add_argument("--no-memory", action="store_true", help="measure time only")
    parser.add_argument("--compile-peer", action="store_true", help="let transformers compile")
    parser.add_argument("--json", type=Path, default=Path("out/bench/train.json"))
    parser.add_argument("--png", type=Path, help="default: beside the JSON")
    parser.add_argument("--no-png", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a tiny block, to see that it runs")
    arguments = parser.parse_args()
    arguments.tokens = sorted(arguments.tokens or ([16, 32] if arguments.quick else [512, 2048]))
    arguments.geometry = "quick" if arguments.quick else "2B-4T"
    arguments.png = arguments.png or arguments.json.with_suffix(".png")
    return arguments


def measure_time(engines: list[str], precision: str, tokens: int, options: Any) -> dict[str, Row]:
    """Returns the milliseconds of the parts of a step, p50 of interleaved steps."""
    blocks = copies(engines, options.geometry, precision, tokens)
    steps: dict[str, list[dict[str, float]]] = {}
    slow = set()
    for name, block in blocks.items():
        first = asdict(block.step())
        steps[name] = []
        if sum(first.values()) > options.limit:
            slow.add(name)
            steps[name].append(first)
    for _ in range(options.rounds):
        for name, block in blocks.items():
            if name not in slow:
                steps[name].append(asdict(block.step()))
    found = {}
    for name, taken in steps.items():
        parts = {part: 1e3 * np.array([step[part] for step in taken]) for part in PARTS}
        step = parts["forward"] + parts["backward"]
        p10, p50, p90 = np.percentile(step, (10, 50, 90))
        found[name] = {
            **{f"{part}_ms": float(np.median(values)) for part, values in parts.items()},
            "step_ms": float(p50), "step_p10": float(p10), "step_p90": float(p90),
            "with_optimizer_ms": float(np.median(step + parts["optimizer"])),
            "repeats": len(taken),
        }  # fmt: skip
    return found


def measure_memory(engine: str, precision: str, tokens: int, options: Any) -> Row:
    """Returns the bytes of one configuration, out of a fresh process."""
    request = {
        "engine": engine, "precision": precision, "tokens": tokens, "threads": options.threads,
        "geometry": options.geometry, "multiply": has_bfloat16(),
    }  # fmt: skip
    script = str(Path(__file__).with_name("train_block.py"))
    environment = {
        **os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MKL_DISABLE_FAST_MM": "1",
    }  # fmt: skip
    command = [sys.executable, script, json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{engine}, {precision}, M={tokens} failed:\n{done.stderr}")
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(options: Any, engines: list[str], console: Console) -> list[Row]:
    """Returns a row for each engine, precision and number of tokens."""
    rows: list[Row] = []
    cells = [(precision, m) for precision in options.precisions for m in options.tokens]
    slow: set[tuple[str, str]] = set()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=len(cells))
        for precision, m in cells:
            progress.update(task, description=f"{precision}, M={m}")
            running = [name for name in engines if (name, precision) not in slow]
            times = {} if options.no_time else measure_time(running, precision, m, options)
            for engine in engines:
                time = times.get(engine)
                if time is not None and time["with_optimizer_ms"] > 1e3 * options.limit:
                    slow.add((engine, precision))
                memory = (
                    None if options.no_memory else measure_memory(engine, precision, m, options)
                )
                cell = {"precision": precision, "m": m, "engine": engine}
                rows.append({**cell, "time": time, "bytes": memory})
            progress.advance(task)
    return rows


def ratio(rows: list[Row], cell: tuple[str, int, str], *path: str) -> float | None:
    """Returns a figure of an engine over the plain block's; None where one was not measured."""

    def figure(engine: str) -> float | None:
        for row in rows:
            if (row["precision"], row["m"], row["engine"]) == (*cell[:2], engine):
                part = row[path[0]]
                return None if part is None else float(part[path[1]])
        return None

    above, below = figure(cell[2]), figure("plain")
    return None if above is None or below is None else above / below


def _ratio_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def time_grid(rows: list[Row]) -> Grid:
    """Returns the table of times."""
    columns = ["precision", "M", "engine", "forward", "backward", "step", "p10-p90", "of plain"]
    grid = Grid("A step, ms", [*columns, "with AdamW", "of plain"], left=3)
    for row in rows:
        cell, time = (row["precision"], row["m"], row["engine"]), row["time"]
        figures = ["-"] * 7
        if time is not None:
            figures = [
                f"{time['forward_ms']:.0f}", f"{time['backward_ms']:.0f}", f"{time['step_ms']:.0f}",
                f"{time['step_p10']:.0f}-{time['step_p90']:.0f}",
                _ratio_text(ratio(rows, cell, "time", "step_ms")),
                f"{time['with_optimizer_ms']:.0f}",
                _ratio_text(ratio(rows, cell, "time", "with_optimizer_ms")),
            ]  # fmt: skip
        grid.rows.append([cell[0], str(cell[1]), cell[2], *figures])
    return grid


def memory_grid(rows: list[Row]) -> Grid:
    """Returns the table of bytes."""
    columns = ["precision", "M", "engine", "model", "saved", "peak", "of plain"]
    grid = Grid("Memory of a step, MB", [*columns, "with AdamW", "of plain"], left=3)
    for row in rows:
        cell, found = (row["precision"], row["m"], row["engine"]), row["bytes"]
        if found is None:
            continue
        megabytes = {name: f"{value / MEGABYTE:.0f}" for name, value in found.items()}
        grid.rows.append([
            cell[0], str(cell[1]), cell[2], megabytes["model"], megabytes["saved"],
            megabytes["peak"], _ratio_text(ratio(rows, cell, "bytes", "peak")),
            megabytes["peak_with_optimizer"],
            _ratio_text(ratio(rows, cell, "bytes", "peak_with_optimizer")),
        ])  # fmt: skip
    return grid


def find_targets(rows: list[Row], options: Any) -> list[Target]:
    """Returns the closing table's lines."""
    targets = []
    for precision in options.precisions:
        for m in options.tokens:
            cell = (precision, m, "bitlab")
            memory = ratio(rows, cell, "bytes", "peak")
            # Resident memory of equal processes differs in the fourth digit.
            memory = None if memory is None else round(memory, 3)
            name = f"{precision} M={m}"
            targets.append(Target(f"{name}: at most the plain peak", memory, 1, False, "x"))
            if precision != "bfloat16":
                time = ratio(rows, cell, "time", "step_ms")
                text = f"{name}: at most {MOST_TIME}x the plain time"
                targets.append(Target(text, time, MOST_TIME, False, "x"))
    return targets


def draw(rows: list[Row], path: Path) -> None:
    """Draws times and peaks as shares of the plain block's."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    cells = list(dict.fromkeys((row["precision"], row["m"]) for row in rows))
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    width = 0.8 / len(engines)
    panels = (("time", "step_ms", "Time of a step"), ("bytes", "peak", "Peak memory of a step"))
    for ax, (part, field, title) in zip(axes, panels, strict=True):
        for index, engine in enumerate(engines):
            heights = [ratio(rows, (*cell, engine), part, field) or 0 for cell in cells]
            places = [place + index * width for place in range(len(cells))]
            bars = ax.bar(places, heights, width, label=engine)
            labels = [f"{height:.2f}" if height else "-" for height in heights]
            ax.bar_label(bars, labels, fontsize="x-small")
        ax.axhline(MOST_TIME if part == "time" else 1, color="black", linestyle="--", linewidth=0.8)
        ax.set_xticks([place + 0.4 - width / 2 for place in range(len(cells))])
        ax.set_xticklabels([f"{precision}\nM={m}" for precision, m in cells])
        ax.set(title=title, ylabel="of the plain block's; dashed: the target")
        ax.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measures, prints, writes."""
    options = parse_arguments()
    if not options.no_png:
        pyplot()
    torch.set_num_threads(options.threads)
    if not options.compile_peer:
        torch.compiler.set_stance("force_eager")
    console = Console()
    disturbance = Disturbance()
    result = header(console, "bench/train.py")
    kernels: Any = kernels_for("cpu")
    problems = {name: find_problem(name) for name in options.engines}
    not_run = {name: problem for name, problem in problems.items() if problem is not None}
    result |= {
        "isa": kernels.isa, "threads": options.threads, "quick": options.quick,
        "torch_bfloat16": has_bfloat16(), "not_run": not_run,
    }  # fmt: skip
    console.print(f"{options.threads} threads, {kernels.isa}", highlight=False)
    for name, problem in not_run.items():
        console.print(f"{name}: not run: {problem}", highlight=False)
    if "plain" in not_run or "bitlab" in not_run:
        raise SystemExit("The plain block and BitLab's must run.")
    if not has_bfloat16():
        console.print("torch has no fast bfloat16 products on this CPU.")
    rows = measure(options, [name for name in options.engines if name not in not_run], console)
    grids = [] if options.no_time else [time_grid(rows)]
    grids += [] if options.no_memory else [memory_grid(rows)]
    for grid in grids:
        grid.show(console)
    result["rows"] = rows
    targets = find_targets(rows, options)
    close(console, result, grids, targets, disturbance, options.json, for_vnni=False)
    if not options.no_png:
        draw(rows, options.png)
    console.print(f"Results: {options.json}", highlight=False)


if __name__ == "__main__":
    main()
