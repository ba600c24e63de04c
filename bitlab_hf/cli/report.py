"""``bitlab report``: a training run as one HTML page."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from bitlab_hf.cli.common import Json, emit, finite
from bitlab_hf.cli.errors import doing
from bitlab_hf.cli.places import check_folder, check_output_file


def report(
    run: Annotated[
        Path, typer.Argument(help="A Trainer's output folder.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option(help="The page to write. Default: report.html in RUN.")
    ] = None,
    baseline: Annotated[
        float | None,
        typer.Option(min=1.0, callback=finite,
                     help="The full-precision model's perplexity on the evaluation text, "
                     "where the run did not record it."),
    ] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Draws what a run with TernaryStatistics logged, as one HTML page that needs nothing else.

    Loss, perplexity against full precision, flips and shares of the codes in every layer, scales,
    saturation, and the weights around the thresholds.
    """
    from bitlab_hf.checkpoint.atomic import write_atomically
    from bitlab_hf.report import read_run, render
    from bitlab_hf.report.page import summary

    path = run / "report.html" if out is None else out
    check_folder(run)
    with doing(f"reading the run {run}"):
        found = read_run(run)
    check_output_file(path)
    if baseline is not None:
        found.baseline = (math.log(baseline), "full precision")
    with doing(f"writing {path}"):
        page = render(found)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, page)
    result = summary(found)
    shown = result["perplexity"]
    reached = "" if shown is None else f", perplexity {shown:.3f}"
    if result["baseline_perplexity"] is not None:
        reached += f" (full precision {result['baseline_perplexity']:.3f})"
    emit(
        {"output": str(path), **result},
        as_json,
        f"{path}: {result['steps']} steps, {result['layers']} layers{reached}",
    )
