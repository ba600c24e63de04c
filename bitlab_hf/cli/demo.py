"""``bitlab demo``: the main job, end to end."""

from __future__ import annotations

import dataclasses
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bitlab_hf.cli.common import (
    MOST,
    Json,
    Threads,
    emit,
    quiet,
    set_threads,
)
from bitlab_hf.cli.errors import doing
from bitlab_hf.cli.gguf_source import as_folder
from bitlab_hf.cli.loading import check_trainable, load_model
from bitlab_hf.cli.places import check_output
from bitlab_hf.cli.scheme import pretrained_config, with_scheme


@with_scheme
def demo(
    model: Annotated[
        str | None,
        typer.Option(help="A causal language model: a folder, a hub name or a .gguf file. "
                     "Default: a small one that ships with BitLab."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Where to put the ternary model.")] = Path(
        "out/demo"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Train on a tenth of the tokens.")] = False,
    tokens: Annotated[int | None, typer.Option(min=1, max=MOST, help="Training tokens.")] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="A folder with fit.jsonl and test.jsonl, objects with a text: what to "
                     "train and score on. Default: the sources of Python's standard library."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with a run that was killed in OUTPUT: the same options."
        ),
    ] = False,
    threads: Threads = None,
    as_json: Json = False,
    *,
    scheme: dict[str, Any],
) -> None:  # fmt: skip
    """Runs the whole path: perplexity, QAT fine-tuning, deploy, save, reload, generate.

    Unless options say otherwise, the model gets a scale for each 128 inputs, or 64 where 128 does
    not divide.
    """
    from bitlab_hf.demo.corpus import read_articles
    from bitlab_hf.demo.run import BUNDLED, Demo, Settings

    quiet()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    set_threads(threads)
    check_output(model, output)
    held = None if model is None else check_trainable(model, "demo")
    pretrained_config("demo", scheme, held)
    console = Console(stderr=as_json)
    settings = Settings(model=model, output=output, text=text, resume=resume)
    if text is not None:
        for part in ("fit", "test"):
            read_articles(text, part)
    if quick:
        settings = dataclasses.replace(
            settings,
            tokens=settings.tokens // 10,
            eval_tokens=settings.eval_tokens // 4,
            generate=32,
        )
    if tokens is not None:
        settings = dataclasses.replace(settings, tokens=tokens)
    with nullcontext(BUNDLED) if model is None else as_folder(model) as folder:
        config = pretrained_config("demo", scheme, held, folder)
        settings = dataclasses.replace(settings, folder=folder, config=config)
        with doing(f"the demo of {settings.model or 'the model that ships with BitLab'}"):
            report = Demo(settings, console, load_model).run()
    if as_json:
        emit(dataclasses.asdict(report), True, "")
