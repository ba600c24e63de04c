"""The tables, the closing lines and the picture of bench/linear.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common import Grid, Target, pyplot
from engines import GRANULARITIES

from bitlab_hf.cli.timing import Timing

Shape = tuple[int, int]
Row = dict[str, Any]
# What groups of a size may take, in times of one scale for the matrix, by tokens.
GROUP_TARGETS = {
    64: {1: 1.15, 8: 1.25, 16: 1.25, 64: 1.2, 512: 1.2},
    128: {1: 1.10, 8: 1.15, 16: 1.15, 64: 1.1, 512: 1.1},
}


def threads_text(count: int) -> str:
    """Says a number of threads."""
    return f"{count} thread" if count == 1 else f"{count} threads"


def long_grid(title: str, rows: list[Row]) -> Grid:
    """Returns every figure of some cells."""
    columns = ["M", "engine", "µs p50", "p10-p90", "GB/s", "of DRAM", "GMAC/s", "of peak"]
    grid = Grid(title, columns, left=2)
    for row in rows:
        timing = Timing(**row["us"])
        share = "-" if row["peak_share"] is None else f"{row['peak_share']:.0%}"
        grid.rows.append(
            [
                str(row["m"]), row["engine"], f"{timing.p50:.0f}",
                f"{timing.p10:.0f}-{timing.p90:.0f}", f"{row['gbs']:.1f}",
                f"{row['dram_share']:.0%}", f"{row['gmacs']:.0f}", share,
            ]
        )  # fmt: skip
    return grid


def wide_grids(rows: list[Row]) -> list[Grid]:
    """Returns a table for each thread count and shape: µs of the engines by tokens."""
    grids = []
    for threads, n, k in dict.fromkeys((row["threads"], row["n"], row["k"]) for row in rows):
        cells = [row for row in rows if (row["threads"], row["n"], row["k"]) == (threads, n, k)]
        tokens = list(dict.fromkeys(row["m"] for row in cells))
        columns = ["engine", *(f"M={m}" for m in tokens)]
        grid = Grid(f"{n}x{k} (N x K), {threads_text(threads)}, µs", columns)
        for engine in dict.fromkeys(row["engine"] for row in cells):
            times = {row["m"]: row["us"]["p50"] for row in cells if row["engine"] == engine}
            grid.rows.append([engine, *(f"{times[m]:.0f}" if m in times else "-" for m in tokens)])
        grids.append(grid)
    return grids


def pack_grid(rows: list[Row]) -> Grid:
    """Returns the table of packing times."""
    grid = Grid("Packing, µs", ["weight", "threads", "pack", "read once", "ratio"])
    for row in rows:
        name = f"{row['n']}x{row['k']} {row['dtype']}, {row['scales']}"
        pack, read = row["pack_us"]["p50"], row["read_us"]["p50"]
        grid.rows.append(
            [name, str(row["threads"]), f"{pack:.0f}", f"{read:.0f}", f"{row['ratio']:.2f}"]
        )
    return grid


def find_targets(
    rows: list[Row], packing: list[Row], shapes: tuple[Shape, ...], threads: int
) -> list[Target]:
    """Returns the closing table's lines for some shapes, computed from the run's figures."""

    def cell(shape: Shape, m: int, engine: str) -> Row | None:
        wanted = (threads, *shape, m, engine)
        names = ("threads", "n", "k", "m", "engine")
        return next((row for row in rows if tuple(row[key] for key in names) == wanted), None)

    def ratio(above: Row | None, below: Row | None) -> float | None:
        if above is None or below is None:
            return None
        return float(above["us"]["p50"] / below["us"]["p50"])

    targets = []
    for shape in shapes:
        one, eight, many = (cell(shape, m, "bitlab") for m in (1, 8, 512))
        name = f"{shape[0]}x{shape[1]}"
        share = None if one is None else 100 * one["dram_share"]
        ggml, dense = cell(shape, 1, "ggml TQ2_0"), cell(shape, 1, "torch bf16")
        int8 = cell(shape, 512, "torch int8")
        targets += [
            Target(f"{name} M=1: share of DRAM reading, 80 %", share, 80, True, " %"),
            Target(f"{name} M=1: 1.8x ggml TQ2_0", ratio(ggml, one), 1.8, True, "x"),
            Target(f"{name} M=1: 10x torch bf16", ratio(dense, one), 10, True, "x"),
            Target(f"{name} M=8: at most 2x M=1", ratio(eight, one), 2, False, "x"),
            Target(f"{name} M=512: at most torch int8's time", ratio(many, int8), 1, False, "x"),
        ]
        for size, bounds in GROUP_TARGETS.items():
            engine = f"bitlab {GRANULARITIES[str(size)].title}"
            for m, bound in bounds.items():
                grouped = ratio(cell(shape, m, engine), cell(shape, m, "bitlab"))
                if grouped is not None:
                    title = f"{name} M={m}: groups of {size}, at most {bound}x one scale"
                    targets.append(Target(title, grouped, bound, False, "x"))
    for dtype in ("float32", "bfloat16"):
        for title in dict.fromkeys(row["scales"] for row in packing) or ("per tensor",):
            wanted = (dtype, threads, title)
            found = [
                row["ratio"]
                for row in packing
                if (row["dtype"], row["threads"], row["scales"]) == wanted
            ]
            name = f"packing {dtype}, {title}: at most 2.5x reading it once"
            targets.append(Target(name, found[0] if found else None, 2.5, False, "x"))
    return targets


def draw(rows: list[Row], targets: tuple[Shape, ...], threads: int, path: Path) -> None:
    """Draws the shares of DRAM at one token, and GMAC/s over the tokens of the first target."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    rows = [row for row in rows if row["threads"] == threads]
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    least = min(row["m"] for row in rows)
    shapes = list(dict.fromkeys((row["n"], row["k"]) for row in rows))
    width = 0.8 / len(engines)
    for index, engine in enumerate(engines):
        times = {
            (row["n"], row["k"]): row["us"]["p50"]
            for row in rows
            if (row["engine"], row["m"]) == (engine, least)
        }
        places = [place + index * width for place in range(len(shapes))]
        left.bar(places, [times.get(one, 0) for one in shapes], width, label=engine)
    left.set_yscale("log")
    left.set_xticks([place + 0.4 for place in range(len(shapes))])
    left.set_xticklabels([f"{n}x{k}" for n, k in shapes], rotation=30)
    left.set(title=f"M = {least}, cold weights, {threads_text(threads)}", ylabel="µs (log)")
    left.legend(fontsize="small")
    shape = next((one for one in targets if one in shapes), shapes[0])
    curves = [row for row in rows if (row["n"], row["k"]) == shape]
    for engine in engines:
        points = [(row["m"], row["gmacs"]) for row in curves if row["engine"] == engine]
        right.plot(*zip(*points, strict=True), marker="o", label=engine)
    peaks = [row["peak_gmacs"] for row in curves]
    right.axhline(sum(peaks) / len(peaks), color="black", linestyle="--", label="int8 peak")
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set(title=f"{shape[0]}x{shape[1]} (N x K)", xlabel="M", ylabel="GMAC/s (log)")
    right.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
