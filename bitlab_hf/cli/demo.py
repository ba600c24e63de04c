"""``bitlab demo``: the main job, end to end."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bitlab_hf.cli.common import Json, Threads, check_output, check_trainable, quiet, set_threads


def demo(
    model: Annotated[
        str | None,
        typer.Option(help="A causal language model: a folder or a hub name. Default: a small one "
                     "that ships with BitLab."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Where to put the ternary model.")] = Path(
        "out/demo"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Train on a tenth of the tokens.")] = False,
    tokens: Annotated[int | None, typer.Option(min=1, help="Training tokens.")] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Runs the whole path: perplexity, QAT fine-tuning, deploy, save, reload, generate."""
    from bitlab_hf.checkpoint.atomic import check_folder
    from bitlab_hf.demo.run import Demo, Settings

    quiet()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    set_threads(threads)
    if model is None:
        check_folder(output, str(output))
    else:
        check_output(model, output)
        check_trainable(model, "demo")
    settings = Settings(model=model, output=output)
    if quick:
        settings = dataclasses.replace(
            settings,
            tokens=settings.tokens // 10,
            eval_tokens=settings.eval_tokens // 4,
            generate=32,
        )
    if tokens is not None:
        settings = dataclasses.replace(settings, tokens=tokens)
    report = Demo(settings, Console(stderr=as_json)).run()
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(report), indent=2))
