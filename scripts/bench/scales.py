"""Compares scales of ternary weights on a real pretrained model: nats, bits, size, speed.

    python scripts/real_models.py models --only smollm2 wikipedia
    python scripts/bench/scales.py --models models                # an hour and 8 GB of memory
    python scripts/bench/scales.py --models models --rows per-tensor groups-64 --seeds 0 1 2
    python scripts/bench/scales.py --models models --report       # from what is done

SmolLM2-135M is calibrated once a row with the same samples, deployed with int8 activations, and
scored on articles that calibration never sees. Every row is kept in the folder as it is done, the
latent weights and the deployed model with it; a second run goes on from there. Writes scales.json
and scales.md. docs/quality.md says what each column means.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Grid, header
from generate import run_worker, weight_files
from quality_model import nats
from quality_tasks import pack_blocks, read_articles
from results import write_json
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitlab_hf import BitLabConfig, deploy, save
from bitlab_hf.fit.calibrate import calibrate
from bitlab_hf.model.count import bits_per_weight

Result = dict[str, Any]
_GROUPS = {"weight_granularity": "per_group", "group_size": 64}
# Title, and arguments of BitLabConfig; None is the model as it is.
ROWS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "float": ("full precision (bfloat16)", None),
    "per-tensor": ("per tensor", {}),
    "groups-64-float32": (
        "groups of 64, float32 scales",
        {**_GROUPS, "group_scale_dtype": "float32"},
    ),
    "groups-64-rounded": ("the same latent weights, packed in two levels", _GROUPS),
    "groups-64": ("groups of 64, two levels", _GROUPS),
    # The hidden size is 576, which 128 does not divide: groups of 64 there.
    "groups-128": (
        "groups of 128 in down_proj, 64 elsewhere, two levels",
        {**_GROUPS, "overrides": {"*.down_proj": {"group_size": 128}}},
    ),
}
BASE = "groups-64-float32"
# Rows that take the latent weights of another one.
LATENT_OF = {"groups-64-rounded": BASE}
MODEL = "smollm2-135m"
LENGTH = 256
# Shuffles what is scored on.
TEST_SEED = 0


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, required=True, help="scripts/real_models.py's")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the samples")
    parser.add_argument("--samples", type=int, default=128, help=f"of {LENGTH} tokens each")
    parser.add_argument("--blocks", type=int, default=96, help="held-out ones to score")
    parser.add_argument("--folder", type=Path, default=Path("out/scales"), help="kept, resumed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--decode", type=int, default=0, help="tokens to time; default none")
    parser.add_argument("--rounds", type=int, default=3, help="processes a row, in turn")
    parser.add_argument("--report", action="store_true", help="of what is done; calibrates nothing")
    arguments = parser.parse_args()
    if arguments.decode and arguments.decode < 3:
        parser.error("--decode must be at least 3")
    return arguments


def blocks_of(models: Path, part: str, count: int, seed: int) -> Tensor:
    """Returns the first blocks of a part's articles, shuffled by a seed, int64 [count, LENGTH]."""
    texts = [one["text"] for one in read_articles(models / "wikipedia", part)]
    tokenizer = AutoTokenizer.from_pretrained(models / MODEL)
    return pack_blocks(tokenizer, texts, count, LENGTH, seed)


def load(folder: Path, **options: Any) -> Any:
    """Loads a model; computes in float32, which is the quickest here."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def folder_of(name: str, seed: int, options: Any) -> Path:
    """Returns where a row is kept; nothing of the model as it is depends on the seed."""
    return Path(options.folder / name / f"seed-{0 if ROWS[name][1] is None else seed}")


def calibrated(name: str, seed: int, options: Any, say: Callable[[str], None]) -> Path:
    """Returns the latent checkpoint of a row, calibrating where it is missing."""
    folder = folder_of(name, seed, options)
    target, config = folder / "latent", ROWS[name][1] or {}
    if target.is_dir():
        return target
    model = load(options.models / MODEL, quantization_config=BitLabConfig(**config))
    samples = blocks_of(options.models, "fit", options.samples, seed)
    started = time.process_time()

    def progress(done: int, of: int, layer: str) -> None:
        if done % 7 == 0:
            used = time.process_time() - started
            say(f"{name}, seed {seed}: {done}/{of} layers, {used:.0f} CPU s ({layer})")

    report = calibrate(model, samples, progress=progress)
    errors = [layer.error for layer in report.layers]
    record = {
        "seconds": report.seconds,
        "cpu_seconds": time.process_time() - started,
        "tokens": report.tokens,
        "mean_error": float(np.mean(errors)),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "threads": torch.get_num_threads(),
    }
    write_json(folder / "calibration.json", record)
    save(model, target)
    return target


def deployed(name: str, seed: int, options: Any, say: Callable[[str], None]) -> Path:
    """Returns the deployed checkpoint of a row, its float tensors in bfloat16 as they came."""
    config = ROWS[name][1]
    if config is None:
        return Path(options.models / MODEL)
    target = folder_of(name, seed, options) / "deployed"
    if not target.is_dir():
        latent = calibrated(LATENT_OF.get(name, name), seed, options, say)
        model = load(options.models / MODEL, quantization_config=BitLabConfig(**config))
        # The file's keys are the float model's; a tied head is not among them.
        odd = model.load_state_dict(load_file(latent / "model.safetensors"), strict=False)
        assert not odd.unexpected_keys, odd
        save(deploy(model).to(torch.bfloat16), target)
    return target


def score(name: str, seed: int, options: Any, found: Result, say: Callable[[str], None]) -> None:
    """Does a row with one seed, unless it is done."""
    folder = folder_of(name, seed, options)
    record = folder / "result.json"
    if record.is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = deployed(name, seed, options, say)
    model = load(checkpoint)
    test = blocks_of(options.models, "test", options.blocks, TEST_SEED)
    calibration = folder / "calibration.json"
    result = {
        **found,
        "title": ROWS[name][0],
        "samples": options.samples,
        "seed": seed,
        "nats": nats(model, test),
        "test_tokens": test.numel(),
        "bits": bits_per_weight(model) if ROWS[name][1] is not None else 16.0,
        "file_bytes": sum(path.stat().st_size for path in weight_files(checkpoint)),
        "calibration": json.loads(calibration.read_text()) if calibration.is_file() else None,
    }
    write_json(record, result)
    say(f"{name}, seed {seed}: {result['nats']:.4f} nats")


def time_decoding(names: list[str], options: Any, say: Callable[[str], None]) -> None:
    """Adds tokens/s to the rows that are done; processes of all rows take turns."""
    seed = options.seeds[0]
    for threads in (1, 2):
        gaps: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(options.rounds):
            for name in names:
                request = {
                    "do": "measure", "kind": "dense" if name == "float" else "bitlab",
                    "model": str(deployed(name, seed, options, say)),
                    "threads": threads, "device": "cpu", "cache": "dynamic", "prompt": 16,
                    "prompt_repeats": 1, "decode": options.decode,
                }  # fmt: skip
                gaps[name] += run_worker(request, threads)["token_seconds"]
        for name in names:
            record = folder_of(name, seed, options) / "result.json"
            result = json.loads(record.read_text())
            speeds = result.setdefault("decode_tok_s", {})
            speeds[str(threads)] = float(1 / np.median(gaps[name]))
            result["decode_command"] = options.command
            write_json(record, result)


def results_of(name: str, options: Any) -> list[Result]:
    """Returns what is done of a row, seed by seed."""
    records = sorted((options.folder / name).glob("seed-*/result.json"))
    return [json.loads(record.read_text()) for record in records]


def report(console: Console, options: Any) -> None:
    """Prints and writes the table of the rows that are done, the mean of the seeds that they have.

    Beside it stand the differences to float32 scales, seed by seed, and the mean relative error
    of the layers' outputs on the calibration tokens.
    """
    results = {name: found for name in ROWS if (found := results_of(name, options))}
    base = {one["seed"]: one["nats"] for one in results.get(BASE, [])}
    columns = [
        "scales", "nats", "to float32 scales", "error", "bits a weight", "file, MB", "CPU s",
        "tokens/s, 1 thread", "2 threads",
    ]  # fmt: skip
    grid = Grid("SmolLM2-135M, ternary but for its embedding, int8 activations", columns)
    for name, found in results.items():
        one = found[0]
        speeds, calibration = one.get("decode_tok_s", {}), one["calibration"]
        errors = [held["calibration"]["mean_error"] for held in found if held["calibration"]]
        changes = [held["nats"] - base[held["seed"]] for held in found
                   if held["seed"] in base and name not in (BASE, "float")]  # fmt: skip
        grid.rows.append(
            [
                one["title"], f"{np.mean([held['nats'] for held in found]):.4f}",
                ", ".join(f"{change:+.4f}" for change in changes),
                f"{np.mean(errors):.5f}" if errors else "",
                f"{one['bits']:.3f}", f"{one['file_bytes'] / 1e6:.1f}",
                f"{calibration['cpu_seconds']:.0f}" if calibration else "",
                *(f"{speeds[key]:.1f}" if key in speeds else "" for key in ("1", "2")),
            ]
        )  # fmt: skip
    grid.show(console)
    write_json(options.folder / "scales.json", results)
    (options.folder / "scales.md").write_text(grid.markdown())


def main() -> None:
    """Does what is missing, prints, writes."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    console = Console()
    found = header(console, "bench/scales.py")
    options.command = found["command"]

    def say(line: str) -> None:
        console.print(line, highlight=False)

    for seed, name in product([] if options.report else options.seeds, options.rows):
        score(name, seed, options, found, say)
    if options.decode:
        time_decoding([name for name in options.rows if results_of(name, options)], options, say)
    report(console, options)


if __name__ == "__main__":
    main()
