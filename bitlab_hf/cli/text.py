"""Commands that run a model: eval, generate, chat."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from bitcore.errors import ArgumentError
from bitlab_hf.cli.common import (
    MOST,
    Batch,
    FloatSource,
    Json,
    Length,
    Seed,
    Texts,
    Threads,
    emit,
    finite,
    progress,
    quiet,
    read_texts,
    set_threads,
)
from bitlab_hf.cli.errors import doing
from bitlab_hf.cli.gguf_source import as_folder
from bitlab_hf.cli.loading import (
    load_model,
    load_tokenizer,
    read_scheme,
)
from bitlab_hf.cli.scheme import check_same, config_of, load_packed, with_scheme
from bitlab_hf.cli.speaker import Compile, PromptLookup, Speaker, check_speedups, speed_of
from bitlab_hf.demo.terminal import printable

MaxTokens = Annotated[int, typer.Option(min=1, max=MOST, help="Tokens to generate at most.")]
Temperature = Annotated[
    float,
    typer.Option(min=0.0, callback=finite, help="Of sampling; 0 takes the likeliest token."),
]
Record = Annotated[
    bool, typer.Option("--record", help="Write the figure into the model's card, too.")
]


@with_scheme
def evaluate(
    source: FloatSource,
    text: Texts,
    length: Length = 512,
    tokens: Annotated[int | None, typer.Option(min=2, max=MOST, help="Tokens at most.")] = None,
    batch: Batch = 4,
    threads: Threads = None,
    record: Record = False,
    as_json: Json = False,
    *,
    scheme: dict[str, Any],
) -> None:
    """Measures the perplexity of a text in blocks of equal length; a rest is left out.

    A float model is packed while it loads where a scheme is given, and measured so.
    """
    from bitlab_hf import Facts, record_facts
    from bitlab_hf.demo.text import make_blocks, measure_perplexity

    quiet()
    set_threads(threads)
    if record:
        _check_recordable(source, scheme)
    held = read_scheme(source)
    if held is None:
        config_of("eval", scheme, None)
    else:
        check_same("eval", scheme, held)
    files = read_texts(text)
    with as_folder(source) as folder:
        tokenizer = load_tokenizer(folder)
        try:
            blocks = make_blocks(tokenizer, files, length)
        except ValueError as error:
            raise ArgumentError(f"eval: {error}\nPass a smaller --length or more text.") from error
        if tokens is not None:
            blocks = blocks.first(tokens)
        pack = held is None and scheme
        model = load_packed("eval", folder, scheme, None) if pack else load_model(folder)
    started = time.perf_counter()
    with progress("scoring", len(blocks.ids)) as advance, doing(f"scoring {source}"):
        found = measure_perplexity(model, blocks, batch, advance)
    seconds = time.perf_counter() - started
    count = blocks.ids.numel()
    if record:
        names = ", ".join(file.name for file in text)
        key = f"{names}: {count:,} tokens in blocks of {blocks.ids.shape[1]}"
        record_facts(source, Facts(perplexities={key: found.value}))
    emit(
        {
            "perplexity": found.value,
            "nats": found.nats,
            "bits_per_byte": found.bits_per_byte,
            "tokens": count,
            "length": blocks.ids.shape[1],
            "seconds": seconds,
        },
        as_json,
        f"perplexity {found.value:.3f}, {found.bits_per_byte:.4f} bits a byte, over {count:,} "
        f"tokens in blocks of {blocks.ids.shape[1]} ({count / seconds:.0f} tokens/s)",
    )


def generate(
    source: FloatSource,
    prompt: Annotated[
        str, typer.Argument(help="Text to continue; - reads standard input.", show_default=False)
    ],
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    threads: Threads = None,
    compiling: Compile = None,
    lookup: PromptLookup = None,
    record: Record = False,
    as_json: Json = False,
) -> None:
    """Continues a text, as it comes, and tells how fast."""
    from bitlab_hf import Facts, record_facts

    check_speedups(compiling, lookup)
    quiet()
    set_threads(threads)
    if record:
        _check_recordable(source)
    read_scheme(source)
    text = _read_prompt() if prompt == "-" else prompt
    with as_folder(source) as folder:
        tokenizer = load_tokenizer(folder)
        speaker = Speaker(
            load_model(folder), tokenizer, max_tokens, temperature, seed, compiling, lookup
        )
    if not as_json:
        typer.echo(printable(text), nl=False)
    with doing(f"generating with {source}"):
        result = speaker.continue_(tokenizer(text)["input_ids"], show=not as_json)
    if record and result["tokens_per_second"] is not None:
        record_facts(source, Facts(speeds={_where(compiling, lookup): result["tokens_per_second"]}))
    emit({"prompt": text, **result}, as_json, "")
    if not as_json:
        typer.echo(speed_of(result), err=True)


def chat(
    source: FloatSource,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    seed: Seed = 0,
    threads: Threads = None,
    compiling: Compile = None,
    lookup: PromptLookup = None,
    as_json: Json = False,
) -> None:
    """Talks with a model. /reset starts anew, /quit or the end of the input ends it.

    A model without a chat template is given the conversation as plain text.
    """
    check_speedups(compiling, lookup)
    quiet()
    set_threads(threads)
    read_scheme(source)
    with as_folder(source) as folder:
        tokenizer = load_tokenizer(folder)
        speaker = Speaker(
            load_model(folder), tokenizer, max_tokens, temperature, seed, compiling, lookup
        )
    start = [] if system is None else [{"role": "system", "content": system}]
    messages = list(start)
    interactive = sys.stdin.isatty() and not as_json
    if interactive:
        typer.echo("/reset starts anew, /quit ends.", err=True)
    while True:
        if interactive:
            typer.echo("> ", nl=False)
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return
        if line.strip() == "/reset":
            messages = list(start)
            continue
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.rstrip("\n")})
        with doing(f"talking with {source}"):
            result = speaker.continue_(_conversation(tokenizer, messages), show=not as_json)
        messages.append({"role": "assistant", "content": result["text"]})
        emit(result, as_json, "")
        if not as_json:
            typer.echo(speed_of(result), err=True)


def _read_prompt() -> str:
    with doing("reading the prompt from standard input"):
        return sys.stdin.read()


def _check_recordable(source: str, scheme: dict[str, Any] | None = None) -> None:
    if not Path(source).is_dir():
        raise ArgumentError(f"--record: the model must be a folder, got {source}")
    if scheme and read_scheme(source) is None:
        raise ArgumentError(
            "--record: the scheme must be left out, got one for a float model\n"
            "The figure is not the model's in the folder: deploy it, and record it there."
        )


def _where(compiling: str | None, lookup: int | None) -> str:
    """Returns what a speed on the CPU depends on."""
    import torch

    from bitcore.kernels import kernels_for

    isa = getattr(kernels_for("cpu"), "isa", "torch reference")
    where = f"decoding on the CPU, {torch.get_num_threads()} threads, {isa}"
    if compiling is not None:
        where += f", compiled ({compiling})"
    return where if lookup is None else f"{where}, prompt lookup of {lookup}"


def _conversation(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    if getattr(tokenizer, "chat_template", None):
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, tokenize=True
        )
        return list(ids["input_ids"])
    text = "\n".join(message["content"] for message in messages) + "\n"
    return list(tokenizer(text)["input_ids"])
