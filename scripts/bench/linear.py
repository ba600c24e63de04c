"""Times one linear layer: BitLab against its peers and against the machine's limits, in one run.

    python scripts/bench/linear.py                     # all shapes, every thread count: minutes
    python scripts/bench/linear.py --shapes 6912x2560 --tokens 1 8 --threads 2
    python scripts/bench/linear.py --isa all           # each instruction set of this CPU too
    python scripts/bench/linear.py --granularity all   # BitLab alone: what groups of scales cost

Engines take turns call by call, each on distinct copies of its weights that no cache can keep;
reading from DRAM and multiplying int8 take their turns too, and are what the shares are of. All
times hold what the engine does for a float input, activation quantization included. Writes
linear.json, linear.md and linear.png. docs/benchmarks.md says what each column means.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Disturbance, Probe, close, header, pyplot
from engines import DEFAULT, GRANULARITIES, NAMES, Engine, Weight, build, build_head, check
from ggml_peer import BLOCK, Ggml
from linear_report import (
    Row,
    Shape,
    draw,
    find_targets,
    long_grid,
    pack_grid,
    threads_text,
    wide_grids,
)
from rich.console import Console
from rich.progress import Progress

from bitcore.kernels import kernels_for
from bitlab_hf.cli.timing import Contender, last_level_cache, race

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Preset:
    """What a run measures, unless options say otherwise; shapes are N x K."""

    shapes: tuple[Shape, ...]
    targets: tuple[Shape, ...]
    head: Shape
    packing: Shape
    tokens: tuple[int, ...]
    group_tokens: tuple[int, ...]
    cold: int
    seconds: float


FULL = Preset(
    # BitNet-2B-4T (q and o, k and v, gate and up, down), then an 8B Llama.
    shapes=(
        (2560, 2560), (640, 2560), (6912, 2560), (2560, 6912),
        (4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336),
    ),
    targets=((6912, 2560), (4096, 14336)),
    head=(128256, 2560),
    packing=(6912, 2560),
    tokens=(1, 4, 8, 16, 32, 128, 512),
    group_tokens=(1, 4, 8, 16, 20, 24, 64, 256, 512),
    cold=450 * MEGABYTE,
    seconds=0.4,
)  # fmt: skip
QUICK = Preset(
    ((64, 256),), ((64, 256),), (512, 256), (64, 256), (1, 8, 512), (1, 8, 64), MEGABYTE, 0.01
)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cores = torch.get_num_threads()
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="NxK")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="M")
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, cores}))
    parser.add_argument("--isa", default="auto", help="auto, a name, or all")
    parser.add_argument("--engines", nargs="+", choices=NAMES)
    parser.add_argument(
        "--granularity",
        nargs="+",
        choices=("per_tensor", *GRANULARITIES, "all"),
        default=["per_tensor"],
        help="scales of further engines of BitLab beside one for the matrix",
    )
    parser.add_argument("--cold-mb", type=float, help="distinct weights of an engine")
    parser.add_argument("--seconds", type=float, help="time of an engine in one cell")
    parser.add_argument("--limit", type=float, default=3, help="seconds: slower calls run once")
    parser.add_argument("--no-head", action="store_true", help="leave the output head out")
    parser.add_argument("--no-packing", action="store_true", help="leave packing out")
    parser.add_argument("--json", type=Path, default=Path("out/bench/linear.json"))
    parser.add_argument("--png", type=Path, help="default: beside the JSON")
    parser.add_argument("--no-png", action="store_true")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    arguments = parser.parse_args()
    preset = QUICK if arguments.quick else FULL
    arguments.preset = preset
    chosen = [name for name in GRANULARITIES if {name, "all"} & set(arguments.granularity)]
    arguments.granularity = chosen
    arguments.engines = arguments.engines or (["bitlab"] if chosen else list(DEFAULT))
    arguments.shapes = arguments.shapes or list(preset.targets if chosen else preset.shapes)
    arguments.tokens = arguments.tokens or list(preset.group_tokens if chosen else preset.tokens)
    arguments.no_head |= bool(chosen)
    arguments.seconds = arguments.seconds or preset.seconds
    cold = preset.cold if arguments.quick else max(preset.cold, 4 * last_level_cache())
    arguments.cold = int(arguments.cold_mb * MEGABYTE) if arguments.cold_mb else cold
    arguments.png = arguments.png or arguments.json.with_suffix(".png")
    return arguments


def _shape(text: str) -> Shape:
    rows, columns = map(int, text.split("x"))
    if rows % 4 or columns % BLOCK:
        raise argparse.ArgumentTypeError(f"N must be a multiple of 4 and K of {BLOCK}: {text}")
    return rows, columns


def measure(engines: list[Engine], shape: Shape, m: int, probe: Probe, options: Any) -> list[Row]:
    """Races the engines and the machine's limits on one input of m tokens."""
    x = torch.randn(m, shape[1])
    read, multiply = probe.contenders()
    contenders = [Contender(one.name, one.calls(x), one.select) for one in engines]
    times = race([read, multiply, *contenders], options.seconds, options.limit)
    read_gbs = read.work / times[read.name].p50 / 1e3
    peak_gmacs = multiply.work / times[multiply.name].p50 / 1e3
    rows = []
    for engine in engines:
        timing = times[engine.name]
        gbs = engine.weight_bytes / timing.p50 / 1e3
        gmacs = m * shape[0] * shape[1] / timing.p50 / 1e3
        rows.append(
            {
                "threads": torch.get_num_threads(),
                "n": shape[0],
                "k": shape[1],
                "m": m,
                "engine": engine.name,
                "us": asdict(timing),
                "weight_bytes": engine.weight_bytes,
                "gbs": gbs,
                "dram_gbs": read_gbs,
                "dram_share": gbs / read_gbs,
                "gmacs": gmacs,
                "peak_gmacs": peak_gmacs,
                "peak_share": gmacs / peak_gmacs if peak_gmacs else None,
            }
        )
    return rows


def pack_rows(shape: Shape, probe: Probe, options: Any) -> list[Row]:
    """Times packing a weight against reading it once."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(shape).to(dtype)
        size = weight.numel() * weight.element_size()
        copies = [weight, *(weight.clone() for _ in range(-(-options.cold // size) - 1))]
        schemes = {"per tensor": ("per_tensor", 0)}
        for name in options.granularity:
            schemes[GRANULARITIES[name].title] = GRANULARITIES[name].packing
        packers = [
            Contender(title, [partial(torch.ops.bitlab.pack_weight, w, *one) for w in copies])
            for title, one in schemes.items()
        ]
        read = Contender("read", [probe.reads(w) for w in copies])
        times = race([*packers, read], options.seconds, options.limit)
        for title in schemes:
            rows.append(
                {
                    "threads": torch.get_num_threads(),
                    "n": shape[0],
                    "k": shape[1],
                    "dtype": str(dtype).removeprefix("torch."),
                    "scales": title,
                    "pack_us": asdict(times[title]),
                    "read_us": asdict(times["read"]),
                    "ratio": times[title].p50 / times["read"].p50,
                }
            )
    return rows


@torch.no_grad()
def main() -> None:
    """Measures, prints, writes."""
    options = parse_arguments()
    if not options.no_png:
        pyplot()
    # transformers compiles its layer's parts, which makes them slower on a CPU.
    torch.compiler.set_stance("force_eager")
    warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")
    torch.manual_seed(0)
    console = Console()
    disturbance = Disturbance()
    result = header(console, "bench/linear.py")
    kernels: Any = kernels_for("cpu")
    isas = [kernels.isa] if options.isa == "auto" else [options.isa]
    if options.isa == "all":
        isas = [kernels.isa, *(name for name in kernels.supported_isas if name != kernels.isa)]
    ggml = Ggml.load()
    absent = ["ggml TQ2_0"] if ggml is None and "ggml TQ2_0" in options.engines else []
    probe = Probe(max(options.cold, 8 * 4096))
    result |= {
        "isa": isas, "cold_bytes": options.cold, "multiply_probe": probe.multiply_name,
        "not_installed": absent, "quick": options.quick, "granularity": options.granularity,
    }  # fmt: skip
    for name in absent:
        console.print(f"{name}: not installed (pip install llama-cpp-python)")
    rows: list[Row] = []
    head: list[Row] = []
    packing: list[Row] = []
    groups = len(options.threads) * (len(options.shapes) + 2)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=groups)
        for shape in options.shapes:
            progress.update(task, description=f"{shape[0]}x{shape[1]}")
            engines = build(
                Weight(*shape), options.engines, options.granularity, isas, options.cold, ggml
            )
            check(engines, torch.randn(2, shape[1]))
            for threads in options.threads:
                torch.set_num_threads(threads)
                found = measure_all(engines, shape, probe, options)
                title = f"{shape[0]}x{shape[1]} (N x K), {threads_text(threads)}, {isas[0]}"
                long_grid(title, found).show(console)
                rows += found
                progress.advance(task)
            del engines
        if not options.no_head:
            progress.update(task, description="output head")
            engines = build_head(*options.preset.head)
            check(engines, torch.randn(1, options.preset.head[1]))
            for threads in options.threads:
                torch.set_num_threads(threads)
                head += measure(engines, options.preset.head, 1, probe, options)
                progress.advance(task)
            del engines
        for threads in () if options.no_packing else options.threads:
            progress.update(task, description="packing")
            torch.set_num_threads(threads)
            packing += pack_rows(options.preset.packing, probe, options)
            progress.advance(task)
    grids = wide_grids(rows)
    if head:
        name = f"Output head {head[0]['n']}x{head[0]['k']}, one token"
        grids += [
            long_grid(f"{name}, {threads_text(t)}", [row for row in head if row["threads"] == t])
            for t in options.threads
        ]
    if packing:
        grids.append(pack_grid(packing))
    for grid in grids:
        grid.show(console)
    result |= {"rows": rows, "head": head, "packing": packing}
    threads = max(options.threads)
    targets = find_targets(rows, packing, options.preset.targets, threads)
    close(console, result, grids, targets, disturbance, options.json)
    if not options.no_png:
        draw(rows, options.preset.targets, threads, options.png)
    console.print(f"Results: {options.json}", highlight=False)


def measure_all(engines: list[Engine], shape: Shape, probe: Probe, options: Any) -> list[Row]:
    """Measures each number of tokens; an engine over the limit sits out the larger ones."""
    rows: list[Row] = []
    slow: set[str] = set()
    for m in sorted(options.tokens):
        running = [engine for engine in engines if engine.name not in slow]
        found = measure(running, shape, m, probe, options)
        slow |= {row["engine"] for row in found if row["us"]["p50"] > options.limit * 1e6}
        rows += found
    return rows


if __name__ == "__main__":
    main()
