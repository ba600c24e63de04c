"""Times one linear layer: BitLab against its peers and against the machine's limits, in one run.

    python scripts/bench/linear.py                     # all shapes, every thread count: minutes
    python scripts/bench/linear.py --shapes 6912x2560 --tokens 1 8 --threads 2
    python scripts/bench/linear.py --isa all           # each instruction set of this CPU too

Engines take turns call by call, each on distinct copies of its weights that no cache can keep;
reading from DRAM and multiplying int8 take their turns too, and are what the shares are of. All
times hold what the engine does for a float input, activation quantization included. Writes
linear.json, linear.md and linear.png. docs/benchmarks.md says what each column means.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import Disturbance, Grid, Probe, Target, close, header, pyplot
from engines import DEFAULT, NAMES, Engine, Weight, build, build_head, check
from ggml_peer import BLOCK, Ggml
from rich.console import Console
from rich.progress import Progress

from bitcore.kernels import kernels_for
from bitlab_hf.cli.timing import Contender, Timing, last_level_cache, race

Shape = tuple[int, int]
Row = dict[str, Any]
MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Preset:
    """What a run measures, unless options say otherwise; shapes are N x K."""

    shapes: tuple[Shape, ...]
    targets: tuple[Shape, ...]
    head: Shape
    packing: Shape
    tokens: tuple[int, ...]
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
    cold=450 * MEGABYTE,
    seconds=0.4,
)  # fmt: skip
QUICK = Preset(((64, 256),), ((64, 256),), (512, 256), (64, 256), (1, 8, 512), MEGABYTE, 0.01)


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
    parser.add_argument("--engines", nargs="+", choices=NAMES, default=list(DEFAULT))
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
    arguments.shapes = arguments.shapes or list(preset.shapes)
    arguments.tokens = arguments.tokens or list(preset.tokens)
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


def _threads(count: int) -> str:
    return f"{count} thread" if count == 1 else f"{count} threads"


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
        times = race(
            [
                Contender("pack", [lambda w=w: _pack(w) for w in copies]),
                Contender("read", [probe.reads(w) for w in copies]),
            ],
            options.seconds,
            options.limit,
        )
        rows.append(
            {
                "threads": torch.get_num_threads(),
                "n": shape[0],
                "k": shape[1],
                "dtype": str(dtype).removeprefix("torch."),
                "pack_us": asdict(times["pack"]),
                "read_us": asdict(times["read"]),
                "ratio": times["pack"].p50 / times["read"].p50,
            }
        )
    return rows


def _pack(weight: torch.Tensor) -> object:
    return torch.ops.bitlab.pack_weight(weight, "per_tensor", 0)


def long_grid(title: str, rows: list[Row]) -> Grid:
    """Returns every figure of some cells."""
    columns = ["M", "engine", "µs p50", "p10-p90", "GB/s", "of DRAM", "GMAC/s", "of peak"]
    grid = Grid(title, columns, left=2)
    for row in rows:
        timing = Timing(**row["us"])
        share = "-" if row["peak_share"] is None else f"{row['peak_share']:.0%}"
        grid.rows.append(
            [
                str(row["m"]), row["engine"], f"{timing.p50:.0f}",
                f"{timing.p10:.0f}-{timing.p90:.0f}", f"{row['gbs']:.1f}",
                f"{row['dram_share']:.0%}", f"{row['gmacs']:.0f}", share,
            ]
        )  # fmt: skip
    return grid


def wide_grids(rows: list[Row]) -> list[Grid]:
    """Returns a table for each thread count and shape: µs of the engines by tokens."""
    grids = []
    for threads, n, k in dict.fromkeys((row["threads"], row["n"], row["k"]) for row in rows):
        cells = [row for row in rows if (row["threads"], row["n"], row["k"]) == (threads, n, k)]
        tokens = list(dict.fromkeys(row["m"] for row in cells))
        columns = ["engine", *(f"M={m}" for m in tokens)]
        grid = Grid(f"{n}x{k} (N x K), {_threads(threads)}, µs", columns)
        for engine in dict.fromkeys(row["engine"] for row in cells):
            times = {row["m"]: row["us"]["p50"] for row in cells if row["engine"] == engine}
            grid.rows.append([engine, *(f"{times[m]:.0f}" if m in times else "-" for m in tokens)])
        grids.append(grid)
    return grids


def pack_grid(rows: list[Row]) -> Grid:
    """Returns the table of packing times."""
    grid = Grid("Packing, µs", ["weight", "threads", "pack", "read once", "ratio"])
    for row in rows:
        name = f"{row['n']}x{row['k']} {row['dtype']}"
        pack, read = row["pack_us"]["p50"], row["read_us"]["p50"]
        grid.rows.append(
            [name, str(row["threads"]), f"{pack:.0f}", f"{read:.0f}", f"{row['ratio']:.2f}"]
        )
    return grid


def find_targets(rows: list[Row], packing: list[Row], preset: Preset, threads: int) -> list[Target]:
    """Returns the closing table's lines, computed from the run's figures."""

    def cell(shape: Shape, m: int, engine: str) -> Row | None:
        wanted = (threads, *shape, m, engine)
        names = ("threads", "n", "k", "m", "engine")
        return next((row for row in rows if tuple(row[key] for key in names) == wanted), None)

    def ratio(above: Row | None, below: Row | None) -> float | None:
        if above is None or below is None:
            return None
        return float(above["us"]["p50"] / below["us"]["p50"])

    targets = []
    for shape in preset.targets:
        one, eight, many = (cell(shape, m, "bitlab") for m in (1, 8, 512))
        name = f"{shape[0]}x{shape[1]}"
        share = None if one is None else 100 * one["dram_share"]
        ggml, dense = cell(shape, 1, "ggml TQ2_0"), cell(shape, 1, "torch bf16")
        int8 = cell(shape, 512, "torch int8")
        targets += [
            Target(f"{name} M=1: share of DRAM reading, 80 %", share, 80, True, " %"),
            Target(f"{name} M=1: 1.8x ggml TQ2_0", ratio(ggml, one), 1.8, True, "x"),
            Target(f"{name} M=1: 10x torch bf16", ratio(dense, one), 10, True, "x"),
            Target(f"{name} M=8: at most 2x M=1", ratio(eight, one), 2, False, "x"),
            Target(f"{name} M=512: at most torch int8's time", ratio(many, int8), 1, False, "x"),
        ]
    for dtype in ("float32", "bfloat16"):
        found = [r["ratio"] for r in packing if (r["dtype"], r["threads"]) == (dtype, threads)]
        name = f"packing {dtype}: at most 2.5x reading it once"
        targets.append(Target(name, found[0] if found else None, 2.5, False, "x"))
    return targets


def draw(rows: list[Row], preset: Preset, threads: int, path: Path) -> None:
    """Draws the shares of DRAM at one token, and GMAC/s over the tokens of the first target."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    rows = [row for row in rows if row["threads"] == threads]
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    least = min(row["m"] for row in rows)
    shapes = list(dict.fromkeys((row["n"], row["k"]) for row in rows))
    width = 0.8 / len(engines)
    for index, engine in enumerate(engines):
        times = {
            (row["n"], row["k"]): row["us"]["p50"]
            for row in rows
            if (row["engine"], row["m"]) == (engine, least)
        }
        places = [place + index * width for place in range(len(shapes))]
        left.bar(places, [times.get(one, 0) for one in shapes], width, label=engine)
    left.set_yscale("log")
    left.set_xticks([place + 0.4 for place in range(len(shapes))])
    left.set_xticklabels([f"{n}x{k}" for n, k in shapes], rotation=30)
    left.set(title=f"M = {least}, cold weights, {_threads(threads)}", ylabel="µs (log)")
    left.legend(fontsize="small")
    shape = next((one for one in preset.targets if one in shapes), shapes[0])
    curves = [row for row in rows if (row["n"], row["k"]) == shape]
    for engine in engines:
        points = [(row["m"], row["gmacs"]) for row in curves if row["engine"] == engine]
        right.plot(*zip(*points, strict=True), marker="o", label=engine)
    peaks = [row["peak_gmacs"] for row in curves]
    right.axhline(sum(peaks) / len(peaks), color="black", linestyle="--", label="int8 peak")
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set(title=f"{shape[0]}x{shape[1]} (N x K)", xlabel="M", ylabel="GMAC/s (log)")
    right.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


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
        "not_installed": absent, "quick": options.quick,
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
            engines = build(Weight(*shape), options.engines, isas, options.cold, ggml)
            check(engines, torch.randn(2, shape[1]))
            for threads in options.threads:
                torch.set_num_threads(threads)
                found = measure_all(engines, shape, probe, options)
                title = f"{shape[0]}x{shape[1]} (N x K), {_threads(threads)}, {isas[0]}"
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
            long_grid(f"{name}, {_threads(t)}", [row for row in head if row["threads"] == t])
            for t in options.threads
        ]
    if packing:
        grids.append(pack_grid(packing))
    for grid in grids:
        grid.show(console)
    result |= {"rows": rows, "head": head, "packing": packing}
    threads = max(options.threads)
    targets = find_targets(rows, packing, options.preset, threads)
    close(console, result, grids, targets, disturbance, options.json)
    if not options.no_png:
        draw(rows, options.preset, threads, options.png)
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
