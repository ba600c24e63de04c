"""Servers under load: vLLM with BitLab's plugin, vLLM with the dense model, and transformers'.

    python scripts/bench/serve.py --vllm ~/vllm --model path/to/a/float/model
    python scripts/bench/serve.py --vllm ~/vllm --quick     # the model that ships with BitLab

Packs the model without training (as fast as a trained one, and as wordy), starts each server in
turn, and asks 1, 8 and 32 questions at once, streamed and greedy. Writes serve.json and serve.md.

First token, between tokens: seconds, p50 and p95 over all answers of a round. Memory: resident, of
all processes, after the largest round. Equal: answers that are those of the same server asked one
by one, and of transformers' `generate`. A ternary model is float32 beside its packed weights, so
that equal sums give equal tokens; a dense one is bfloat16, whose tokens can depend on the batch.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Disturbance, Grid, Target, close, header
from rich.console import Console
from serve_load import Answer, Server, running
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitlab_hf import BitLabConfig, save

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "bitlab_hf/demo/model"
COLUMNS = [
    "server", "streams", "tok/s", "first p50", "first p95", "between p50", "between p95", "memory",
    "errors", "= alone", "= generate",
]  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm", type=Path, required=True, help="vLLM's environment")
    parser.add_argument("--model", type=Path, default=DEMO, help="a float model with a tokenizer")
    parser.add_argument("--streams", type=int, nargs="+", help="default: 1 8 32; quick: 1 4")
    parser.add_argument("--tokens", type=int, help="of each answer; default 64, quick 16")
    parser.add_argument("--servers", nargs="+", help="only these, by the beginning of their names")
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    parser.add_argument("--output", type=Path, default=Path("serve.json"))
    given = parser.parse_args()
    given.streams = given.streams or ([1, 4] if given.quick else [1, 8, 32])
    given.tokens = given.tokens or (16 if given.quick else 64)
    return given


def prompts(count: int) -> list[str]:
    """Paragraphs of BitLab's documents, of very different lengths, in a fixed order."""
    texts = [file.read_text() for file in sorted((ROOT / "docs").glob("*.md"))]
    found = [one.strip() for text in texts for one in text.split("\n\n")]
    usable = [one for one in found if 60 < len(one) < 1500 and not one.startswith(("|", "```"))]
    return [usable[index * len(usable) // count] for index in range(count)]


def pack(source: Path, folder: Path) -> Path:
    """Writes the model as a ternary one, float32 beside its packed weights."""
    config = BitLabConfig(mode="infer", head="int8", weight_granularity="per_group", group_size=64)
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, dtype=torch.float32
    )
    save(model, folder, tokenizer=AutoTokenizer.from_pretrained(source))
    return folder


def generated(folder: Path, given: list[str], tokens: int) -> list[str]:
    """What plain `generate` continues each prompt with."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = []
    for prompt in given:
        ids = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=tokens, do_sample=False)[0]
        start = ids["input_ids"].shape[1]
        texts.append(str(tokenizer.decode(out[start:], skip_special_tokens=True)))
    return texts


def percentiles(values: list[float]) -> tuple[float, float]:
    """The 50th and the 95th."""
    if not values:
        return float("nan"), float("nan")
    middle, high = np.percentile(values, [50, 95])
    return float(middle), float(high)


def measure(
    server: Server, given: list[str], tokens: int, count_tokens: Any, alone: list[str]
) -> dict[str, Any]:
    """One round of questions at once."""
    answers, seconds = server.ask_all(given, tokens)
    first = [one.times[0] for one in answers if one.times]
    between = [float(gap) for one in answers for gap in np.diff(one.times)]
    return {
        "streams": len(given),
        "tokens_per_second": sum(count_tokens(one.text) for one in answers) / seconds,
        "first": percentiles(first),
        "between": percentiles(between),
        "memory": server.memory(),
        "errors": [one.error for one in answers if one.error],
        "alone": equal(answers, alone),
        "texts": [one.text for one in answers],
    }


def equal(answers: list[Answer], texts: list[str]) -> int:
    """How many whole answers have the text at their place."""
    return sum(
        not one.error and one.text == text for one, text in zip(answers, texts, strict=False)
    )


def row(name: str, found: dict[str, Any], reference: list[str]) -> list[str]:
    """A line of the table."""
    count = found["streams"]
    same = sum(a == b for a, b in zip(found["texts"], reference, strict=False))
    figures = [f"{value:.3f} s" for value in (*found["first"], *found["between"])]
    return [
        name, str(count), f"{found['tokens_per_second']:.1f}", *figures,
        f"{found['memory'] / 1e9:.2f} GB", str(len(found["errors"])), f"{found['alone']}/{count}",
        f"{same}/{count}",
    ]  # fmt: skip


def main() -> None:
    """Runs the benchmark."""
    given, console = parse_arguments(), Console()
    result: dict[str, Any] = header(console, "bench/serve.py")
    disturbance = Disturbance()
    asked = prompts(max(given.streams))
    tokenizer = AutoTokenizer.from_pretrained(given.model)

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    grid, result["servers"] = Grid("Servers under load", COLUMNS), {}
    with tempfile.TemporaryDirectory() as work:
        ternary = pack(given.model, Path(work) / "ternary")
        through = ["--vllm", str(given.vllm)]
        servers: dict[str, tuple[Path, list[str]]] = {
            "vLLM, ternary": (ternary, through),
            "vLLM, dense bfloat16": (given.model, [*through, "--", "--dtype", "bfloat16"]),
            "transformers, ternary": (ternary, ["--with-transformers"]),
            "transformers, ternary, continuous batching": (
                ternary, ["--with-transformers", "--", "--continuous-batching"],
            ),
        }  # fmt: skip
        if given.servers:
            servers = {
                name: how for name, how in servers.items() if name.startswith(tuple(given.servers))
            }
        references = {
            folder: generated(folder, asked, given.tokens)
            for folder in {folder for folder, _ in servers.values()}
        }
        for name, (folder, options) in servers.items():
            console.print(f"{name} ...")
            log = given.output.with_name(f"serve-{name.replace(', ', '-').replace(' ', '-')}.log")
            with running(folder, options, log) as server:
                # The first answer pays for what is made once.
                server.ask(asked[0], given.tokens)
                alone = [server.ask(prompt, given.tokens).text for prompt in asked]
                rounds = [
                    measure(server, asked[:count], given.tokens, count_tokens, alone)
                    for count in given.streams
                ]
            result["servers"][name] = rounds
            grid.rows += [row(name, found, references[folder]) for found in rounds]
    grid.show(console)
    errors = sum(len(one["errors"]) for rounds in result["servers"].values() for one in rounds)
    targets = [Target("errors: 0", float(errors), 0.0, at_least=False, unit="")]
    close(console, result, [grid], targets, disturbance, given.output, for_vnni=False)


if __name__ == "__main__":
    main()
