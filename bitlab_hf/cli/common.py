"""What the commands share: options, progress, and how they print a result."""

from __future__ import annotations

import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from bitcore.errors import ArgumentError
from bitlab_hf.cli.errors import doing
from bitlab_hf.cli.places import check_text
from bitlab_hf.demo.terminal import printable

if TYPE_CHECKING:
    from bitlab_hf.demo.corpus import SourceFile

# What counts may be; far above any use, far below what overflows in torch.
MOST = 2**31 - 1
# At which a pretrained model keeps most in the default recipe: docs/quality.md.
LEARNING_RATE = 2e-4
# More threads than this serve no machine, and their stacks can take a process down.
MOST_THREADS = max(256, 4 * (os.cpu_count() or 1))


def finite(value: float | None) -> float | None:
    """Checks a number that an option was given.

    Raises:
        BadParameter: It is infinite or not a number.
    """
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


Json = Annotated[
    bool, typer.Option("--json", help="Print the result, or an error, as a JSON object.")
]
Threads = Annotated[
    int | None, typer.Option(min=1, max=MOST_THREADS, help="CPU threads. Default: torch's.")
]
Source = Annotated[str, typer.Argument(help="A folder, or a name on the hub.", show_default=False)]
FloatSource = Annotated[
    str,
    typer.Argument(help="A folder, a name on the hub, or a .gguf file.", show_default=False),
]
Output = Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)]
# What numpy's generator takes, too.
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of what is drawn at random.")]
Batch = Annotated[int, typer.Option(min=1, max=2**16, help="Blocks at a time.")]
Length = Annotated[int, typer.Option(min=2, max=2**22, help="Tokens of a block.")]
Texts = Annotated[
    list[Path],
    typer.Option(exists=True, dir_okay=False, help="A text file; may be given repeatedly."),
]


def examples(*lines: str) -> str:
    """Returns a command's examples, as the end of its help."""
    return "\n\n".join(["Examples:", *lines])


def quiet() -> None:
    """Leaves the terminal to the command: no warnings and no bars of other libraries."""
    from transformers import dynamic_module_utils
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # The hub's client tells of each of its retries.
    for name in ("accelerate", "bitsandbytes", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning)
    # BitLab's own warnings, which can hold names out of files.
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Printable())
    # Without it transformers asks whether a model's own code may run, and takes the answer from
    # whatever standard input is.
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def read_texts(files: list[Path], option: str = "--text") -> list[SourceFile]:
    """Reads the files that an option names; of ``.jsonl`` ones the ``text`` of each line's object.

    Raises:
        ArgumentError: A file is not UTF-8, no ordinary one, or a line of it holds no text.
    """
    from bitlab_hf.demo.corpus import SourceFile, parse_articles

    texts: list[SourceFile] = []
    for file in files:
        check_text(file)
        with doing(f"reading {file}"):
            try:
                content = file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ArgumentError(
                    f"{option}: {file} must be UTF-8, got the byte "
                    f"0x{error.object[error.start]:02x} at position {error.start}\n"
                    "Convert it: iconv -f ENCODING -t UTF-8."
                ) from error
        if file.suffix == ".jsonl":
            texts += parse_articles(option, file, content)
        else:
            texts.append(SourceFile(str(file), content))
    return texts


def set_threads(threads: int | None) -> None:
    """Sets torch's threads where a number was given."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


Advance = Callable[[float], None]


@contextmanager
def bars() -> Iterator[Callable[[str, float | None], Advance]]:
    """Shows bars with the time left on standard error; gives what adds one of a title and a total,
    which gives what advances it.
    """
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:

        def add(title: str, total: float | None) -> Advance:
            task = shown.add_task(title, total=total)
            return lambda amount: shown.advance(task, amount)

        yield add


@contextmanager
def progress(title: str, total: float | None) -> Iterator[Advance]:
    """Shows one bar; gives what advances it."""
    with bars() as add:
        yield add(title, total)


@contextmanager
def library_bars() -> Iterator[Callable[[str, float | None], Advance]]:
    """Shows bars for what transformers loads and writes meanwhile; gives what adds others."""
    from transformers.utils import logging as transformers_logging

    with bars() as add:

        class Shown(transformers_logging.EmptyTqdm):
            """What transformers takes for tqdm."""

            def __init__(self, iterable: Any = (), **options: Any) -> None:
                super().__init__()
                self._items = iterable
                total = options.get("total")
                if total is None and hasattr(iterable, "__len__"):
                    total = len(iterable)
                self._advance = add(str(options.get("desc") or "working").lower(), total)

            def __iter__(self) -> Iterator[Any]:
                for item in self._items:
                    yield item
                    self._advance(1)

            def update(self, amount: float = 1) -> None:
                self._advance(amount)

        before = transformers_logging.set_tqdm_hook(
            lambda _factory, args, options: Shown(*args, **options)
        )
        try:
            yield add
        finally:
            transformers_logging.set_tqdm_hook(before)


def emit(result: dict[str, Any], as_json: bool, text: str) -> None:
    """Prints a result: JSON, in which a number that is not finite is null, or lines for people."""
    if as_json:
        typer.echo(json.dumps(_plain(result), indent=2, allow_nan=False))
    else:
        typer.echo(printable(text))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def megabytes(size: int) -> str:
    """Returns a size in millions of bytes."""
    return f"{size / 1e6:.1f} MB"


def folder_bytes(folder: Path) -> int:
    """Returns the size of a folder's weight files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
