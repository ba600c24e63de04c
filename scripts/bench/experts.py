"""Times the experts of one layer: BitLab against its peers and the machine's limits, in one run.

    python scripts/bench/experts.py                       # Qwen3-30B-A3B, Mixtral-8x7B, GPT-OSS-20B
    python scripts/bench/experts.py --geometry qwen3 --tokens 1 8 --threads 2
    python scripts/bench/experts.py --device cuda         # --quick: without a GPU on the CPU

Engines take turns call by call, and every call sends its tokens to other experts, so that no cache
can keep their weights. All times hold what an engine does from the router's choice to the sum of a
token's experts, but ggml's, which leaves that sum out. "of DRAM" is of the weights of those
experts that got tokens, on a GPU of the rate of a copy. Beside them runs BitLab's dense layer, on
one expert's matrices and as many tokens as an expert gets on average. An engine that fails or
computes another layer is left out, and the run ends as failed when the rest is done. Writes
experts.json, anew after each number of tokens, and experts.md.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import Disturbance, Grid, Probe, Target, close, device_words, header
from cuda_sides import Bench, ceilings
from experts_sides import Geometry, Layer, check, geometries
from ggml_peer import Ggml
from results import write_json
from rich.console import Console
from torch import Tensor

from bitcore.kernels import kernels_for
from bitlab_hf.cli.timing import Contender, Timing, last_level_cache, race

Row = dict[str, Any]
DENSE = "bitlab dense"


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(geometries(True))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--geometry", nargs="+", choices=names, default=names)
    parser.add_argument("--tokens", nargs="+", type=int, metavar="M")
    parser.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()])
    parser.add_argument("--isa", default="auto", help="auto, or the name of an instruction set")
    parser.add_argument("--seconds", type=float, help="time of an engine in one cell")
    parser.add_argument("--limit", type=float, default=3, help="seconds: slower calls run once")
    parser.add_argument("--json", type=Path, default=Path("out/bench/experts.json"))
    parser.add_argument("--quick", action="store_true", help="tiny layers, to see that it runs")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        if not arguments.quick:
            parser.error("--device cuda needs a CUDA device, and torch finds none (but --quick)")
        arguments.device = "cpu"
    arguments.tokens = arguments.tokens or ([1, 5] if arguments.quick else [1, 8, 64, 512])
    arguments.seconds = arguments.seconds or (0.01 if arguments.quick else 1.0)
    return arguments


class Limits:
    """What the machine can do: `Probe` on a CPU, which races with the rest; on a GPU a copy, and a
    bf16 matmul as multiply-adds.
    """

    def __init__(self, options: Any) -> None:
        self._probe: Probe | None = None
        self._fixed = (0.0, 0.0)
        if options.device == "cpu":
            self._probe = Probe(
                1_000_000 if options.quick else max(450_000_000, 4 * last_level_cache())
            )
        else:
            found = ceilings(
                Bench(torch.device("cuda"), ceiling_side=1024 if options.quick else 8192)
            )
            self._fixed = found["copy_gbs"], 1e3 * found["bf16_tops"] / 2

    def contenders(self) -> list[Contender]:
        """Returns who races for them."""
        return [] if self._probe is None else list(self._probe.contenders())

    def rates(self, times: dict[str, Timing], racing: list[Contender]) -> tuple[float, float]:
        """Returns GB/s and GMAC/s, out of a race with `contenders`."""
        if not racing:
            return self._fixed
        read, multiply = (one.work / times[one.name].p50 / 1e3 for one in racing)
        return read, multiply


def draw_choices(geometry: Geometry, tokens: int) -> list[Tensor]:
    """Returns choices of experts; those of few tokens follow each other through all experts."""
    experts, chosen = geometry.experts, geometry.choices
    if tokens * chosen <= experts:
        turns = experts // (tokens * chosen)
        order = torch.randperm(experts)[: turns * tokens * chosen]
        return list(order.view(turns, tokens, chosen))
    scores = torch.rand(4, tokens, experts)
    return list(scores.topk(chosen).indices)


def measure(
    layer: Layer, tokens: int, limits: Limits, options: Any
) -> tuple[list[Row], dict[str, str]]:
    """Races the engines and the machine's limits on one number of tokens; returns besides what is
    wrong with those that are left out.
    """
    geometry = layer.geometry
    x = torch.randn(tokens, geometry.hidden).to(layer.device)
    weights = torch.rand(tokens, geometry.choices).bfloat16().to(layer.device)
    choices = [choice.to(layer.device) for choice in draw_choices(geometry, tokens)]
    rows = tokens * geometry.choices
    own, *peers = layer.sides()
    peers = [one for one in peers if one.most_rows is None or rows <= one.most_rows]
    sides, failed = check([own, *peers], x, weights, choices[0])
    visited = sum(choice.unique().numel() for choice in choices) / len(choices)
    each = max(1, round(rows / visited))
    racing = limits.contenders()
    contenders = [Contender(one.name, one.calls(x, weights, choices)) for one in sides]
    contenders.append(Contender(DENSE, layer.dense(each)))
    times = race([*racing, *contenders], options.seconds, options.limit)
    read_gbs, peak = limits.rates(times, racing)
    expert = sum(stack.weights for stack in layer.ternary.stacks.values()) // geometry.experts
    reads = {one.name: one.expert_bytes * visited for one in sides}
    reads[DENSE] = own.expert_bytes
    found = []
    for name, size in reads.items():
        gbs = size / times[name].p50 / 1e3
        gmacs = (each if name == DENSE else rows) * expert / times[name].p50 / 1e3
        found.append(
            {
                "geometry": geometry.name,
                "threads": torch.get_num_threads(),
                "tokens": tokens,
                "visited": visited,
                "tokens_an_expert": rows / visited,
                "engine": name,
                "us": asdict(times[name]),
                "weight_bytes": size,
                "gbs": gbs,
                "dram_gbs": read_gbs,
                "dram_share": gbs / read_gbs,
                "gmacs": gmacs,
                "peak_gmacs": peak,
                "peak_share": gmacs / peak if peak else None,
            }
        )
    return found, failed


def grid_of(title: str, rows: list[Row]) -> Grid:
    """Returns the table of one geometry."""
    columns = ["M", "engine", "µs p50", "p10-p90", "GB/s", "of DRAM", "GMAC/s", "of peak", "times"]
    grid = Grid(title, columns, left=2)
    for row in rows:
        timing = Timing(**row["us"])
        ours = _find(rows, row["tokens"], "bitlab")
        ratio = "-"
        if ours is not None and row["engine"] != DENSE:
            ratio = f"{timing.p50 / ours['us']['p50']:.2f}"
        share = "-" if row["peak_share"] is None else f"{row['peak_share']:.0%}"
        grid.rows.append(
            [
                str(row["tokens"]), row["engine"], f"{timing.p50:.0f}",
                f"{timing.p10:.0f}-{timing.p90:.0f}", f"{row['gbs']:.1f}",
                f"{row['dram_share']:.0%}", f"{row['gmacs']:.0f}", share, ratio,
            ]
        )  # fmt: skip
    return grid


def _find(rows: list[Row], tokens: int, engine: str) -> Row | None:
    found = (row for row in rows if (row["tokens"], row["engine"]) == (tokens, engine))
    return next(found, None)


def find_targets(rows: list[Row], threads: int) -> list[Target]:
    """Returns the closing table's lines, of the first geometry."""
    name = next(iter(geometries(False).values())).name
    rows = [row for row in rows if (row["geometry"], row["threads"]) == (name, threads)]

    def times(tokens: int, engine: str) -> list[float]:
        return [
            row["us"]["p50"]
            for row in rows
            if row["tokens"] == tokens and row["engine"].startswith(engine)
        ]

    def ratio(engine: str) -> float | None:
        ours, theirs = times(1, "bitlab"), times(1, engine)
        return min(theirs) / ours[0] if ours and theirs else None

    one = [row for row in rows if (row["tokens"], row["engine"]) == (1, "bitlab")]
    many = {row["engine"]: row["gmacs"] for row in rows if row["tokens"] == 512}
    share = one[0]["dram_share"] if one else None
    rate = many["bitlab"] / many[DENSE] if "bitlab" in many else None
    return [
        Target(f"{name}, 1 token: share of DRAM, >= 0.7", share, 0.7, True, ""),
        Target(
            f"{name}, 1 token: transformers' best bfloat16, >= 8 times",
            ratio("transformers"), 8, True, "x",
        ),
        Target(f"{name}, 1 token: ggml TQ2_0, >= 1.5 times", ratio("ggml"), 1.5, True, "x"),
        Target(
            f"{name}, 512 tokens: multiply-adds, >= 1 of the dense layer's", rate, 1, True, "x"
        ),
    ]  # fmt: skip


@torch.inference_mode()
def main() -> None:
    """Measures, prints, writes."""
    options = parse_arguments()
    torch.manual_seed(0)
    console = Console()
    disturbance = Disturbance()
    result = header(console, "bench/experts.py")
    on_gpu = options.device == "cuda"
    kernels: Any = kernels_for("cpu")
    kernels.select_isa(options.isa)
    ggml = None if on_gpu else Ggml.load()
    if ggml is None and not on_gpu:
        console.print("ggml TQ2_0: not installed (pip install llama-cpp-python)")
    limits = Limits(options)
    where = device_words() if on_gpu else kernels.isa
    result |= {"isa": kernels.isa, "quick": options.quick, "ggml": ggml is not None}
    result |= {"device": options.device, "gpu": where if on_gpu else None}
    rows: list[Row] = []
    failed: list[str] = []
    result |= {"rows": rows, "failed": failed}
    grids: list[Grid] = []
    for short in options.geometry:
        geometry = geometries(options.quick)[short]
        layer = Layer(geometry, ggml, options.device)
        for threads in options.threads:
            torch.set_num_threads(threads)
            found: list[Row] = []
            for tokens in sorted(options.tokens):
                measured, wrong = measure(layer, tokens, limits, options)
                found += measured
                where_wrong = f"{geometry.name}, {tokens} tokens"
                failed += [f"{where_wrong}, {side}: {why}" for side, why in wrong.items()]
                write_json(options.json, {**result, "rows": rows + found})
            sizes = f"{geometry.experts} experts, {geometry.choices} a token, H {geometry.hidden}"
            title = f"{geometry.name}: {sizes}, I {geometry.wide}; threads {threads}, {where}"
            grids.append(grid_of(title, found))
            grids[-1].show(console)
            rows += found
        del layer
    # They are stated for CPUs.
    targets = find_targets([] if options.quick or on_gpu else rows, max(options.threads))
    close(console, result, grids, targets, disturbance, options.json)
    console.print(f"Results: {options.json}", highlight=False)
    if failed:
        raise SystemExit("\n".join(["left out:", *failed]))


if __name__ == "__main__":
    main()
