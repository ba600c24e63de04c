"""Times whole models: BitNet-2B-4T's geometry with random weights, against transformers' own.

    python scripts/bench/generate.py --work models      # keeps the checkpoints (11 GB)
    python scripts/bench/generate.py --engines "bitlab keep" "dense bf16" --rounds 1
    python scripts/bench/generate.py --geometry smollm2 --engines "bitlab g64" "bitlab g64 exact"

Builds the checkpoints locally, then measures each engine in fresh processes that take turns: load
time with the file in the page cache and imports excluded, prompt and decode speed through
`generate`, peak resident memory. Writes generate.json, anew after each process, generate.md and
generate.png. docs/benchmarks.md says what each column means.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Disturbance, Grid, Target, close, header, pyplot
from results import write_json
from rich.console import Console
from rich.progress import Progress

from bitcore.kernels import kernels_for

Result = dict[str, Any]
FULL = {
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_hidden_layers": 30,
    "num_attention_heads": 20,
    "num_key_value_heads": 5,
    "vocab_size": 128256,
    "max_position_embeddings": 4096,
}
SMOLLM2 = {
    **FULL,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEOMETRIES = {"2b": FULL, "smollm2": SMOLLM2}
QUICK = {
    **FULL,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# name: folder, kind, made from, further fields of the request; "compile" is of a measurement only:
# the two ways of bitlab_hf.compile_decoding.
ENGINES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "bitlab int8": ("bitlab-int8", "bitlab", "dense", {"head": "int8"}),
    "bitlab keep": ("bitlab-keep", "bitlab", "dense", {"head": "keep"}),
    "bitlab g128": ("bitlab-g128", "bitlab", "dense", {"head": "int8", "group_size": 128}),
    "bitlab g64": ("bitlab-g64", "bitlab", "dense", {"head": "int8", "group_size": 64}),
    "bitlab int8 exact": ("bitlab-int8", "bitlab", "dense", {"head": "int8", "compile": "exact"}),
    "bitlab int8 fused": ("bitlab-int8", "bitlab", "dense", {"head": "int8", "compile": "fused"}),
    "bitlab g64 exact": (
        "bitlab-g64",
        "bitlab",
        "dense",
        {"head": "int8", "group_size": 64, "compile": "exact"},
    ),
    "bitlab g64 fused": (
        "bitlab-g64",
        "bitlab",
        "dense",
        {"head": "int8", "group_size": 64, "compile": "fused"},
    ),
    "dense bf16": ("dense", "dense", "", {}),
    "bitnet packed": ("bitnet", "bitnet", "bitlab-keep", {}),
}
# Of peers that need seconds for one.
FEW_TOKENS = 5


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    compiled = [name for name, engine in ENGINES.items() if "compile" in engine[3]]
    default = [name for name in ENGINES if name not in compiled]
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=default)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="2b")
    parser.add_argument("--work", type=Path, help="folder for the checkpoints, kept and reused")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, help="processes of each engine; default 3")
    parser.add_argument("--prompt", type=int, help="tokens of the prompt; default 512")
    parser.add_argument("--prompt-repeats", type=int, default=2, help="in each process")
    parser.add_argument("--decode", type=int, help="tokens to generate; default 32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--cache",
        choices=("dynamic", "static"),
        default="dynamic",
        help="static on cuda: transformers compiles the decoding to CUDA graphs where it can",
    )
    parser.add_argument("--json", type=Path, default=Path("out/bench/generate.json"))
    parser.add_argument("--png", type=Path, help="default: beside the JSON")
    parser.add_argument("--no-png", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it runs")
    arguments = parser.parse_args()
    quick = arguments.quick
    # Checkpoints of one geometry are not another's; those of "2b" lie in the folder itself.
    place = "quick" if quick else "" if arguments.geometry == "2b" else arguments.geometry
    arguments.work = arguments.work and arguments.work / place
    arguments.geometry = QUICK if quick else GEOMETRIES[arguments.geometry]
    arguments.rounds = arguments.rounds or (1 if quick else 3)
    arguments.prompt = arguments.prompt or (32 if quick else 512)
    arguments.decode = arguments.decode or (6 if quick else 32)
    arguments.png = arguments.png or arguments.json.with_suffix(".png")
    if arguments.decode < 3:
        parser.error("--decode must be at least 3")
    return arguments


def run_worker(request: dict[str, Any], threads: int) -> Result:
    """Runs generate_worker.py in a fresh process.

    Raises:
        SystemExit: It failed; the message holds what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "request.json"
        path.write_text(json.dumps(request))
        worker = str(Path(__file__).with_name("generate_worker.py"))
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(
            [sys.executable, worker, str(path)],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        if done.returncode != 0:
            raise SystemExit(f"generate_worker.py failed:\n{done.stderr[-4000:]}")
        answer: Result = json.loads(path.with_suffix(".answer").read_text())
    return answer


def build(name: str, work: Path, options: Any) -> Path:
    """Returns the engine's checkpoint, building it and what it is made from where missing."""
    folder, kind, source, fields = ENGINES[name]
    target = work / folder
    if not target.is_dir():
        if source:
            made_from = next(one for one, engine in ENGINES.items() if engine[0] == source)
            build(made_from, work, options)
        request = {
            "do": "build", "kind": kind, "model": str(target), "source": str(work / source),
            "geometry": options.geometry, "device": options.device, **fields,
        }  # fmt: skip
        run_worker(request, options.threads)
    return target


def remove_drafts(work: Path) -> None:
    """Removes the checkpoints that processes were writing when they were killed, gigabytes each:
    NAME.PID, and what `bitlab_hf.save` writes beside that.
    """
    names = {engine[0] for engine in ENGINES.values()}
    for path in work.iterdir():
        draft = re.fullmatch(r"\.?([\w-]+)\.(\d+)(\.bitlab-staged-.+)?", path.name)
        if draft and draft[1] in names and not Path(f"/proc/{draft[2]}").exists():
            shutil.rmtree(path)


def weight_files(model: Path) -> list[Path]:
    """Returns the safetensors files of a checkpoint."""
    return sorted(model.glob("*.safetensors"))


def read_once(model: Path) -> float:
    """Reads the weights, which puts them in the page cache, and returns the seconds."""
    buffer = bytearray(1 << 22)
    started = time.perf_counter()
    for path in weight_files(model):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started


def measure_once(name: str, model: Path, options: Any) -> Result:
    """Measures one engine once, in a fresh process."""
    kind = ENGINES[name][1]
    slow = kind == "bitnet" and options.device == "cpu"
    request = {
        "device": options.device, "cache": options.cache,
        "do": "measure", "kind": kind, "model": str(model), "threads": options.threads,
        "prompt": options.prompt, "prompt_repeats": 1 if slow else options.prompt_repeats,
        "decode": min(options.decode, FEW_TOKENS) if slow else options.decode,
        "compile": ENGINES[name][3].get("compile"),
    }  # fmt: skip
    read_once(model)
    read_seconds = read_once(model)
    return {**run_worker(request, options.threads), "read_seconds": read_seconds}


def summarize(name: str, model: Path, runs: list[Result], prompt: int) -> Result:
    """Returns the figures of one engine: medians over its processes."""

    def median(key: str) -> float:
        return float(np.median([run[key] for run in runs]))

    prompts = [prompt / seconds for run in runs for seconds in run["prompt_seconds"]]
    decode = [1 / seconds for run in runs for seconds in run["token_seconds"]]
    file_bytes = sum(path.stat().st_size for path in weight_files(model))
    p10, p50, p90 = (float(value) for value in np.percentile(decode, (10, 50, 90)))
    return {
        "engine": name,
        "prompt_tok_s": float(np.median(prompts)),
        "decode_tok_s": p50,
        "decode_p10": p10,
        "decode_p90": p90,
        "load_seconds": median("load_seconds"),
        "warm_seconds": median("warm_seconds"),
        "read_seconds": median("read_seconds"),
        "imported_bytes": median("imported_bytes"),
        "peak_bytes": median("peak_bytes"),
        "above_bytes": median("peak_bytes") - median("imported_bytes") - file_bytes,
        "file_bytes": file_bytes,
        "bits_per_weight": runs[0]["bits_per_weight"],
        "layer": runs[0]["layer"],
        "head": runs[0]["head"],
        "compiled": runs[0]["compiled"],
        "runs": runs,
    }


def grid_of(results: list[Result], threads: int, prompt: int) -> Grid:
    """Returns the table of all engines."""
    # Fits 80 columns: where decoding is compiled, what that takes is of more interest than memory.
    compiled = any(one["compiled"] for one in results)
    last = "warm s" if compiled else "above"
    columns = [
        "engine", "bits", "prompt/s", "decode/s", "p10-p90", "load s", "peak", "file", last,
    ]  # fmt: skip
    grid = Grid(f"Tokens/s (prompt of {prompt}) and GB, {threads} thread(s)", columns)
    for one in results:
        grid.rows.append(
            [
                one["engine"], f"{one['bits_per_weight']:.2f}",
                f"{one['prompt_tok_s']:.1f}", f"{one['decode_tok_s']:.2f}",
                f"{one['decode_p10']:.1f}-{one['decode_p90']:.1f}", f"{one['load_seconds']:.2f}",
                *(f"{one[name] / 1e9:.2f}" for name in ("peak_bytes", "file_bytes")),
                f"{one['warm_seconds'] if compiled else one['above_bytes'] / 1e9:.2f}",
            ]
        )  # fmt: skip
    return grid


def find_targets(results: list[Result]) -> list[Target]:
    """Returns the closing table's lines, computed from the run's figures."""
    found = {one["engine"]: one for one in results}
    names = ("bitlab int8", "bitlab keep", "bitlab g64", "dense bf16")
    int8, keep, groups, dense = (found.get(name) for name in names)

    def figure(one: Result | None, key: str, unit: float = 1) -> float | None:
        return None if one is None else one[key] / unit

    targets = [
        Target("decode, int8 head: 20 tok/s", figure(int8, "decode_tok_s"), 20, True, " tok/s"),
        Target("decode, head kept: 13 tok/s", figure(keep, "decode_tok_s"), 13, True, " tok/s"),
    ]
    ratio: float | None = None
    if int8 is not None and groups is not None:
        ratio = groups["decode_tok_s"] / int8["decode_tok_s"]
    name = "decode, groups of 64: 0.87x of one scale a matrix"
    targets.append(Target(name, ratio, 0.87, True, "x"))
    for name, one in (("int8 head", int8), ("head kept", keep)):
        prompt = figure(one, "prompt_tok_s")
        targets.append(Target(f"prompt, {name}: 120 tok/s", prompt, 120, True, " tok/s"))
    for base, aim in (("bitlab int8", 1.25), ("bitlab g64", 2.0)):
        for how in ("exact", "fused"):
            compiled = found.get(f"{base} {how}")
            if compiled is not None and base in found:
                gain = compiled["decode_tok_s"] / found[base]["decode_tok_s"]
                targets.append(Target(f"decode, {base} {how}: {aim}x", gain, aim, True, "x"))
    above = figure(int8, "above_bytes", 1e9)
    name = "peak memory, int8 head: at most 0.2 GB above file + imports"
    targets.append(Target(name, above, 0.2, False, " GB"))
    for name, one in (("int8 head", int8), ("head kept", keep)):
        share: float | None = None
        if one is not None and dense is not None:
            scaled = dense["load_seconds"] * one["file_bytes"] / dense["file_bytes"]
            share = one["load_seconds"] / (1.3 * scaled + one["read_seconds"])
        title = f"load, {name}: at most 1.3x bf16's, by bytes, plus one read of the file"
        targets.append(Target(title, share, 1, False, " of it"))
    return targets


def draw(results: list[Result], path: Path) -> None:
    """Draws speeds and memory."""
    plt = pyplot()
    panels = (
        ("decode_tok_s", 1, "decode, tokens/s"),
        ("prompt_tok_s", 1, "prompt, tokens/s"),
        ("peak_bytes", 1e9, "peak resident memory, GB"),
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 4), layout="constrained")
    names = [one["engine"] for one in results]
    for axis, (key, unit, title) in zip(axes, panels, strict=True):
        bars = axis.bar(names, [one[key] / unit for one in results])
        axis.bar_label(bars, fmt="%.3g")
        axis.set_title(title)
        axis.tick_params(axis="x", rotation=20)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Builds, measures, prints, writes."""
    options = parse_arguments()
    if not options.no_png:
        pyplot()
    console = Console()
    disturbance = Disturbance()
    result = header(console, "bench/generate.py") | {
        "isa": getattr(kernels_for("cpu"), "isa", "reference"), "threads": options.threads,
        "geometry": options.geometry, "prompt": options.prompt, "decode": options.decode,
        "rounds": options.rounds, "quick": options.quick,
        "device": options.device, "cache": options.cache,
    }  # fmt: skip
    names = options.engines
    runs: dict[str, list[Result]] = {name: [] for name in names}
    results: list[Result] = []
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(console=console, transient=True))
        work = options.work
        if work is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        remove_drafts(work)
        task = progress.add_task("", total=len(names) * (options.rounds + 1))
        models = {}
        for name in names:
            progress.update(task, description=f"building {name}")
            models[name] = build(name, work, options)
            progress.advance(task)
        for _ in range(options.rounds):
            for name in names:
                progress.update(task, description=f"measuring {name}")
                runs[name].append(measure_once(name, models[name], options))
                results = [
                    summarize(one, models[one], runs[one], options.prompt)
                    for one in names
                    if runs[one]
                ]
                result["engines"] = results
                write_json(options.json, result)
                progress.advance(task)
    grid = grid_of(results, options.threads, options.prompt)
    grid.show(console)
    on_cpu = options.device == "cpu"
    targets = find_targets(results) if on_cpu else []
    close(console, result, [grid], targets, disturbance, options.json, for_vnni=on_cpu)
    if not options.no_png:
        draw(results, options.png)
    console.print(f"Results: {options.json}", highlight=False)


if __name__ == "__main__":
    main()
