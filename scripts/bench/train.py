"""Times a training step of one transformer block against nn.Linear and other ternary trainers.

    python scripts/bench/train.py
    python scripts/bench/train.py --precisions float32 --tokens 512 --rounds 9
    python scripts/bench/train.py --device cuda             # --compile: with torch.compile
    python scripts/bench/train.py --device cuda --quick     # tiny; without a GPU on the CPU

The block is a Llama block of BitNet-2B-4T's geometry, on a GPU of an 8B Llama's, too. Times are of
interleaved steps in one process, on a GPU between CUDA events; memory is the resident memory of a
fresh process for each configuration, on a GPU the peak of torch's allocator. Writes train.json,
anew after each cell, train.md and train.png. docs/benchmarks.md says what each column means.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import Disturbance, Grid, Target, close, device_words, header, pyplot
from results import write_json
from rich.console import Console
from rich.progress import Progress
from train_block import (
    ENGINES,
    GEOMETRIES,
    PRECISIONS,
    describe,
    find_problem,
    has_bfloat16,
)
from train_memory import measure_gpu, measure_process
from train_time import LEAST_ROUNDS, Cell, Row, measure_time

from bitcore.kernels import kernels_for

MEGABYTE = 1e6
# Of the plain block's time: by device.
MOST_TIME = {"cpu": 1.15, "cuda": 1.1}
# Fewer tokens do not fill a GPU: nothing is asked there.
LEAST_TOKENS = 4096
# Dynamo's own is 8 versions of a function; here each block and each shape takes one.
VERSIONS = 64


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--geometries", nargs="+", choices=GEOMETRIES, help="default: by device")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, help="default: by device")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="M", help="default: by device")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, help="timed steps of each engine; 5, on a GPU 30")
    parser.add_argument(
        "--limit", type=float, default=20,
        help="seconds: a step above is timed once, and its engine sits out more tokens",
    )  # fmt: skip
    parser.add_argument(
        "--cell-seconds", type=float, default=float("inf"),
        help=f"fewer rounds where those of a cell would take longer, but {LEAST_ROUNDS}",
    )  # fmt: skip
    parser.add_argument("--no-time", action="store_true", help="measure memory only")
    parser.add_argument("--no-memory", action="store_true", help="measure time only")
    parser.add_argument(
        "--compile", nargs="?", const="inductor", metavar="BACKEND", help="compile each block whole"
    )
    parser.add_argument("--compile-peer", action="store_true", help="let transformers compile")
    parser.add_argument("--json", type=Path, default=Path("out/bench/train.json"))
    parser.add_argument("--png", type=Path, help="default: beside the JSON")
    parser.add_argument("--no-png", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a tiny block, to see that it runs")
    arguments = parser.parse_args()
    on_gpu, quick = arguments.device == "cuda", arguments.quick
    if on_gpu and not torch.cuda.is_available():
        if not quick:
            parser.error("--device cuda needs a CUDA device, and torch finds none (but --quick)")
        arguments.device = "cpu"
    precisions = ["bf16 autocast", "bfloat16"] if on_gpu else list(PRECISIONS)
    tokens = [2048, 4096, 8192, 16384] if on_gpu else [512, 2048]
    arguments.precisions = arguments.precisions or precisions
    arguments.tokens = sorted(arguments.tokens or ([16, 32] if quick else tokens))
    geometries = ["2B-4T", "8B"] if on_gpu else ["2B-4T"]
    arguments.geometries = ["quick"] if quick else arguments.geometries or geometries
    arguments.rounds = arguments.rounds or (30 if on_gpu and not quick else 5)
    arguments.png = arguments.png or arguments.json.with_suffix(".png")
    return arguments


def measure_memory(engine: str, cell: Cell, options: Any) -> tuple[Row | None, str | None]:
    """Returns the bytes of one configuration, alone; or None, and why it fails."""
    precision, geometry, tokens = cell
    try:
        if options.device == "cpu":
            return measure_process(engine, geometry, precision, tokens, options.threads), None
        return measure_gpu(engine, geometry, precision, tokens, options.compile), None
    except Exception as error:  # whatever a peer raises is the answer
        return None, describe(error)


def measure(options: Any, engines: list[str], result: Row, console: Console) -> list[Row]:
    """Returns a row for each engine, precision, geometry and number of tokens; writes what there
    is after each cell.
    """
    rows: list[Row] = result.setdefault("rows", [])
    cells = [
        (precision, geometry, m)
        for geometry in options.geometries
        for precision in options.precisions
        for m in options.tokens
    ]
    if options.device == "cuda":  # a run that is cut off has all of the fewest tokens
        cells.sort(key=lambda cell: cell[2])
    slow: set[tuple[str, str, str]] = set()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=len(cells))
        for cell in cells:
            precision, geometry, m = cell
            progress.update(task, description=f"{precision}, {geometry}, M={m}")
            failed: dict[str, str] = {}
            times: dict[str, Row] = {}
            if not options.no_time:
                running = [name for name in engines if (name, *cell[:2]) not in slow]
                times, failed = measure_time(running, cell, options)
            for engine in engines:
                time, memory, problem = times.get(engine), None, failed.get(engine)
                if time is not None and time["with_optimizer_ms"] > 1e3 * options.limit:
                    slow.add((engine, *cell[:2]))
                if not options.no_memory and problem is None:
                    memory, problem = measure_memory(engine, cell, options)
                key = {"precision": precision, "geometry": geometry, "m": m, "engine": engine}
                rows.append({**key, "time": time, "bytes": memory, "failed": problem})
            write_json(options.json, result)
            progress.advance(task)
    return rows


def check_own(rows: list[Row]) -> None:
    """Ends the run as failed where the plain block or BitLab's did not run: no peer's business.

    Raises:
        SystemExit: The message says which, and what each raised, a graph break included.
    """
    broken = [
        f"{row['engine']}, {', '.join(map(str, cell_of(row)))}: {row['failed']}"
        for row in rows
        if row["failed"] and row["engine"] in ("plain", "bitlab")
    ]
    if broken:
        raise SystemExit("\n".join(["The plain block and BitLab's must run, got:", *broken]))


def cell_of(row: Row) -> Cell:
    """Returns what a row has in common with the other engines' rows."""
    return row["precision"], row["geometry"], row["m"]


def ratio(rows: list[Row], cell: Cell, engine: str, *path: str) -> float | None:
    """Returns a figure of an engine over the plain block's; None where one was not measured."""

    def figure(name: str) -> float | None:
        for row in rows:
            if (cell_of(row), row["engine"]) == (cell, name):
                part = row[path[0]]
                return None if part is None else float(part[path[1]])
        return None

    above, below = figure(engine), figure("plain")
    return None if above is None or below is None else above / below


def _ratio_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def time_grid(rows: list[Row]) -> Grid:
    """Returns the table of times."""
    columns = ["precision", "block", "M", "engine", "forward", "backward", "step", "p10-p90"]
    columns += ["of plain", "with AdamW", "of plain", "tokens/s"]
    grid = Grid("A step, ms", columns, left=4)
    for row in rows:
        cell, time = cell_of(row), row["time"]
        figures = ["-"] * 8
        if time is not None:
            figures = [
                _ms(time["forward_ms"]), _ms(time["backward_ms"]), _ms(time["step_ms"]),
                f"{_ms(time['step_p10'])}-{_ms(time['step_p90'])}",
                _ratio_text(ratio(rows, cell, row["engine"], "time", "step_ms")),
                _ms(time["with_optimizer_ms"]),
                _ratio_text(ratio(rows, cell, row["engine"], "time", "with_optimizer_ms")),
                f"{time['tokens_per_second']:.0f}",
            ]  # fmt: skip
        grid.rows.append([*map(str, cell), row["engine"], *figures])
    return grid


def memory_grid(rows: list[Row]) -> Grid:
    """Returns the table of bytes."""
    columns = ["precision", "block", "M", "engine", "model", "saved", "peak", "of plain"]
    grid = Grid("Memory of a step, MB", [*columns, "with AdamW", "of plain"], left=4)
    for row in rows:
        cell, found = cell_of(row), row["bytes"]
        if found is None:
            continue
        megabytes = {name: f"{value / MEGABYTE:.0f}" for name, value in found.items()}
        peaks = [
            _ratio_text(ratio(rows, cell, row["engine"], "bytes", name))
            for name in ("peak", "peak_with_optimizer")
        ]
        grid.rows.append([
            *map(str, cell), row["engine"], megabytes["model"], megabytes["saved"],
            megabytes["peak"], peaks[0], megabytes["peak_with_optimizer"], peaks[1],
        ])  # fmt: skip
    return grid


def find_targets(rows: list[Row], options: Any) -> list[Target]:
    """Returns the closing table's lines."""
    targets = []
    most, on_gpu = MOST_TIME[options.device], options.device == "cuda"
    for cell in dict.fromkeys(map(cell_of, rows)):
        precision, geometry, m = cell
        if on_gpu and m < LEAST_TOKENS:
            continue
        memory = ratio(rows, cell, "bitlab", "bytes", "peak")
        # Resident memory of equal processes differs in the fourth digit.
        memory = None if memory is None else round(memory, 3)
        name = f"{geometry} {precision} M={m}" if on_gpu else f"{precision} M={m}"
        targets.append(Target(f"{name}: at most the plain peak", memory, 1, False, "x"))
        if on_gpu or precision != "bfloat16":
            time = ratio(rows, cell, "bitlab", "time", "step_ms")
            text = f"{name}: at most {most}x the plain time"
            targets.append(Target(text, time, most, False, "x"))
    return targets


def draw(rows: list[Row], most: float, path: Path) -> None:
    """Draws times and peaks as shares of the plain block's."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    cells = list(dict.fromkeys(map(cell_of, rows)))
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    width = 0.8 / len(engines)
    panels = (("time", "step_ms", "Time of a step"), ("bytes", "peak", "Peak memory of a step"))
    for ax, (part, field, title) in zip(axes, panels, strict=True):
        for index, engine in enumerate(engines):
            heights = [ratio(rows, cell, engine, part, field) or 0 for cell in cells]
            places = [place + index * width for place in range(len(cells))]
            bars = ax.bar(places, heights, width, label=engine)
            labels = [f"{height:.2f}" if height else "-" for height in heights]
            ax.bar_label(bars, labels, fontsize="x-small")
        ax.axhline(most if part == "time" else 1, color="black", linestyle="--", linewidth=0.8)
        ax.set_xticks([place + 0.4 - width / 2 for place in range(len(cells))])
        ax.set_xticklabels([f"{precision}\n{geometry}, M={m}" for precision, geometry, m in cells])
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
    on_gpu = options.device == "cuda"
    # On a CPU, what transformers compiles of its layer makes it slower.
    if not (on_gpu or options.compile or options.compile_peer):
        torch.compiler.set_stance("force_eager")
    torch._dynamo.config.recompile_limit = VERSIONS
    console = Console()
    disturbance = Disturbance()
    result = header(console, "bench/train.py")
    kernels: Any = kernels_for(options.device)
    one = options.precisions[0]
    problems = {name: find_problem(name, one, options.device) for name in options.engines}
    not_run = {name: problem for name, problem in problems.items() if problem is not None}
    result |= {
        "device": options.device, "gpu": device_words() if on_gpu else None,
        "compiled": options.compile, "isa": getattr(kernels, "isa", options.device),
        "threads": options.threads, "quick": options.quick,
        "torch_bfloat16": on_gpu or has_bfloat16(), "not_run": not_run,
    }  # fmt: skip
    console.print(result["gpu"] or f"{options.threads} threads, {result['isa']}", highlight=False)
    for name, problem in not_run.items():
        console.print(f"{name}: not run: {problem}", highlight=False)
    if "plain" in not_run or "bitlab" in not_run:
        raise SystemExit("The plain block and BitLab's must run.")
    if not result["torch_bfloat16"]:
        console.print("torch has no fast bfloat16 products on this CPU.")
    engines = [name for name in options.engines if name not in not_run]
    rows = measure(options, engines, result, console)
    grids = [] if options.no_time else [time_grid(rows)]
    grids += [] if options.no_memory else [memory_grid(rows)]
    for grid in grids:
        grid.show(console)
    targets = find_targets(rows, options)
    close(console, result, grids, targets, disturbance, options.json, for_vnni=False)
    if not options.no_png:
        draw(rows, MOST_TIME[options.device], options.png)
    console.print(f"Results: {options.json}", highlight=False)
    check_own(rows)


if __name__ == "__main__":
    main()
