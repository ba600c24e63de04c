"""What fitting one decoder layer costs, of models as large as those that people have.

    python scripts/bench/calibration.py --geometries 2b --threads 2
    python scripts/bench/calibration.py                              # all; the 8B layer takes long

A layer of random weights is calibrated on random tokens: time and memory do not depend on what they
are. Each geometry runs in a process of its own. Writes out/calibration.json; the whole model's CPU
time is that of one layer times their number, on paper.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import Disturbance, header
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from bitlab_hf import BitLabConfig, replace_linear
from bitlab_hf.demo.begun import bf16_is_faster
from bitlab_hf.fit.calibrate import calibrate


@dataclass(frozen=True)
class Geometry:
    """A Llama-like decoder layer, and how many of them a model has."""

    title: str
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    layers: int
    group: int = 128


GEOMETRIES = {
    "tiny": Geometry("a toy", 128, 256, 2, 1, 2, 64),
    "135m": Geometry("SmolLM2-135M", 576, 1536, 9, 3, 30, 64),
    "2b": Geometry("BitNet b1.58 2B4T", 2560, 6912, 20, 5, 30),
    "8b": Geometry("Llama 3 8B", 4096, 14336, 32, 8, 32),
}


def measure(geometry: Geometry, samples: int, length: int) -> dict[str, Any]:
    """Calibrates one layer; returns its parts' seconds, CPU seconds and peak memory in bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=geometry.hidden, intermediate_size=geometry.intermediate, vocab_size=256,
        num_hidden_layers=1, num_attention_heads=geometry.heads,
        num_key_value_heads=geometry.key_value_heads, tie_word_embeddings=True,
    )  # fmt: skip
    scheme = BitLabConfig(weight_granularity="per_group", group_size=geometry.group)
    model = replace_linear(LlamaForCausalLM(config).eval(), scheme)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # As the demo: many CPUs have no products in bfloat16, and are slower with it.
    bf16 = bf16_is_faster()
    parts: dict[str, float] = {}
    last = [time.perf_counter()]

    def note(_done: int, _all: int, name: str) -> None:
        now = time.perf_counter()
        parts[name.rpartition(".")[2]], last[0] = now - last[0], now

    cpu = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        report = calibrate(model, torch.randint(0, 256, (samples, length)), progress=note)
    return {
        "title": geometry.title,
        "layers": geometry.layers,
        "bf16": bf16,
        "seconds": report.seconds,
        "cpu_seconds": time.process_time() - cpu,
        "parts": parts,
        "model_bytes": before,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def table(found: dict[str, dict[str, Any]]) -> Table:
    """Returns the closing table."""
    shown = Table(box=box.SIMPLE_HEAD)
    for name in (
        "layer of",
        "s",
        "CPU s",
        "of it down_proj",
        "peak GB",
        "layers",
        "whole model, CPU h",
    ):
        shown.add_column(name, justify="left" if name == "layer of" else "right")
    for one in found.values():
        shown.add_row(
            one["title"],
            f"{one['seconds']:.0f}",
            f"{one['cpu_seconds']:.0f}",
            f"{one['parts']['down_proj'] / one['seconds']:.0%}",
            f"{one['peak_bytes'] / 1e9:.1f}",
            str(one["layers"]),
            f"{one['cpu_seconds'] * one['layers'] / 3600:.2f}",
        )
    return shown


def main() -> None:
    """Parses the command line and measures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    wanted = [name for name in GEOMETRIES if name != "tiny"]
    parser.add_argument("--geometries", nargs="+", choices=list(GEOMETRIES), default=wanted)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("out/calibration.json"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.worker:
        geometry = GEOMETRIES[options.geometries[0]]
        print(json.dumps(measure(geometry, options.samples, options.length)))
        return
    console, disturbance = Console(), Disturbance()
    result = header(console, "bench/calibration.py")
    result |= {name: getattr(options, name) for name in ("samples", "length", "threads")}
    found: dict[str, dict[str, Any]] = {}
    for name in options.geometries:
        command = [sys.executable, __file__, "--worker", "--geometries", name]
        for option in ("samples", "length", "threads"):
            command += [f"--{option}", str(getattr(options, option))]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        console.print(f"{GEOMETRIES[name].title}: {found[name]['seconds']:.0f} s", highlight=False)
        result |= {"layers": found, "disturbance": disturbance.measured()}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    console.print(table(found))


if __name__ == "__main__":
    main()
