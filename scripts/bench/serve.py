"""Servers under load: vLLM with BitLab's plugin, vLLM with the dense model, and transformers'.

    python scripts/bench/serve.py --vllm ~/vllm --model path/to/a/float/model
    python scripts/bench/serve.py --vllm ~/vllm --model ... --geometry 1b
    python scripts/bench/serve.py --vllm ~/vllm --quick     # the model that ships with BitLab

With a geometry, random weights of that size take the place of the model's, whose tokenizer stays.
Packs the model without training (as fast as a trained one, and as wordy) unless --ternary names a
deployed one. Starts each server in turn, and has the same questions asked by 1, 8 and 32 clients at
once, streamed and greedy. Writes out/bench/serve.json after each row, and serve.md at the end; run
again with the same arguments, it goes on where it was stopped.

Tokens are counted by the servers. First token, between tokens: seconds, p50 and p95 over
all answers. Memory: of all of the server's processes, pages that several share counted once, after
the row's questions. Equal texts: answers without an error that are, letter by letter, those of the
same server asked one by one, and those of transformers asked one by one (of the ternary model).
These need not be all: how a server puts a batch together decides in which order floats are added
up, in float32 too, and a last bit can move an int8 activation by one.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Disturbance, Grid, Target, close, header
from rich.console import Console
from serve_load import Server, running
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from bitlab_hf import BitLabConfig, save

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "bitlab_hf/demo/model"
COLUMNS = [
    "server", "clients", "tok/s", "first p50", "first p95", "between p50", "between p95", "memory",
    "errors", "as one by one", "as transformers",
]  # fmt: skip
# Enough for 32 clients; transformers would take most of the memory.
PAGES = ["--cb-block-size", "32", "--cb-num-blocks", "512", "--cb-max-batch-tokens", "256"]
CONTEXT = ["--max-model-len", "1024"]
DENSE, REFERENCE = "vLLM, dense bfloat16", "transformers, ternary"
# Llama-3.2-1B's but for the vocabulary: 0.97 billion weights in its layers.
GEOMETRIES: dict[str, dict[str, Any]] = {
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 2048,
    },
}  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm", type=Path, required=True, help="vLLM's environment")
    parser.add_argument("--model", type=Path, default=DEMO, help="a float model with a tokenizer")
    parser.add_argument("--ternary", type=Path, help="the same, deployed; default: packed here")
    parser.add_argument("--geometry", choices=GEOMETRIES, help="of random weights, instead")
    parser.add_argument("--clients", type=int, nargs="+", help="default: 1 8 32; quick: 1 4")
    parser.add_argument("--questions", type=int, help="in all; default 32, quick 4")
    parser.add_argument("--tokens", type=int, help="of each answer; default 48, quick 8")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each server")
    parser.add_argument("--servers", nargs="+", help="only these, by their whole names")
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    parser.add_argument("--output", type=Path, default=Path("out/bench/serve.json"))
    given = parser.parse_args()
    if given.geometry and given.ternary:
        parser.error("--geometry packs its own model: leave --ternary out")
    # The answers to one client come first: the others' are compared with them.
    given.clients = sorted({1, *(given.clients or ([4] if given.quick else [8, 32]))})
    given.questions = given.questions or (4 if given.quick else 32)
    given.tokens = given.tokens or (8 if given.quick else 48)
    return given


def prompts(count: int) -> list[str]:
    """Paragraphs of BitLab's documents, of very different lengths, in a fixed order."""
    texts = [file.read_text() for file in sorted((ROOT / "docs").glob("*.md"))]
    found = [one.strip() for text in texts for one in text.split("\n\n")]
    usable = [one for one in found if 60 < len(one) < 1500 and not one.startswith(("|", "```"))]
    return [usable[index * len(usable) // count] for index in range(count)]


def random_model(source: Path, geometry: str, folder: Path) -> Path:
    """Writes a bfloat16 model of a geometry and random weights, with another's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    # No token ends an answer early.
    config = LlamaConfig(
        vocab_size=len(tokenizer), tie_word_embeddings=True, eos_token_id=None, bos_token_id=None,
        **GEOMETRIES[geometry],
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pack(source: Path, folder: Path) -> Path:
    """Writes the model as a ternary one, float32 beside its packed weights."""
    config = BitLabConfig(mode="infer", head="int8", weight_granularity="per_group", group_size=64)
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, dtype=torch.float32
    )
    save(model, folder, tokenizer=AutoTokenizer.from_pretrained(source))
    return folder


def percentiles(values: list[float]) -> tuple[float, float]:
    """The 50th and the 95th."""
    if not values:
        return float("nan"), float("nan")
    middle, high = np.percentile(values, [50, 95])
    return float(middle), float(high)


def measure(server: Server, asked: list[str], clients: int, tokens: int) -> dict[str, Any]:
    """All questions, asked by so many clients."""
    answers, seconds = server.ask_all(asked, clients, tokens)
    first = [one.times[0] for one in answers if one.times]
    between = [float(gap) for one in answers for gap in np.diff(one.times)]
    return {
        "clients": clients,
        "seconds": seconds,
        "tokens": sum(one.tokens for one in answers),
        "first": percentiles(first),
        "between": percentiles(between),
        "memory": server.memory(),
        "errors": [one.error for one in answers if one.error],
        # What came before an error is no answer; an empty answer is one.
        "texts": [None if one.error else one.text for one in answers],
    }


def equal(answers: list[str | None], texts: list[str | None]) -> int:
    """How many answers are the text at their place; None is no answer."""
    pairs = zip(answers, texts, strict=True)
    return sum(one is not None and one == text for one, text in pairs)


def figures(
    name: str, found: dict[str, Any], alone: dict[str, Any], reference: dict[str, Any] | None
) -> dict[str, Any]:
    """The figures of a row.

    Args:
        name: The server.
        found: What was measured.
        alone: The same of this server asked one by one.
        reference: Of transformers asked one by one; None where it has not answered, or of another
            model.
    """
    (first_p50, first_p95), (between_p50, between_p95) = found["first"], found["between"]
    texts = found["texts"]
    return {
        "server": name,
        "clients": found["clients"],
        "tokens_per_s": found["tokens"] / found["seconds"],
        "first_p50": first_p50,
        "first_p95": first_p95,
        "between_p50": between_p50,
        "between_p95": between_p95,
        "memory_bytes": found["memory"],
        "errors": len(found["errors"]),
        "texts": len(texts),
        "as_one_by_one": None if found is alone else equal(texts, alone["texts"]),
        "as_transformers": (
            None if reference is None or found is reference else equal(texts, reference["texts"])
        ),
    }


def row(held: dict[str, Any]) -> list[str]:
    """A line of the table."""
    names = ("first_p50", "first_p95", "between_p50", "between_p95")
    same = [held["as_one_by_one"], held["as_transformers"]]
    return [
        held["server"], str(held["clients"]), f"{held['tokens_per_s']:.1f}",
        *(f"{held[name]:.3f} s" for name in names), f"{held['memory_bytes'] / 1e9:.2f} GB",
        str(held["errors"]), *("-" if one is None else f"{one}/{held['texts']}" for one in same),
    ]  # fmt: skip


class Results:
    """What has been measured, in a file that is written whole after each row.

    Args:
        path: The file; what it holds of the same settings is taken over.
        settings: What rows have to have in common.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path, self._settings = path, settings
        self.servers: dict[str, dict[str, Any]] = {}
        if path.exists():
            held = json.loads(path.read_text())
            if held.get("settings") == settings:
                self.servers = held["servers"]

    def missing(self, server: str, clients: list[int]) -> list[int]:
        """The rows of a server that are to be measured."""
        return [many for many in clients if str(many) not in self.servers.get(server, {})]

    def add(self, server: str, found: dict[str, Any]) -> None:
        """Keeps a row."""
        self.servers.setdefault(server, {})[str(found["clients"])] = found
        beside = self._path.with_name(f".{self._path.name}.part")
        beside.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        beside.replace(self._path)

    def to_dict(self) -> dict[str, Any]:
        """What the file holds."""
        return {"settings": self._settings, "servers": self.servers}

    def rows(self) -> list[dict[str, Any]]:
        """The figures of each row."""
        reference = self.servers.get(REFERENCE, {}).get("1")
        return [
            figures(name, found, rounds["1"], None if name == DENSE else reference)
            for name, rounds in self.servers.items()
            for found in rounds.values()
        ]

    def errors(self) -> int:
        """How many answers failed in all."""
        return sum(
            len(one["errors"]) for rounds in self.servers.values() for one in rounds.values()
        )


def servers_of(
    given: argparse.Namespace, model: Path, ternary: Path
) -> dict[str, tuple[Path, list[str]]]:
    """The model and the options of ``bitlab serve`` for each server."""
    through = ["--vllm", str(given.vllm)]
    # Compiling takes longer than all that is asked in a quick run.
    options = [*CONTEXT, *(["--enforce-eager"] if given.quick else [])]
    by_itself = ["--with-transformers", "--"]
    servers = {
        "vLLM, ternary": (ternary, [*through, "--", *options]),
        DENSE: (model, [*through, "--", "--dtype", "bfloat16", *options]),
        REFERENCE: (ternary, [*by_itself, "--device", "cpu"]),
        "transformers, ternary, continuous batching": (
            ternary, [*by_itself, "--device", "cpu", "--continuous-batching", *PAGES],
        ),
    }  # fmt: skip
    return {name: how for name, how in servers.items() if name in (given.servers or servers)}


def ask(
    given: argparse.Namespace, name: str, server: Server, asked: list[str], results: Results
) -> None:
    """Measures the rows of one server that are missing."""
    # The first answers pay for what is made once, for one question and for many.
    server.ask_all(asked[:2], 2, 2)
    for clients in results.missing(name, given.clients):
        results.add(name, measure(server, asked, clients, given.tokens))


def main() -> None:
    """Runs the benchmark."""
    given, console = parse_arguments(), Console()
    result: dict[str, Any] = header(console, "bench/serve.py")
    disturbance = Disturbance()
    asked = prompts(given.questions)
    settings = {
        "machine": result["machine"]["cpu"], "model": str(given.model), "tokens": given.tokens,
        "ternary": str(given.ternary), "geometry": given.geometry, "threads": given.threads,
        "quick": given.quick, "prompts": asked,
    }  # fmt: skip
    results = Results(given.output, settings)
    with tempfile.TemporaryDirectory() as work:
        model = Path(work) / "float" if given.geometry else given.model
        wanted = servers_of(given, model, given.ternary or Path(work) / "ternary")
        wanted = {name: how for name, how in wanted.items() if results.missing(name, given.clients)}
        if given.geometry and wanted:
            random_model(given.model, given.geometry, model)
        if given.ternary is None and wanted:
            pack(model, Path(work) / "ternary")
        for name, (folder, options) in wanted.items():
            console.print(f"{name} ...")
            log = given.output.with_name(f"serve-{name.replace(', ', '-').replace(' ', '-')}.log")
            with running(folder, options, log, given.threads) as server:
                ask(given, name, server, asked, results)
    rows = results.rows()
    grid = Grid("Servers under load", COLUMNS, [row(one) for one in rows])
    grid.show(console)
    targets = [Target("errors: 0", float(results.errors()), 0.0, at_least=False, unit="")]
    result |= {**results.to_dict(), "rows": rows}
    close(console, result, [grid], targets, disturbance, given.output, for_vnni=False)


if __name__ == "__main__":
    main()
