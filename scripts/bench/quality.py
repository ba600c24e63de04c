"""Compares ways to make a pretrained language model ternary, on models that everyone knows.

    python scripts/real_models.py models
    python scripts/bench/quality.py --models models --threads 2         # hours; goes on if killed
    python scripts/bench/quality.py --models models --rows original rounded calibrated
    python scripts/bench/quality.py --models models --report            # from what is done

Every row is one process: it makes its model from the fit part of the articles, deploys and saves
it, loads it again as a user would, and scores it on the test part, which nothing else reads. Rows
are kept in the folder as they are done, and a killed training goes on from its last checkpoint.
Writes quality.json, quality.md and quality.png. docs/quality.md says what each column means.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from common import Grid, header, pyplot
from generate import weight_files
from quality_methods import load_float
from quality_rows import LENGTH, ROWS, USUAL, Costs, make
from quality_tasks import Tasks, make_tasks, pack_blocks, read_articles, score
from results import write_json
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitlab_hf import deploy, save
from bitlab_hf.model.count import bits_per_weight

MODELS = {"smollm2-135m": "SmolLM2-135M-Instruct", "gemma3-270m": "Gemma 3 270M"}
# What models keep by, and are scored on; another one is there to be learned.
TEXT = "wikipedia"
Result = dict[str, Any]


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, required=True, help="scripts/real_models.py's")
    parser.add_argument("--model", default="smollm2-135m", help="a folder in --models, or a path")
    parser.add_argument("--text", default=TEXT, help="a folder of articles in --models")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=USUAL)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--blocks", type=int, default=96, help=f"of {LENGTH} tokens, to score")
    parser.add_argument("--examples", type=int, default=200, help="of each task")
    parser.add_argument("--folder", type=Path, default=Path("out/quality"), help="kept, resumed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--bf16", action="store_true", help="fit and train in bfloat16 (autocast)")
    parser.add_argument("--report", action="store_true", help="of what is done; makes nothing")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def source_of(options: argparse.Namespace) -> Path:
    """Returns the float model's folder."""
    return Path(options.models / options.model)


def place_of(options: argparse.Namespace) -> Path:
    """Returns where the rows of a model and a text are kept."""
    text = "" if options.text == TEXT else f"-{options.text}"
    return Path(options.folder) / f"{source_of(options).name}{text}"


def folder_of(options: argparse.Namespace, name: str, seed: int) -> Path:
    """Returns where a row is kept; the original has no seed."""
    place = place_of(options) / name
    return place if name == "original" else place / f"seed-{seed}"


def work(options: argparse.Namespace, name: str, seed: int) -> None:
    """Makes and scores one row, in a process of its own."""

    def say(line: str) -> None:
        print(f"{name}, seed {seed}: {line}", flush=True)

    torch.set_num_threads(options.threads)
    source, folder, row = source_of(options), folder_of(options, name, seed), ROWS[name]
    tokenizer = AutoTokenizer.from_pretrained(source)
    deployed = folder / "deployed"
    making = folder / "making.json"
    if row.tokens or row.config is not None:
        if not deployed.is_dir():
            texts = [one["text"] for one in read_articles(options.models / options.text, "fit")]
            fit = pack_blocks(tokenizer, texts, None, LENGTH, seed)
            scratch = folder / "checkpoints"
            costs = Costs(scratch, place_of(options) / "starts" / row.start(seed, options.bf16))
            model = make(row, source, fit, seed, options.bf16, costs, say, options.device)
            write_json(making, {**costs.now(), "threads": options.threads})
            if row.config is not None:
                save(deploy(model).to(torch.bfloat16), deployed, tokenizer=tokenizer)
            shutil.rmtree(scratch, ignore_errors=True)
        if row.config is not None:
            model = AutoModelForCausalLM.from_pretrained(deployed, dtype=torch.float32)
    else:
        model, deployed = load_float(source), source
    say("scoring")
    tasks = make_tasks(
        tokenizer, options.models / options.text, "test", options.blocks, options.examples, LENGTH
    )
    known = folder_of(options, "original", 0) / "predicted.safetensors"
    original = load_file(known)["predicted"] if known.is_file() else None
    found = score(model.to(options.device), tasks, original)
    predicted = found.pop("predicted")
    if name == "original":
        known.parent.mkdir(parents=True, exist_ok=True)
        save_file({"predicted": predicted}, known)
    result = {
        **found,
        "title": row.title,
        "seed": seed,
        "tokens": row.tokens,
        "rate": row.rate,
        "scored": counts(tasks),
        "settings": settings_of(options),
        "bits": bits_per_weight(model) if row.config is not None else 16.0,
        "file_bytes": None
        if row.tokens and row.config is None
        else sum(f.stat().st_size for f in weight_files(deployed)),
        "making": json.loads(making.read_text()) if making.is_file() else None,
    }
    write_json(folder / "result.json", result)
    say(f"{result['nats']:.4f} nats")


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what rows must have in common to stand in one table."""
    names = ("blocks", "examples", "device", "bf16")
    return {name: getattr(options, name) for name in names}


def read_row(record: Path, settings: dict[str, Any]) -> Result:
    """Returns a row that is kept.

    Args:
        record: Its file.
        settings: Those that it must have.
    """
    row: Result = json.loads(record.read_text())
    # Of before they were written down there is the device.
    of_before = {"device": row["device"]} if "device" in row else {}
    for name, held in row.setdefault("settings", of_before).items():
        if settings.get(name, held) != held:
            raise SystemExit(
                f"--{name} must be {held}, with which {record.parent} was made, got "
                f"{settings[name]}\nName another --folder, or remove the row's."
            )
    return row


def counts(tasks: Tasks) -> dict[str, int]:
    """Returns how much a model was scored on."""
    return {
        "tokens": tasks.blocks[:, 1:].numel(),
        "bytes": tasks.bytes,
        "last_words": len(tasks.words),
        "titles": len(tasks.titles),
    }


def results_of(options: argparse.Namespace) -> dict[str, list[Result]]:
    """Returns what is done, seed by seed."""
    place = place_of(options)
    found: dict[str, list[Result]] = {}
    settings: dict[str, Any] = {}
    for name in ROWS:
        records = sorted((place / name).rglob("result.json"))
        for record in records:
            # All rows of a table have the first one's.
            row = read_row(record, settings)
            settings = row["settings"] | settings
            found.setdefault(name, []).append(row)
    return found


def report(console: Console, options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Prints and writes the table of the rows that are done, each the mean of its seeds."""
    results = results_of(options)
    title = MODELS.get(source_of(options).name, source_of(options).name)
    title += "" if options.text == TEXT else f" on {options.text}"
    base = results["original"][0]["nats"] if "original" in results else float("nan")
    columns = [
        "", "tokens", "nats", "above full precision", "bits a byte", "agrees", "last word", "title",
        "bits a weight", "MB", "s", "CPU s", "peak GB",
    ]  # fmt: skip
    grid = Grid(title, columns)
    for name, runs in results.items():
        one = runs[0]

        def mean(key: str, runs: list[Result] = runs) -> float:
            return sum(run.get(key, float("nan")) for run in runs) / len(runs)

        made = [run["making"] for run in runs if run["making"]]
        spread = max(run["nats"] for run in runs) - min(run["nats"] for run in runs)
        grid.rows.append(
            [
                one["title"], f"{one['tokens']:,}" if one["tokens"] else "",
                f"{mean('nats'):.3f}" + (f" ± {spread / 2:.3f}" if len(runs) > 1 else ""),
                "" if name == "original" else f"{mean('nats') - base:.3f}",
                f"{mean('bits_per_byte'):.3f}",
                "" if name == "original" else f"{100 * mean('agreement'):.1f} %",
                f"{100 * mean('last_words'):.1f} %", f"{100 * mean('titles'):.1f} %",
                f"{one['bits']:.2f}",
                "" if one["file_bytes"] is None else f"{one['file_bytes'] / 1e6:.1f}",
                *(
                    f"{sum(run[key] for run in made) / len(made):.0f}" if made else ""
                    for key in ("seconds", "cpu_seconds")
                ),
                f"{max(run['peak_bytes'] for run in made) / 1e9:.1f}" if made else "",
            ]
        )  # fmt: skip
    grid.show(console)
    place = place_of(options)
    write_json(place / "quality.json", {**found, "results": results})
    (place / "quality.md").write_text(grid.markdown())
    draw(place / "quality.png", title, results)


def draw(path: Path, title: str, results: dict[str, list[Result]]) -> None:
    """Plots nats against tokens, and against seconds."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for axis, what in zip(axes, ("tokens", "seconds"), strict=True):
        for name, runs in results.items():
            one = runs[0]
            at = one["tokens"] if what == "tokens" else (one["making"] or {}).get("seconds", 0)
            nats = sum(run["nats"] for run in runs) / len(runs)
            if name == "original":
                axis.axhline(nats, color="black", linewidth=1, label=one["title"])
            elif at:
                axis.plot([at], [nats], "o", label=one["title"])
        axis.set_xscale("log")
        axis.set_xlabel("tokens fitted and trained on" if what == "tokens" else "seconds")
    axes[0].set_ylabel("nats a token, held-out articles")
    axes[1].legend(fontsize=7)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Does what is missing, a process a row, and writes the report."""
    options = parse_arguments()
    if options.worker:
        work(options, options.rows[0], options.seeds[0])
        return
    console = Console(width=200)
    found = header(console, "bench/quality.py")
    for name in [] if options.report else ["original", *options.rows]:
        for seed in options.seeds[:1] if name == "original" else options.seeds:
            record = folder_of(options, name, seed) / "result.json"
            if record.is_file():
                read_row(record, settings_of(options))
                continue
            command = [sys.executable, __file__, *sys.argv[1:], "--worker"]
            subprocess.run([*command, "--rows", name, "--seeds", str(seed)], check=True)
    report(console, options, found)


if __name__ == "__main__":
    main()
