"""What a run of the demo measured, and how it is shown."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from bitlab_hf.demo.probe import Answer
from bitlab_hf.demo.terminal import printable
from bitlab_hf.demo.text import Perplexity

PROMPTS = (
    "class Queue:\n    def __init__(self, maxsize=0):\n",
    "    def __len__(self):\n        return",
    '    def close(self):\n        """',
)


@dataclass
class Report:
    """What a run measured; ratios are of perplexities."""

    model: str
    threads: int
    isa: str
    prompts: tuple[str, ...] = PROMPTS
    train_tokens: int = 0
    heldout_tokens: int = 0
    original: Perplexity | None = None
    rounded: Perplexity | None = None
    finetuned: Perplexity | None = None
    ternary: Perplexity | None = None
    ratio: float = 0.0
    logits_identical: bool = False
    original_probe: Answer | None = None
    ternary_probe: Answer | None = None
    original_bytes: int = 0
    ternary_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


def show_texts(report: Report, console: Console) -> None:
    """Prints what the original and the ternary model continue each prompt with."""
    assert report.original_probe is not None
    assert report.ternary_probe is not None
    for index, prompt in enumerate(report.prompts):
        for name, answer in (
            ("original", report.original_probe),
            ("ternary", report.ternary_probe),
        ):
            console.rule(f"{name}, greedy", align="left", style="dim")
            console.print(prompt, style="dim", end="", markup=False, highlight=False)
            lines = answer.texts[index].splitlines()[:5]
            console.print(printable("\n".join(lines)), markup=False, highlight=False)


def show_table(report: Report, console: Console, output: Path) -> None:
    """Prints the closing table."""
    # Fits 80 columns.
    table = Table(title="Everything here was measured in this run", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("model", no_wrap=True)
    for name in ("perplexity", "bits/byte", "weights", "memory", "load", "tok/s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row(
        "original",
        *_quality(report.original),
        *_cost(report.original_bytes, report.original_probe),
    )
    if report.finetuned is not None:
        table.add_row("original, fine-tuned", *_quality(report.finetuned))
    table.add_row("ternarized, untrained", *_quality(report.rounded))
    table.add_row(
        "ternary, trained",
        *_quality(report.ternary),
        *_cost(report.ternary_bytes, report.ternary_probe),
        style="bold",
    )
    console.print(table)
    seen, beside = "Trained on", "the original's"
    if report.finetuned is not None:
        seen, beside = "Both fine-tunings saw the same", "the better full-precision one"
    same = "bit-identical" if report.logits_identical else "DIFFERENT"
    console.print(
        f"{seen} {report.train_tokens:,} tokens; scored on {report.heldout_tokens:,} held-out "
        f"ones. Perplexity is {report.ratio:.2f} times {beside}. "
        f"Logits after reloading in a fresh process: {same}.\n"
        f"Total time {sum(report.seconds.values()):.0f} s. The model: {output}",
        markup=False,
    )


def _quality(perplexity: Perplexity | None) -> tuple[str, str]:
    assert perplexity is not None
    return f"{perplexity.value:.2f}", f"{perplexity.bits_per_byte:.3f}"


def _cost(size: int, answer: Answer | None) -> tuple[str, str, str, str]:
    assert answer is not None
    return (
        f"{size / 1e6:.2f} MB" if size else "-",
        f"{answer.resident_bytes / 1e6:.1f} MB",
        f"{answer.load_seconds:.2f} s",
        f"{answer.tokens_per_second:.0f}",
    )
