"""The quality benchmark's tables and plot, from its runs."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from common import pyplot
from quality_methods import METHODS, POST_TRAINING
from results import write_json
from rich.console import Console

Rows = dict[str, dict[str, Any]]


def summarize(runs: list[dict[str, Any]]) -> Rows:
    """Returns, for each method, its grid, chosen rate and test nats of each seed, equal tokens.

    The runs of more tokens than the grid's are the comparison at equal time, under "longer".
    """
    rows: Rows = {}
    if not runs:
        return rows
    equal = min(run["tokens"] for run in runs)
    for method in METHODS:
        own = [run for run in runs if run["method"] == method]
        grid = {r["rate"]: r["nats"] for r in own if r["part"] == "validation"}
        if not grid:
            continue
        tests = [r for r in own if r["part"] == "test"]
        longer = [r for r in tests if r["tokens"] > equal]
        rows[method] = {
            "grid": grid,
            "rate": min(grid, key=lambda rate: math.inf if math.isnan(grid[rate]) else grid[rate]),
            "seeds": {r["seed"]: r["nats"] for r in tests if r["tokens"] == equal},
            "seconds_per_token": statistics.median(r["cpu_seconds_per_token"] for r in own),
            "tokens": equal,
            "longer": {r["seed"]: r["nats"] for r in longer},
            "longer_tokens": longer[0]["tokens"] if longer else 0,
        }
    return rows


def compare(rows: Rows, start: dict[str, Any]) -> None:
    """Adds to each row, seed by seed, the share of `AutoBitLinear`'s gap that it closes.

    The gap is counted in nats from the better of full precision as it is and fine-tuned.
    """
    stock = rows.get("auto", {}).get("seeds", {})
    tuned = rows.get("float", {}).get("seeds", {})
    for row in rows.values():
        row["closed"], row["closed_longer"] = {}, {}
        for seed, value in row["seeds"].items():
            if seed not in stock or seed not in tuned:
                continue
            floor = min(start["float"], tuned[seed])
            row["closed"][seed] = (stock[seed] - value) / (stock[seed] - floor)
        for seed, value in row["longer"].items():
            if seed in row["closed"]:
                floor = min(start["float"], tuned[seed])
                row["closed_longer"][seed] = (stock[seed] - value) / (stock[seed] - floor)


def spread(values: dict[int, float], digits: int = 3) -> str:
    """Mean and, in brackets, least and most."""
    if not values:
        return "not run"
    found = list(values.values())
    mean = statistics.fmean(found)
    return f"{mean:.{digits}f} ({min(found):.{digits}f} to {max(found):.{digits}f})"


def percent(values: dict[int, float]) -> str:
    """Mean share and, in brackets, least and most, in percent."""
    return spread({k: 100 * v for k, v in values.items()}, 0) + (" %" if values else "")


def table(domain: str, entry: dict[str, Any]) -> list[str]:
    """Returns one domain's table in Markdown."""
    start, rows = entry["start"], entry["rows"]
    lines = [
        f"### {domain}",
        "",
        "| method | test nats: mean (least to most) | perplexity | AutoBitLinear's gap closed "
        "| rate | CPU seconds per 10,000 tokens |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for name in ("float", *POST_TRAINING):
        title = "full precision as it is" if name == "float" else name
        lines.append(f"| {title} | {start[name]:.3f} | {math.exp(start[name]):.2f} | | | |")
    for method in METHODS:
        title = METHODS[method].title
        if method not in rows or not rows[method]["seeds"]:
            lines.append(f"| {title} | not run | | | | |")
            continue
        row = rows[method]
        mean = math.exp(statistics.fmean(row["seeds"].values()))
        closed = "0 %" if method == "auto" else percent(row["closed"])
        closed = "" if method == "float" else closed
        lines.append(
            f"| {title} | {spread(row['seeds'])} | {mean:.2f} | {closed} "
            f"| {row['rate']:g} | {1e4 * row['seconds_per_token']:.1f} |"
        )
        if row["longer"]:
            mean = math.exp(statistics.fmean(row["longer"].values()))
            more = row["longer_tokens"] / row["tokens"]
            lines.append(
                f"| {title}, equal time: {more:.2f}x tokens | {spread(row['longer'])} | {mean:.2f} "
                f"| {percent(row['closed_longer'])} | {row['rate']:g} | |"
            )
    grids = {m: r["grid"] for m, r in rows.items()}
    rates = sorted({rate for grid in grids.values() for rate in grid})
    lines += ["", "Validation nats of the grid, seed 0:", ""]
    lines.append("| method | " + " | ".join(f"{rate:g}" for rate in rates) + " |")
    lines.append("| --- |" + " --: |" * len(rates))
    for method, grid in grids.items():
        cells = [f"{grid[rate]:.3f}" if rate in grid else "not run" for rate in rates]
        lines.append(f"| {METHODS[method].title} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def draw(found: dict[str, Any], path: Path) -> None:
    """Draws each seed's test loss, a panel a domain."""
    plt = pyplot()
    domains = found["domains"]
    figure, axes = plt.subplots(1, len(domains), figsize=(6.5 * len(domains), 4.2), squeeze=False)
    for axis, (domain, entry) in zip(axes[0], domains.items(), strict=True):
        rows = {m: r for m, r in entry["rows"].items() if r["seeds"]}
        for place, row in enumerate(rows.values()):
            values = list(row["seeds"].values())
            axis.plot(values, [place] * len(values), "o", alpha=0.7)
        axis.axvline(entry["start"]["float"], color="black", linestyle="--", linewidth=1)
        axis.set_yticks(range(len(rows)), [METHODS[m].title for m in rows])
        axis.invert_yaxis()
        axis.set_xlabel("test loss, nats a token; dashed: full precision as it is")
        axis.set_title(domain)
        axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def write_report(found: dict[str, Any], path: Path, console: Console) -> None:
    """Writes the JSON, and the Markdown and the plot beside it; prints the tables."""
    lines: list[str] = []
    for domain, entry in found["domains"].items():
        entry["rows"] = summarize(entry["runs"])
        compare(entry["rows"], entry["start"])
        lines += table(domain, entry)
    write_json(path, found)
    path.with_suffix(".md").write_text("\n".join(lines))
    draw(found, path.with_suffix(".png"))
    console.print("\n".join(lines), markup=False, highlight=False)
