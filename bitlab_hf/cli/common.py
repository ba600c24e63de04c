"""What the commands share: options, loading, progress, and how they end."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from bitcore.errors import ArgumentError

if TYPE_CHECKING:
    from bitlab_hf.demo.corpus import SourceFile

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
# torch starts as many as it is told, and the process ends where the system gives no more.
MOST_THREADS = max(64, os.cpu_count() or 1)
Threads = Annotated[
    int | None, typer.Option(min=1, max=MOST_THREADS, help="CPU threads. Default: torch's.")
]
Source = Annotated[str, typer.Argument(help="A folder, or a name on the hub.", show_default=False)]
Output = Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)]

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def examples(*lines: str) -> str:
    """Returns a command's examples, as the end of its help."""
    return "\n\n".join(["Examples:", *lines])


def quiet() -> None:
    """Leaves the terminal to the command: no warnings and no bars of other libraries."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # The hub's client tells of each of its retries.
    for name in ("accelerate", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning)


def read_scheme(source: str) -> dict[str, Any] | None:
    """Returns the quantization_config of a folder or a name of the hub; None of a float model.

    Raises:
        ConfigError: BitLab does not know the scheme; see `find_scheme` for the rest.
    """
    from bitlab_hf.checkpoint.files import scheme_of

    return scheme_of(find_scheme(source), source)


def find_scheme(source: str) -> Any:
    """Returns the quantization_config of a folder or a name of the hub, whoever wrote it.

    Raises:
        ArgumentError: It is neither, or the hub does not give it.
        CheckpointError: config.json is damaged, or weights are missing or lie elsewhere.
    """
    from bitlab_hf.checkpoint.files import INDEX, read_config, weight_files

    path = Path(source)
    if path.is_dir():
        held = read_config(path).get("quantization_config")
        if (path / INDEX).exists():
            weight_files(path, source)
        return held
    if path.exists() or not _HUB_NAME.fullmatch(source):
        raise ArgumentError(f"{source}: the model must be a folder or a hub name, got neither")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source)
    except OSError as error:
        raise ArgumentError(
            f"{source}: the model must be a folder, or on the hub and within reach, got: "
            f"{str(error).splitlines()[0]}\nCheck the name and the connection; run `hf auth login` "
            "for what is private."
        ) from error
    return getattr(config, "quantization_config", None)


def check_source(source: str) -> str:
    """Returns a folder or a name of the hub as it was given, checked as `read_scheme` does."""
    read_scheme(source)
    return source


def check_unpacked(source: str, op: str, fix: str) -> dict[str, Any] | None:
    """Returns the scheme of a model with float weights, latent or not.

    Raises:
        ArgumentError: The model is deployed, or of transformers' bitnet method.
    """
    scheme = read_scheme(source)
    if scheme is not None and scheme["quant_method"] == "bitnet":
        raise ArgumentError(
            f"{op}: the model must be latent or float, got one of transformers' bitnet method\n"
            "Make it BitLab's first: bitlab import."
        )
    if scheme is not None and scheme.get("weight_format") == "packed":
        raise ArgumentError(f"{op}: the model must be latent or float, got a deployed one\n{fix}")
    return scheme


def check_trainable(source: str, op: str) -> None:
    """Checks that a model can be trained.

    Raises:
        ArgumentError: Its weights are packed.
    """
    fix = "Train the latent model that it was made from, or adapters (scripts/finetune_lora.py)."
    check_unpacked(source, op, fix)


def check_output(source: str, output: Path) -> None:
    """Checks where a command writes what it makes of a model.

    Raises:
        ArgumentError: The output is a file, or would take the source's place.
    """
    from bitlab_hf.checkpoint.atomic import check_folder

    check_folder(output, str(output))
    if output.exists() and Path(source).exists() and output.samefile(source):
        raise ArgumentError(
            f"{output}: the output must be another folder than the model's, got the same\n"
            "The model would be replaced by what is made of it."
        )


def read_texts(files: list[Path]) -> list[SourceFile]:
    """Reads the files that --text names.

    Raises:
        ArgumentError: A file is not UTF-8.
    """
    from bitlab_hf.demo.corpus import SourceFile

    texts: list[SourceFile] = []
    for file in files:
        try:
            texts.append(SourceFile(str(file), file.read_text(encoding="utf-8")))
        except UnicodeDecodeError as error:
            raise ArgumentError(
                f"--text: {file} must be UTF-8, got the byte 0x{error.object[error.start]:02x} at "
                f"position {error.start}\nConvert it: iconv -f ENCODING -t UTF-8."
            ) from error
    return texts


def load_tokenizer(source: str) -> Any:
    """Returns a model's tokenizer.

    Raises:
        ArgumentError: There is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ArgumentError(
            f"{source}: the model must have a tokenizer, got none ({_first_sentence(error)})\n"
            "Save one into the folder: tokenizer.save_pretrained(folder)."
        ) from error


def tokenizer_if_any(source: str) -> Any:
    """Returns a model's tokenizer, or None."""
    try:
        return load_tokenizer(source)
    except ArgumentError:
        return None


def load_model(source: str, **options: Any) -> Any:
    """Loads a causal language model, in eval mode: a float one, BitLab's or bitnet's."""
    from transformers import AutoModelForCausalLM

    from bitlab_hf import load_bitnet

    scheme = read_scheme(source)
    if scheme is not None and scheme["quant_method"] == "bitnet":
        return load_bitnet(source, **options).eval()
    return AutoModelForCausalLM.from_pretrained(source, **options).eval()


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
    """Prints a result: JSON, or lines for people."""
    typer.echo(json.dumps(result, indent=2) if as_json else text)


def megabytes(size: int) -> str:
    """Returns a size in millions of bytes."""
    return f"{size / 1e6:.1f} MB"


def folder_bytes(folder: Path) -> int:
    """Returns the size of a folder's weight files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def fail(error: BaseException) -> None:
    """Prints an error as one message, without a traceback."""
    from bitcore.errors import BitLabError

    kind = "" if isinstance(error, BitLabError) else f"{type(error).__name__}: "
    message = str(error).strip() or "(no message)"
    Console(stderr=True, soft_wrap=True).print(
        f"error: {kind}{message}", markup=False, highlight=False, style="red"
    )


def take_flag(name: str) -> bool:
    """Takes a flag from the command line, wherever it stands before a ``--``."""
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    if name not in sys.argv[1:end]:
        return False
    sys.argv.remove(name)
    return True


def _first_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return re.split(r"(?<=[.!?]) ", text, maxsplit=1)[0]
