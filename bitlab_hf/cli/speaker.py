"""What `bitlab generate` and `bitlab chat` speak with: a model, its tokenizer, the times."""

from __future__ import annotations

import gc
import logging
import time
from enum import StrEnum
from typing import Annotated, Any

import typer

from bitcore.errors import ArgumentError, LifecycleError
from bitlab_hf.cli.common import progress
from bitlab_hf.demo.terminal import printable

logger = logging.getLogger("bitlab")


class Compiling(StrEnum):
    """How decoding is compiled: see `bitlab_hf.compile_decoding`."""

    EXACT = "exact"
    FUSED = "fused"


Compile = Annotated[
    Compiling | None,
    typer.Option(
        "--compile",
        help="Compile the decoding of a deployed model on the CPU, once for all processes: exact "
        "gives the same text, fused is quicker with long ones and rounds differently.",
        show_default=False,
    ),
]
PromptLookup = Annotated[
    int | None,
    typer.Option(
        "--prompt-lookup",
        min=1,
        max=64,
        help="Tokens to guess at a time from the text so far, and verify in one pass; quicker "
        "where a text repeats itself. The greedy text of a deployed model is the same.",
        show_default=False,
    ),
]


def check_speedups(compiling: Compiling | None, lookup: int | None) -> None:
    """Checks that at most one of the two is asked for.

    Raises:
        BadParameter: Both are: a pass of several tokens is not compiled.
    """
    if compiling is not None and lookup is not None:
        raise typer.BadParameter("it cannot be given with --compile", param_hint="--prompt-lookup")


def speed_of(result: dict[str, Any]) -> str:
    """Returns a result's speed in words."""
    speed = result["tokens_per_second"]
    rate = "" if speed is None else f", {speed:.1f} tokens/s"
    first = result["first_token_seconds"]
    made = result.get("compile_seconds")
    compiled = "" if made is None else f"; compiled in {made:.1f} s"
    return f"[{result['tokens']} tokens{rate}; first after {first:.2f} s{compiled}]"


class Speaker:
    """Generates text with one model, and measures it.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        max_tokens: New tokens at most.
        temperature: Of sampling; 0 is greedy.
        seed: Of sampling.
        compiling: Whether and how decoding is compiled, here and now.
        lookup: Tokens to guess at a time, or None.

    Raises:
        LifecycleError: The model cannot be compiled: see `bitlab_hf.compile_decoding`.
        ArgumentError: As above.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        max_tokens: int,
        temperature: float,
        seed: int,
        compiling: Compiling | None = None,
        lookup: int | None = None,
    ) -> None:
        import torch

        torch.manual_seed(seed)
        self._model, self._tokenizer = model, tokenizer
        self._options: dict[str, Any] = {"max_new_tokens": max_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            self._options["temperature"] = temperature
        if lookup is not None:
            self._options["prompt_lookup_num_tokens"] = lookup
            self._verify()
        self._compile_seconds: float | None = None
        if compiling is not None:
            self._options["cache_implementation"] = "static"
            self._compile_seconds = self._compile(compiling)

    def _verify(self) -> None:
        """Lets guesses change nothing; a model for which they may, a float one, is told of."""
        from bitlab_hf import verify_exactly

        try:
            verify_exactly(self._model)
        except (LifecycleError, ArgumentError) as error:
            reason = str(error).splitlines()[0]
            logger.warning("--prompt-lookup: the text may be another one than without: %s", reason)

    def _compile(self, compiling: Compiling) -> float:
        """Compiles by a first token and a step; returns the seconds."""
        import torch

        from bitlab_hf import compile_decoding

        started = time.perf_counter()
        compile_decoding(self._model, exact=compiling is Compiling.EXACT)
        ids = torch.zeros((1, 1), dtype=torch.long, device=self._model.device)
        with progress("compiling", None):
            self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=2,
                max_new_tokens=2,
                cache_implementation="static",
            )
        return time.perf_counter() - started

    def continue_(self, ids: list[int], show: bool) -> dict[str, Any]:
        """Continues tokens; returns the text, its tokens and the times.

        Args:
            ids: The prompt's tokens.
            show: Whether to print the text as it comes.

        Raises:
            ArgumentError: There are none.
        """
        import torch

        if not ids:
            raise ArgumentError("generate: the prompt must hold at least one token, got none")
        stream = _Stream(self._tokenizer, show)
        prompt = torch.tensor([ids], device=self._model.device)
        # What was loaded is not looked through for garbage at every few hundred tensors.
        gc.freeze()
        started = time.perf_counter()
        try:
            output = self._model.generate(
                prompt, attention_mask=torch.ones_like(prompt), streamer=stream, **self._options
            )
        finally:
            gc.unfreeze()
        new = output[0, len(ids) :]
        times, counts = stream.times, stream.counts
        # The first token's time is the prompt's, so the speed is that of those after it.
        speed = sum(counts[1:]) / (times[-1] - times[0]) if len(times) > 1 else None
        result: dict[str, Any] = {
            "text": str(self._tokenizer.decode(new, skip_special_tokens=True)),
            "tokens": len(new),
            "tokens_per_second": speed,
            "first_token_seconds": times[0] - started,
            "seconds": time.perf_counter() - started,
        }
        if self._compile_seconds is not None:
            result["compile_seconds"] = self._compile_seconds
        return result


class _Stream:
    """What generate() hands tokens to: prints whole words, notes when how many came."""

    def __init__(self, tokenizer: Any, show: bool) -> None:
        from transformers import TextStreamer

        class Printable(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                super().on_finalized_text(printable(text), stream_end)

        self._text = Printable(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show, self._prompt_seen = show, False
        self.times: list[float] = []
        self.counts: list[int] = []

    def put(self, value: Any) -> None:
        if self._prompt_seen:
            self.times.append(time.perf_counter())
            self.counts.append(value.numel())
        self._prompt_seen = True
        if self._show:
            self._text.put(value)

    def end(self) -> None:
        if self._show:
            self._text.end()
