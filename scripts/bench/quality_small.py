"""Compares trainings of a tiny ternary model: quick to see what moves, no guide to real models.

    python scripts/bench/quality_small.py --jobs 2     # resumes; all is kept in out/quality-small
    python scripts/bench/quality_small.py --quick --domains python --json out/quick/quality.json

A small Llama model is pretrained in one pass over part of a text, once a domain. Each method then
fine-tunes it on fresh tokens of the domain with each learning rate of one grid (seed 0); the rate
that is best on the validation files is run again with seeds of its own, and these are scored on the
test files, which nothing else reads. A seed gives the same training blocks to every method. Writes
quality.json, quality.md and quality.png. docs/quality.md says what each figure means.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product, repeat
from pathlib import Path
from typing import Any

import torch
from common import Disturbance, header
from quality_methods import METHODS, POST_TRAINING, load_float, load_post_training, train
from quality_model import nats, pretrain
from quality_report import summarize, write_report
from quality_text import DOMAINS, PARTS, load_domain
from results import write_json
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

RATES = (1e-4, 3e-4, 1e-3, 3e-3)
GRID_SEED = 0
# Trained longer, by the ratio of the measured times, for the comparison at equal time.
EQUAL_TIME = ("auto",)


@dataclass(frozen=True)
class Settings:
    """What a run does, the same in every process.

    Attributes:
        folder: Where everything is kept.
        hidden: Hidden size of the models.
        layers: Their layers.
        length: Tokens of a block.
        pretrain_tokens: Tokens of the pretraining part to read, each once.
        blocks: Blocks to fine-tune on.
        eval_blocks: Blocks of the validation part to choose on.
        test_blocks: Blocks of the test part to score.
        batch: Blocks of a step.
        every: Reads one file of so many.
        rates: The grid of peak learning rates.
        seeds: Of the comparison.
    """

    folder: Path
    hidden: int = 160
    layers: int = 4
    length: int = 256
    pretrain_tokens: int = 1_020_000
    blocks: int = 200
    eval_blocks: int = 100
    test_blocks: int = 200
    batch: int = 2
    every: int = 1
    rates: tuple[float, ...] = RATES
    seeds: tuple[int, ...] = (1, 2, 3)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=list(DOMAINS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--folder", type=Path, default=Path("out/quality-small"), help="kept, resumed"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--json", type=Path, help="default: quality.json in the folder")
    parser.add_argument("--report", action="store_true", help="from finished runs; train nothing")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    return parser.parse_args()


def prepare(settings: Settings, domain: str) -> dict[str, Any]:
    """Reads a domain, pretrains its model and scores what needs no training; once a folder."""
    folder = settings.folder / domain
    record = folder / "start.json"
    if record.is_file():
        found: dict[str, Any] = json.loads(record.read_text())
        return found
    text = load_domain(domain, settings.folder / "sources", settings.length, settings.every)
    folder.mkdir(parents=True, exist_ok=True)
    made = pretrain(text, folder, settings.hidden, settings.layers, settings.pretrain_tokens)
    save_file(text.parts, folder / "blocks.safetensors")
    test = text.parts["test"][: settings.test_blocks]
    made["bytes_per_token"] = text.bytes_per_token
    made["test_tokens"] = test.numel()
    made["float"] = nats(load_float(folder / "model"), test)
    write_json(record, made)
    return made


def post_training(settings: Settings, domain: str) -> dict[str, float]:
    """Scores what is made without training on the test files; once a folder."""
    folder = settings.folder / domain
    record = folder / "post-training.json"
    made: dict[str, float] = json.loads(record.read_text()) if record.is_file() else {}
    blocks = load_file(folder / "blocks.safetensors")
    test = blocks["test"][: settings.test_blocks]
    samples = chosen_blocks(blocks, GRID_SEED, settings.blocks)
    for title in POST_TRAINING:
        if title not in made:
            made[title] = nats(load_post_training(title, folder / "model", samples), test)
            write_json(record, made)
    return made


def chosen_blocks(blocks: dict[str, Tensor], seed: int, count: int) -> Tensor:
    """Returns a seed's training blocks; a longer run begins with a shorter one's set."""
    order = torch.randperm(len(blocks["train"]), generator=torch.Generator().manual_seed(seed))
    return blocks["train"][order[:count]]


def one_run(settings: Settings, method: str, domain: str, rate: float, seed: int) -> dict[str, Any]:
    """Trains once, or reads the finished run; only the comparison's seeds see the test files."""
    folder = settings.folder / domain
    record = folder / "runs" / f"{method}-{settings.blocks}-{rate:g}-{seed}.json"
    if record.is_file():
        found: dict[str, Any] = json.loads(record.read_text())
        return found
    blocks = load_file(folder / "blocks.safetensors")
    data = chosen_blocks(blocks, seed, settings.blocks)
    with tempfile.TemporaryDirectory() as scratch:
        model, seconds = train(
            METHODS[method], folder / "model", data, rate, seed, settings.batch, scratch
        )
    part, count = ("validation", settings.eval_blocks)
    if seed != GRID_SEED:
        part, count = ("test", settings.test_blocks)
    result = {
        "domain": domain,
        "method": method,
        "rate": rate,
        "seed": seed,
        "tokens": data.numel(),
        "part": part,
        "nats": nats(model, blocks[part][:count]),
        "cpu_seconds_per_token": seconds,
    }
    write_json(record, result)
    return result


def one_method(settings: Settings, method: str, domain: str) -> list[dict[str, Any]]:
    """Runs a method's grid, then the seeds at its best learning rate."""
    grid = [one_run(settings, method, domain, rate, GRID_SEED) for rate in settings.rates]
    best = min(grid, key=lambda run: float("inf") if math.isnan(run["nats"]) else run["nats"])
    runs = [one_run(settings, method, domain, best["rate"], seed) for seed in settings.seeds]
    return [*grid, *runs]


def finished(settings: Settings, domain: str) -> list[dict[str, Any]]:
    """Reads all finished runs of a domain."""
    runs = sorted((settings.folder / domain / "runs").glob("*.json"))
    return [json.loads(path.read_text()) for path in runs]


def equal_time(settings: Settings, method: str, domain: str) -> list[dict[str, Any]]:
    """Trains a cheaper method on as many more tokens as the default recipe costs time, if the text
    has them.

    Its learning rate is the one chosen at equal tokens; time is CPU seconds a token, the median
    over all runs of a method in this domain.
    """
    rows = summarize(finished(settings, domain))
    if method not in rows or "default" not in rows:
        return []
    ratio = rows["default"]["seconds_per_token"] / rows[method]["seconds_per_token"]
    there_are = len(load_file(settings.folder / domain / "blocks.safetensors")["train"])
    wanted = max(settings.blocks, round(settings.blocks * ratio))
    longer = replace(settings, blocks=min(wanted, there_are))
    record = settings.folder / domain / f"equal-time-{method}.json"
    if record.is_file():
        longer = replace(settings, blocks=json.loads(record.read_text())["blocks"])
    write_json(record, {"blocks": longer.blocks, "method": method})
    rate = rows[method]["rate"]
    return [one_run(longer, method, domain, rate, seed) for seed in settings.seeds]


def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def main() -> None:
    """Prepares the domains, runs what is missing, and writes the report."""
    arguments = parse_arguments()
    console = Console(width=160)
    settings = Settings(arguments.folder)
    if arguments.quick:
        settings = Settings(
            arguments.folder / "quick",
            hidden=64,
            layers=2,
            length=128,
            pretrain_tokens=20_000,
            blocks=20,
            eval_blocks=4,
            test_blocks=4,
            rates=(1e-3,),
            every=8,
            seeds=(1,),
        )
    found = header(console, "bench/quality_small.py")
    disturbance = Disturbance()
    _one_thread()
    if not arguments.report:
        with ProcessPoolExecutor(
            arguments.jobs, multiprocessing.get_context("spawn"), initializer=_one_thread
        ) as pool:
            # One job runs here, without another process's start.
            run: Any = pool.map if arguments.jobs > 1 else map
            for start in (prepare, post_training):
                list(run(start, repeat(settings), arguments.domains))
            for step, methods in ((one_method, arguments.methods), (equal_time, EQUAL_TIME)):
                units = list(product(methods, arguments.domains))
                done = run(step, repeat(settings), *zip(*units, strict=True))
                for unit, _ in zip(units, done, strict=True):
                    console.print("finished:", *unit, step.__name__)
    domains = {
        domain: {
            "start": prepare(settings, domain) | post_training(settings, domain),
            "runs": finished(settings, domain),
        }
        for domain in arguments.domains
        if (settings.folder / domain / "start.json").is_file()
    }
    found |= {
        "settings": {k: v for k, v in vars(settings).items() if k != "folder"},
        "parts": PARTS,
        "disturbance": disturbance.measured(),
        "domains": domains,
    }
    write_report(found, arguments.json or settings.folder / "quality.json", console)


if __name__ == "__main__":
    main()
