"""Draws what a ternary SmolLM2 loses against tokens and against seconds, of the runs in
docs/benchmarks.

    python scripts/bench/quality_plot.py                        # docs/images/quality-smollm2.png

A row of `quality.py` is a point, its seeds a bar; the demo is a line from its first to its last
evaluation. Seconds are those of the machine that a run names.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import pyplot
from page import FOLDER, ROOT
from page_runs import Run, load_runs

TICKS = {"tokens": [32_000, 64_000, 128_000, 256_000, 512_000], "seconds": [600, 1200, 2400, 4800]}


@dataclass(frozen=True)
class Line:
    """What is drawn with one name.

    Attributes:
        title: What the legend says.
        tokens: Fitted and trained on.
        seconds: Of making it.
        above: Nats a token above full precision, of each seed, for each of the former.
    """

    title: str
    tokens: list[float]
    seconds: list[float]
    above: list[list[float]]


def _seconds(row: dict[str, Any]) -> float | None:
    """Returns how long a row took to make, where its run tells."""
    making: dict[str, float] | None = row.get("making")
    return row.get("seconds") if making is None else making["seconds"]


def lines_of(run: Run) -> Iterator[Line]:
    """Yields what a run has to draw: of models trained on a CPU, of SmolLM2."""
    if run.kind == "demo" and "curve" in run.result:
        curve = run.result["curve"]
        # Calibration comes first; the last evaluation is at the end, and steps take equal time.
        steps = run.result["seconds_of_steps"]
        begin = run.result["seconds_of_fine_tuning"] - steps
        pace = steps / curve[-1]["tokens_distilled"]
        yield Line(
            f"scripts/demo.sh --real, {run.label}",
            [one["tokens_distilled"] + run.result["tokens_calibrated"] for one in curve],
            [begin + one["tokens_distilled"] * pace for one in curve],
            [[one["nats_above"]] for one in curve],
        )
    other = re.search(r"--text|--model (?!smollm2-135m\b)", run.command)
    if run.kind != "quality" or run.on_gpu or other:
        return
    results = run.result["results"]
    base = results["original"][0]["nats"]
    for rows in results.values():
        seconds = [second for row in rows if (second := _seconds(row))]
        if rows[0]["tokens"] and seconds:
            mean = sum(seconds) / len(seconds)
            above = [row["nats"] - base for row in rows]
            yield Line(f"{rows[0]['title']}, {run.label}", [rows[0]["tokens"]], [mean], [above])


def draw(lines: list[Line], path: Path) -> None:
    """Writes the plot."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.5), sharey=True)
    for axis, named in zip(axes, ("tokens", "seconds"), strict=True):
        # As many colours as runs may have rows, and both panels alike.
        axis.set_prop_cycle(color=plt.get_cmap("tab20").colors)
        for line in lines:
            at = getattr(line, named)
            means = [sum(seeds) / len(seeds) for seeds in line.above]
            ends = zip(means, line.above, strict=True)
            around = [(mean - min(seeds), max(seeds) - mean) for mean, seeds in ends]
            axis.errorbar(
                at, means, yerr=list(zip(*around, strict=True)), marker="o", markersize=4,
                capsize=3, label=line.title,
            )  # fmt: skip
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.minorticks_off()
        axis.set_xticks(TICKS[named], [f"{tick:,}" for tick in TICKS[named]])
        axis.set_yticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
        axis.set_xlabel("tokens fitted and trained on" if named == "tokens" else "seconds")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("nats a token above full precision, held-out articles")
    figure.suptitle("SmolLM2-135M, ternary")
    figure.tight_layout(rect=(0, 0.2, 1, 1))
    # Below both, where it hides no point.
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, ncols=3, loc="lower center")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Draws all runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usual = ROOT / "docs/images/quality-smollm2.png"
    parser.add_argument("png", type=Path, nargs="?", default=usual)
    options = parser.parse_args()
    draw([line for run in load_runs(FOLDER) for line in lines_of(run)], options.png)


if __name__ == "__main__":
    main()
