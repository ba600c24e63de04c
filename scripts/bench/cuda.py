"""Times BitLab's CUDA kernels on a GPU: layers, quantizers of training, a whole model.

    python scripts/bench/cuda.py                               # everything
    python scripts/bench/cuda.py --shapes 8192x8192 --tokens 1 16 --no-generate
    python scripts/bench/cuda.py --quick  # tiny, to see that it runs; without a GPU too

Needs this repository, torch with CUDA, and either an installed libbitkernels_cuda or what compiles
it for this GPU (`native_build.py`). The whole model needs transformers besides, and is
left out, with a line that says so, where that is missing.

**Layers** run against bf16 cuBLAS. Each side is a CUDA graph that runs the layer once on each of
several copies of its weights, which together have four times the size of the L2 cache (64 copies at
most), so that weights come from memory as they do in a model. Sides take turns, replay by replay,
between two events; a time is that of a replay divided by its calls, and the median is reported.
BitLab's calls are whole layers: bf16 activations are quantized, outputs are bf16. Beside one scale
a matrix there are groups of 128 and 64 inputs with a multiplier each; and few tokens with their
codes kept, which takes several launches where the layer alone is one. The ceilings are
measured in the same run: a copy (bytes read plus bytes written) and a square matmul in bf16.

**Quantizers**: BitLab's single-pass ops of a training step against torch.compile's fusion of the
same formula, both as above, for some of the shapes; `keep` names the kernel where it is a tenth
faster or more, else the simpler torch.compile.

**Generate**: bench/generate.py on this GPU: BitNet-2B-4T's geometry, random weights, static cache
and transformers' own compilation to CUDA graphs, against dense bf16 and the packed `bitnet`.

A side of a layer with a wrong result is left out, and the run ends as failed when the rest is done.
Writes out/bench_cuda.json, anew after each number of tokens, and, in Markdown, out/bench_cuda.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from cuda_sides import (  # noqa: E402
    GROUPED,
    SEVERAL,
    Bench,
    Quantizer,
    Row,
    ceilings,
    gradients,
    measure,
    quantizers,
)
from native_build import build_libraries  # noqa: E402
from results import write_json  # noqa: E402

# Outputs x inputs of the layers of BitNet 2B-4T, Llama 8B and Llama 70B, and a square.
SHAPES = (
    "2560x2560", "640x2560", "6912x2560", "2560x6912",
    "4096x4096", "1024x4096", "14336x4096", "4096x14336",
    "8192x8192", "1024x8192", "28672x8192", "8192x28672",
)  # fmt: skip
LARGE = ("8192x8192", "28672x8192", "8192x28672")
# Of BitNet 2B-4T: not slower than bf16, whatever the number of tokens.
SMALL = ("2560x2560", "640x2560", "6912x2560", "2560x6912")
# Whose quantizers are timed too: torch.compile takes seconds for each of them.
QUANTIZED = ("6912x2560", "8192x8192")
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
TRAINING_TOKENS = 2048
DTYPES = (torch.float32, torch.bfloat16)
ENGINES = ("bitlab int8", "dense bf16", "bitnet packed")


@dataclass(frozen=True)
class Target:
    """One line of the closing table; measured is None where the run did not measure it."""

    name: str
    measured: float | None
    bound: float
    at_least: bool = True

    @property
    def verdict(self) -> str:
        """Whether the run met it."""
        if self.measured is None:
            return "not in this run"
        met = self.measured >= self.bound if self.at_least else self.measured <= self.bound
        return "yes" if met else "NO"


def targets(rows: list[Row], limits: dict[str, float], speeds: dict[str, float]) -> list[Target]:
    """Compares the rows, and the tokens a second of `generate`, with what is asked of an H100."""
    found = {(row.shape, row.tokens, row.engine): row for row in rows}

    def speedup(
        shape: str, tokens: int, of: str = "bitlab", over: str = "cublas bf16"
    ) -> float | None:
        ours, peer = (found.get((shape, tokens, name)) for name in (of, over))
        return None if ours is None or peer is None else peer.us / ours.us

    listed = []
    for shape in LARGE:
        ours = found.get((shape, 1, "bitlab"))
        share = None if ours is None else 100 * ours.gbs / limits["copy_gbs"]
        listed.append(Target(f"M 1, {shape}: 6x bf16", speedup(shape, 1), 6.0))
        listed.append(Target(f"M 1, {shape}: 70 % of the copy bandwidth", share, 70.0))
    small = found.get(("2560x6912", 1, "bitlab"))
    listed.append(Target("M 1, 2560x6912: 2x bf16", speedup("2560x6912", 1), 2.0))
    microseconds = None if small is None else small.us
    listed.append(Target("M 1, 2560x6912: under 6 us", microseconds, 6.0, False))
    for tokens, bound in ((16, 4.0), (256, 1.3), (4096, 1.0)):
        for shape in ("8192x8192", "14336x4096"):
            name = f"M {tokens}, {shape}: {bound:g}x bf16"
            listed.append(Target(name, speedup(shape, tokens), bound))
    for shape in SMALL:
        ratios = [speedup(shape, row.tokens) for row in rows if row.shape == shape]
        least = min((one for one in ratios if one is not None), default=None)
        listed.append(Target(f"every M, {shape}: no slower than bf16", least, 1.0))
    for tokens, bound in ((1, 0.9), (4096, 0.85)):
        for engine, group in GROUPED.items():
            name = f"M {tokens}, 8192x8192, groups of {group}: {bound:g} of one scale's speed"
            share = speedup("8192x8192", tokens, engine, "bitlab")
            listed.append(Target(name, share, bound))
    own = speeds.get("bitlab int8")
    for peer, bound in (("dense bf16", 2.0), ("bitnet packed", 10.0)):
        ratio = None if own is None or peer not in speeds else own / speeds[peer]
        listed.append(Target(f"generate: {bound:g}x {peer}", ratio, bound))
    return listed


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """Returns a table whose first column is text."""
    rule = ["---", *["--:"] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, rule, *rows))


def layer_table(rows: list[Row], limits: dict[str, float]) -> str:
    """Returns the rows in Markdown, one line for all sides of a layer; of groups, and of several
    launches, their speed as a share of that of one scale.
    """
    columns = ["shape", "M", "bitlab us", "bf16 us", "speed-up", "GB/s packed", "of copy", "TOP/s",
               "of matmul", *(f"groups of {group}" for group in GROUPED.values()),
               "several launches"]  # fmt: skip
    sides: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        sides.setdefault((row.shape, row.tokens), {})[row.engine] = row
    lines = []
    for (shape, tokens), engines in sides.items():
        ours, peer = engines.get("bitlab"), engines["cublas bf16"]
        if ours is None:  # it was wrong
            lines.append([shape, str(tokens), "-", f"{peer.us:.2f}", *"-" * (len(columns) - 4)])
            continue
        others = [engines.get(engine) for engine in (*GROUPED, SEVERAL)]
        lines.append([
            shape, str(tokens), f"{ours.us:.2f}", f"{peer.us:.2f}", f"{peer.us / ours.us:.2f}",
            f"{ours.gbs:.0f}", f"{ours.gbs / limits['copy_gbs']:.0%}", f"{ours.tops:.1f}",
            f"{ours.tops / limits['bf16_tops']:.0%}",
            *("-" if one is None else f"{ours.us / one.us:.2f}" for one in others),
        ])  # fmt: skip
    return markdown(columns, lines)


def quantizer_table(found: list[Quantizer]) -> str:
    """Returns the quantizers in Markdown."""
    columns = ["quantizer", "shape", "dtype", "bitlab us", "torch.compile us", "equal", "keep"]
    lines = [
        [one.name, one.shape, one.dtype, f"{one.us:.2f}", f"{one.compiled_us:.2f}",
         f"{one.equal:.4%}", one.keep]
        for one in found
    ]  # fmt: skip
    return markdown(columns, lines)


def gradient_table(found: list[Row]) -> str:
    """Returns the products of a backward pass in Markdown."""
    lines = [
        [one.shape, str(one.tokens), one.engine, f"{one.us:.2f}", f"{one.tops:.1f}"]
        for one in found
    ]
    return markdown(["layer", "tokens", "product", "us", "Top/s"], lines)


def target_table(listed: list[Target]) -> str:
    """Returns the closing table in Markdown."""
    figures = ["-" if one.measured is None else f"{one.measured:.2f}" for one in listed]
    lines = [[one.name, figure, one.verdict] for one, figure in zip(listed, figures, strict=True)]
    return markdown(["target", "measured", "met"], lines)


def generate(device: torch.device, options: argparse.Namespace) -> dict[str, Any] | None:
    """Runs bench/generate.py on the device; returns what it wrote, None without transformers.

    Raises:
        SystemExit: It fails.
    """
    if importlib.util.find_spec("transformers") is None:
        print("generate: left out, transformers is not installed (pip install .)")
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "generate.json"
        command = [
            sys.executable, str(ROOT / "scripts/bench/generate.py"), "--device", device.type,
            "--cache", "static", "--engines", *ENGINES, "--json", str(path), "--no-png",
            "--rounds", str(options.rounds),
            *(["--work", str(options.work)] if options.work else []),
            *(["--quick"] if options.quick else ["--decode", "128"]),
        ]  # fmt: skip
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        done = subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": paths})
        if done.returncode != 0:
            raise SystemExit("bench/generate.py failed; its message is above.")
        result: dict[str, Any] = json.loads(path.read_text())
    return result


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", metavar="NxK")
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--no-generate", action="store_true", help="leave the whole model out")
    parser.add_argument("--rounds", type=int, help="processes of each whole model; default 3")
    parser.add_argument("--work", type=Path, help="folder for the whole models, kept and reused")
    parser.add_argument("--json", type=Path, default=Path("out/bench_cuda.json"))
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    options = parser.parse_args()
    options.shapes = options.shapes or (["64x128", "96x64"] if options.quick else SHAPES)
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.tokens = options.tokens or ([1, 20] if options.quick else TOKENS)
    return options


def prepare(quick: bool) -> tuple[Bench, str]:
    """Returns what is measured how, and the device in words; builds the library where needed.

    Raises:
        SystemExit: There is no GPU, or no library and no nvcc.
    """
    if not torch.cuda.is_available():
        if not quick:
            raise SystemExit(
                "bench/cuda.py needs a CUDA device; torch finds none. "
                "(--quick checks on a CPU that the script runs.)"
            )
        return Bench(torch.device("cpu"), 2, 1024, 64), "CPU: no time here is a measurement"
    from bitcore.kernels.native import LIBRARY_DIRECTORY_VARIABLE, library_path

    if not library_path("bitkernels_cuda").is_file():
        folder = Path(tempfile.mkdtemp(prefix="bitlab_cuda_"))
        os.environ[LIBRARY_DIRECTORY_VARIABLE] = str(build_libraries(folder))
    properties = torch.cuda.get_device_properties(0)
    device = torch.device("cuda", 0)
    l2_bytes = getattr(properties, "L2_cache_size", Bench(device).l2_bytes)
    words = f"{properties.name}, {properties.multi_processor_count} multiprocessors"
    return Bench(device, 5 if quick else 30, l2_bytes, 1024 if quick else 8192), words


def main() -> None:
    """Runs the benchmark."""
    options = parse_arguments()
    bench, words = prepare(options.quick)
    import bitcore

    print(f"{words}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    limits = ceilings(bench)
    print(f"copy {limits['copy_gbs']:.0f} GB/s, bf16 matmul {limits['bf16_tops']:.1f} TFLOP/s")
    rows: list[Row] = []
    fused: list[Quantizer] = []
    backward: list[Row] = []
    failed: list[str] = []
    result: dict[str, Any] = {
        "device": words,
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "scripts/bench/cuda.py", *sys.argv[1:]]),
        "torch": torch.__version__,
        "quick": options.quick,
        "ceilings": limits,
        "failed": failed,
    }

    def keep() -> None:
        result["rows"] = [asdict(row) for row in rows]
        result["quantizers"] = [{**asdict(one), "keep": one.keep} for one in fused]
        result["gradients"] = [asdict(row) for row in backward]
        write_json(options.json, result)

    with bitcore.use_backend("cuda" if bench.device.type == "cuda" else "auto"):
        for shape in options.shapes:
            for tokens in options.tokens:
                measured, wrong = measure(bench, shape, tokens)
                rows += measured
                failed += [f"{shape}, M {tokens}, {side}: {why}" for side, why in wrong.items()]
                print(layer_table(measured, limits).splitlines()[-1], flush=True)
                keep()
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()
        few = 20 if options.quick else TRAINING_TOKENS
        compiled = [shape for shape in options.shapes if options.quick or shape in QUANTIZED]
        for shape in compiled:
            backward += gradients(bench, shape)
        print(gradient_table(backward), flush=True)
        keep()
        # Behind all layers, for torch.compile takes long.
        for shape, dtype in product(compiled, DTYPES):
            fused += quantizers(bench, shape, few, dtype)
            print("\n".join(quantizer_table(fused[-3:]).splitlines()[2:]), flush=True)
            keep()
    model = None if options.no_generate else generate(bench.device, options)
    engines = [] if model is None else model["engines"]
    speeds = {engine["engine"]: engine["decode_tok_s"] for engine in engines}
    closing = targets(rows, limits, speeds)
    print(target_table(closing))
    result["generate"] = model
    result["targets"] = [{**asdict(target), "verdict": target.verdict} for target in closing]
    keep()
    decode = markdown(
        ["engine", "decode tok/s", "prompt tok/s", "compiled"],
        [[one["engine"], f"{one['decode_tok_s']:.1f}", f"{one['prompt_tok_s']:.0f}",
          "yes" if one["compiled"] else "no"] for one in engines],
    )  # fmt: skip
    tables = (
        layer_table(rows, limits), gradient_table(backward), quantizer_table(fused), decode,
        target_table(closing),
    )  # fmt: skip
    options.json.with_suffix(".md").write_text(f"{words}\n\n" + "\n\n".join(tables) + "\n")
    if failed:
        raise SystemExit("\n".join(["left out:", *failed]))


if __name__ == "__main__":
    main()
