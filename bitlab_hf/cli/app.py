"""The commands of ``bitlab``; each imports what it needs when it runs, so that ``--help`` is
quick.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    name="bitlab",
    help="Ternary (1.58-bit) language models inside Hugging Face transformers.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Shows which kernels run on this machine, and why.

    Example: bitlab info --json
    """
    from rich.table import Table

    import bitcore

    found = bitcore.backends()
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(item) for item in found], indent=2))
        return
    table = Table("device", "backend", "available", "chosen", "why")
    for item in found:
        table.add_row(
            item.device,
            item.name,
            "yes" if item.available else "no",
            "yes" if item.chosen else "no",
            item.reason,
        )
    Console().print(table)


@app.command()
def demo(
    model: Annotated[
        str | None,
        typer.Option(help="A causal language model: a folder or a hub name. Default: a small one "
                     "that ships with BitLab."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Where to put the ternary model.")] = Path(
        "out/demo"
    ),
    quick: Annotated[bool, typer.Option(help="Train on a tenth of the tokens.")] = False,
    tokens: Annotated[int | None, typer.Option(min=1, help="Training tokens.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:  # fmt: skip
    """Runs the whole path: perplexity, QAT fine-tuning, deploy, save, reload, generate.

    Examples: bitlab demo --quick; bitlab demo --model path/to/model --output out/mine
    """
    import torch
    from transformers.utils import logging as transformers_logging

    from bitlab_hf.demo.run import Demo, Settings

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if threads is not None:
        torch.set_num_threads(threads)
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


def main() -> None:
    """Runs the command line; BitLab's own errors end it with exit code 1 and one clear message."""
    from bitcore.errors import BitLabError

    try:
        app()
    except BitLabError as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False)
        raise SystemExit(1) from error
