"""The commands of ``bitlab``; each imports what it needs when it runs, so that ``--help`` is
quick.

Results go to standard output, progress and errors to standard error. Exit codes: 0 done, 1 failed,
2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import importlib.metadata
from typing import Annotated

import typer

from bitlab_hf.cli import bench, demo, info, models, report, rotate, serve, text, train
from bitlab_hf.cli.common import examples
from bitlab_hf.cli.errors import run

app = typer.Typer(
    name="bitlab",
    help="Ternary (1.58-bit) language models inside Hugging Face transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage.",
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(importlib.metadata.version("bitlab-hf"))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show it and exit."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")
    ] = False,
) -> None:
    """Ternary (1.58-bit) language models inside Hugging Face transformers."""


app.command(
    epilog=examples("bitlab info", "bitlab info out/demo --layers", "bitlab info out/demo --json")
)(info.info)
app.command(
    epilog=examples(
        "bitlab rotate my-float-model out/rotated",
        "bitlab train out/rotated out/latent --text book.txt",
    )
)(rotate.rotate)
app.command(
    epilog=examples(
        "bitlab train my-float-model out/latent --text book.txt",
        "bitlab train my-float-model out/latent --text book.txt --recipe recipe.json --resume",
        "bitlab train model.gguf out/latent --text book.txt --weight-granularity per_group "
        "--group-size 64",
        "bitlab deploy out/latent out/deployed",
    )
)(train.train)
app.command(
    epilog=examples(
        "bitlab deploy out/latent out/deployed",
        "bitlab deploy my-float-model out/deployed --weight-granularity per_group --group-size 64",
    )
)(models.deploy)
app.command(
    epilog=examples(
        "bitlab convert ternary-but-float out/packed",
        "bitlab convert ternary-but-float out/packed --keep-inexact --json",
    )
)(models.convert)
app.command(
    "import",
    epilog=examples(
        "bitlab import a-bitnet-model out/imported", "bitlab import model.gguf out/imported"
    ),
)(models.import_)
app.command(
    epilog=examples(
        "bitlab export out/demo out/for-everyone --to bitnet",
        "bitlab export out/demo out/two-bits --to compressed-tensors",
        "bitlab export out/demo out/demo.gguf --to gguf --qtype TQ1_0",
    )
)(models.export)
app.command(
    epilog=examples(
        "bitlab push out/demo me/my-model-1.58bit", "bitlab push out/demo me/my-model --public"
    )
)(models.push)
app.command(
    "eval",
    epilog=examples(
        "bitlab eval out/demo --text book.txt",
        "bitlab eval out/demo --text a.txt --text b.txt --length 1024 --json",
        "bitlab eval my-float-model --text book.txt --weight-granularity per_channel",
    ),
)(text.evaluate)
app.command(
    epilog=examples(
        'bitlab generate out/demo "def main():" --max-tokens 64',
        "cat prompt.txt | bitlab generate out/demo - --json",
    )
)(text.generate)
app.command(
    epilog=examples("bitlab chat my-model", 'bitlab chat my-model --system "Answer in one line."')
)(text.chat)
app.command(
    epilog=examples(
        "bitlab serve out/demo",
        "bitlab serve out/demo --port 8080 --vllm ~/vllm -- --max-model-len 4096",
    )
)(serve.serve)
app.command(
    epilog=examples(
        "bitlab bench", "bitlab bench out/demo --tokens 1 --threads 1 --threads 2 --json"
    )
)(bench.bench)
app.command(
    epilog=examples(
        "bitlab report out/demo/run", "bitlab report my-run --out report.html --baseline 12.4"
    )
)(report.report)
app.command(
    epilog=examples(
        "bitlab demo --quick", "bitlab demo --model path/to/model --output out/mine --json"
    )
)(demo.demo)


def main() -> None:
    """Runs the command line; an error ends it with exit code 1 and one clear message."""
    run(app)
