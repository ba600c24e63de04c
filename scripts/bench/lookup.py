"""Times prompt lookup: `generate` with guesses out of the text so far, against the same without.

    python scripts/bench/lookup.py --model out/smollm2 --text models/wikipedia/test.jsonl

The model is a deployed one, or a float one for comparison. Each article's first words are continued
greedily without guesses, with transformers' `prompt_lookup_num_tokens`, and, where it is deployed,
after `verify_exactly`, which `bitlab generate --prompt-lookup` calls; in turn, several rounds. What
it gains depends on the text, so a row tells of the articles where it gains least and most, and how
many texts are those without guesses. Writes lookup.json and lookup.md.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Disturbance, Grid, close, header
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitcore.kernels import kernels_for
from bitlab_hf import BitLabConfig, quantized_layers, verify_exactly

PLAIN, STOCK, EXACT = "without", "transformers", "verify_exactly"
# Of a prompt.
WORDS = 12


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="folder of a model, deployed or float")
    parser.add_argument(
        "--text", type=Path, help='JSON lines with "text", as real_models.py writes'
    )
    parser.add_argument("--prompts", type=int, default=16, help="articles that are continued")
    parser.add_argument("--tokens", type=int, default=128, help="new ones of each")
    parser.add_argument("--guesses", type=int, default=5, help="tokens guessed at a time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, default=Path("out/bench/lookup.json"))
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.model = Path(str(files("bitlab_hf.demo") / "model"))
        options.prompts, options.tokens, options.rounds = 2, 12, 1
    elif options.model is None or options.text is None:
        parser.error("--model and --text must be given, or --quick")
    return options


def load(options: Any) -> Any:
    """Loads the model; a quick run's is rounded while it loads."""
    config = BitLabConfig(mode="infer", head="int8")
    how = {"quantization_config": config} if options.quick else {}
    return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16, **how)


def prompts_of(options: Any) -> list[Tensor]:
    """Returns the tokens of the first words of articles: int64 [1, M] each."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if options.quick:
        texts = ["import os\nimport sys\nimport os\nimport", "def main():\n    return main()\n"]
    else:
        with options.text.open() as file:
            texts = [json.loads(line)["text"] for line in islice(file, options.prompts)]
        texts = [" ".join(text.split()[:WORDS]) for text in texts]
    return [tokenizer(text, return_tensors="pt").input_ids for text in texts]


def continued(model: Any, prompt: Tensor, options: Any, guesses: int) -> tuple[Tensor, float]:
    """Returns a prompt with its new tokens, and the seconds that took."""
    started = time.perf_counter()
    found = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=options.tokens,
        max_new_tokens=options.tokens,
        pad_token_id=0,
        prompt_lookup_num_tokens=guesses or None,
    )
    return found, time.perf_counter() - started


def measure(models: dict[str, Any], options: Any) -> list[dict[str, Any]]:
    """Returns a row for each way to guess: medians over the rounds of each prompt."""
    prompts = prompts_of(options)
    ways = {name: 0 if name == PLAIN else options.guesses for name in models}
    seconds = {name: np.empty((len(prompts), options.rounds)) for name in ways}
    texts: dict[str, list[Tensor]] = {name: [] for name in ways}
    for index, prompt in enumerate(track(prompts, "continuing", transient=True)):
        for turn in range(options.rounds):
            for name, guesses in ways.items():
                text, took = continued(models[name], prompt, options, guesses)
                seconds[name][index, turn] = took
                if turn == 0:
                    texts[name].append(text)
    typical = {name: np.median(found, axis=1) for name, found in seconds.items()}
    rows = []
    for name in ways:
        gains = typical[PLAIN] / typical[name]
        same = [torch.equal(a, b) for a, b in zip(texts[PLAIN], texts[name], strict=True)]
        rows.append(
            {
                "how": name,
                "tokens_per_second": len(prompts) * options.tokens / float(typical[name].sum()),
                "gain_p50": float(np.median(gains)),
                "gain_least": float(gains.min()),
                "gain_most": float(gains.max()),
                "same_texts": sum(same),
                "texts": len(prompts),
            }
        )
    return rows


def grid_of(rows: list[dict[str, Any]], options: Any) -> Grid:
    """Returns the table."""
    title = f"{options.model.name}: {options.guesses} guesses, {options.threads} thread(s)"
    grid = Grid(title, ["guesses of", "tokens/s", "gain, p50", "least-most", "same text"])
    for row in rows:
        grid.rows.append(
            [
                row["how"], f"{row['tokens_per_second']:.1f}", f"{row['gain_p50']:.2f}",
                f"{row['gain_least']:.2f}-{row['gain_most']:.2f}",
                f"{row['same_texts']} of {row['texts']}",
            ]
        )  # fmt: skip
    return grid


def main() -> None:
    """Measures, prints, writes."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    console = Console()
    disturbance = Disturbance()
    result = header(console, "bench/lookup.py")
    model = load(options)
    models = {PLAIN: model, STOCK: model}
    if quantized_layers(model):
        models[EXACT] = load(options)
        verify_exactly(models[EXACT])
    for one in models.values():
        # Maps the file's pages, starts the threads.
        continued(one, torch.ones((1, 2), dtype=torch.long), argparse.Namespace(tokens=4), 0)
    rows = measure(models, options)
    grid = grid_of(rows, options)
    grid.show(console)
    result |= {
        "isa": getattr(kernels_for("cpu"), "isa", "reference"), "threads": options.threads,
        "model": options.model.name, "tokens": options.tokens,
        "guesses": options.guesses, "rounds": options.rounds, "quick": options.quick, "rows": rows,
    }  # fmt: skip
    close(console, result, [grid], [], disturbance, options.json, for_vnni=False)
    console.print(f"Results: {options.json}", highlight=False)


if __name__ == "__main__":
    main()
