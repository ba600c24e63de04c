"""Times linear layers on a GPU: BitLab's CUDA kernels against bf16 cuBLAS, in one run.

    python scripts/bench_cuda.py                               # every shape, 1 to 4096 tokens
    python scripts/bench_cuda.py --shapes 8192x8192 --tokens 1 16 --json out/bench_cuda.json

Needs this repository, torch with CUDA, and either an installed libbitkernels_cuda or nvcc, which
then compiles it for this GPU (a minute or two). Nothing else is imported.

Each side is a CUDA graph that runs the layer once on each of several copies of its weights, which
together have four times the size of the L2 cache (64 copies at most), so that weights come from
memory as they do in a model. Sides
take turns, replay by replay, between two events; a time is that of a replay divided by its calls,
and the median is reported. BitLab's calls are whole layers: bf16 activations are quantized, outputs
are bf16. The ceilings are measured in the same run: a copy (bytes read plus bytes written) and a
square matmul in bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

# Outputs x inputs of the layers of BitNet 2B-4T, Llama 8B and Llama 70B, and a square.
SHAPES = (
    "2560x2560", "6912x2560", "2560x6912", "4096x4096", "14336x4096", "4096x14336", "8192x8192",
    "28672x8192", "8192x28672",
)  # fmt: skip
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
REPLAYS = 30
WARM_UP = 3
MOST_COPIES = 64
MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One measured side.

    Attributes:
        shape: Outputs x inputs.
        tokens: M.
        engine: ``"bitlab"`` or ``"cublas bf16"``.
        us: Microseconds of one call, median.
        us_p10: Tenth percentile.
        us_p90: Ninetieth percentile.
        gbs: Bytes of weights read a second, in 1e9.
        tops: Multiplications and additions a second, in 1e12.
    """

    shape: str
    tokens: int
    engine: str
    us: float
    us_p10: float
    us_p90: float
    gbs: float
    tops: float


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


def build_library() -> str:
    """Compiles libbitkernels_cuda for this GPU; returns its folder.

    Raises:
        SystemExit: There is no nvcc, or it fails.
    """
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        raise SystemExit("libbitkernels_cuda is not installed, and no nvcc was found to build it.")
    folder = Path(tempfile.mkdtemp(prefix="bitlab_cuda_"))
    print("compiling libbitkernels_cuda for this GPU ...", flush=True)
    command = [
        nvcc, "-std=c++17", "-O3", "-fmad=false", "-arch=native", "-shared",
        "-Xcompiler=-fPIC,-fvisibility=hidden", '-DBK_CUDA_ARCHITECTURES="native"',
        f"-I{ROOT / 'csrc/include'}", f"-I{ROOT / 'csrc/cuda'}",
        *map(str, sorted((ROOT / "csrc/cuda").glob("*.cu"))),
        "-o", str(folder / "libbitkernels_cuda.so"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return str(folder)


def captured(calls: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """Returns a graph that makes the calls one after another."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def race(sides: dict[str, list[Callable[[], object]]]) -> dict[str, list[float]]:
    """Replays the sides in turn; returns the microseconds of one call, sorted."""
    graphs = {name: captured(calls) for name, calls in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for replay in range(WARM_UP + REPLAYS):
        for name, graph in graphs.items():
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if replay >= WARM_UP:
                times[name].append(begin.elapsed_time(end) * 1e3 / len(sides[name]))
    return {name: sorted(found) for name, found in times.items()}


def ceilings() -> dict[str, float]:
    """Measures what this GPU can do: a copy in GB/s, a bf16 matmul in TFLOP/s."""
    source = torch.empty(512 * MIB, dtype=torch.uint8, device="cuda")
    to = torch.empty_like(source)
    side = 8192
    a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = race({"copy": [lambda: to.copy_(source)], "matmul": [lambda: a @ b]})
    return {
        "copy_gbs": 2 * source.numel() / statistics.median(times["copy"]) / 1e3,
        "bf16_tops": 2 * side**3 / statistics.median(times["matmul"]) / 1e6,
    }


def check(x: Tensor, qweight: Tensor, scale: Tensor, out_features: int) -> None:
    """Compares the kernels with plain torch on this GPU, bit for bit, before anything is timed.

    Raises:
        SystemExit: They differ.
    """
    from bitcore import reference

    args = (x, qweight, scale, None, out_features, "int8_per_token", torch.float32)
    if not torch.equal(torch.ops.bitlab.linear(*args), reference.linear(*args)):
        raise SystemExit(f"{out_features}x{x.shape[1]}, {x.shape[0]} tokens: a wrong result")


def measure(shape: str, tokens: int, l2_bytes: int) -> list[Row]:
    """Times one layer on both sides."""
    out_features, in_features = (int(size) for size in shape.split("x"))
    packed_bytes, dense_bytes = out_features * in_features // 4, 2 * out_features * in_features
    x = torch.randn(tokens, in_features, device="cuda", dtype=torch.bfloat16)
    latent = torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16)
    qweight, scale = torch.ops.bitlab.pack_weight(latent, "per_tensor", 0)
    check(x[: min(tokens, 64)], qweight, scale, out_features)

    def copies(tensor: Tensor, size: int) -> list[Tensor]:
        count = min(MOST_COPIES, max(2, -(-4 * l2_bytes // size)))
        return [tensor.clone() for _ in range(count)]

    def layer(weight: Tensor) -> Callable[[], object]:
        args = (x, weight, scale, None, out_features, "int8_per_token", torch.bfloat16)
        return lambda: torch.ops.bitlab.linear(*args)

    dense = copies(latent, dense_bytes)
    sides: dict[str, list[Callable[[], object]]] = {
        "bitlab": [layer(weight) for weight in copies(qweight, packed_bytes)],
        "cublas bf16": [lambda w=w: torch.nn.functional.linear(x, w) for w in dense],
    }
    rows = []
    for engine, times in race(sides).items():
        us = statistics.median(times)
        size = packed_bytes if engine == "bitlab" else dense_bytes
        work = 2 * tokens * out_features * in_features
        tenth = len(times) // 10
        rows.append(
            Row(shape, tokens, engine, us, times[tenth], times[-1 - tenth], size / us / 1e3,
                work / us / 1e6)
        )  # fmt: skip
    return rows


def targets(rows: list[Row], limits: dict[str, float]) -> list[Target]:
    """Compares the rows with what is asked of an H100."""
    found = {(row.shape, row.tokens, row.engine): row for row in rows}

    def speedup(shape: str, tokens: int) -> float | None:
        ours, peer = (found.get((shape, tokens, name)) for name in ("bitlab", "cublas bf16"))
        return None if ours is None or peer is None else peer.us / ours.us

    large, small = found.get(("8192x8192", 1, "bitlab")), found.get(("2560x6912", 1, "bitlab"))
    share = None if large is None else 100 * large.gbs / limits["copy_gbs"]
    listed = [
        Target("M 1, 8192x8192: 6x bf16", speedup("8192x8192", 1), 6.0),
        Target("M 1, 8192x8192: 70 % of the copy bandwidth", share, 70.0),
        Target("M 1, 2560x6912: 2x bf16", speedup("2560x6912", 1), 2.0),
        Target("M 1, 2560x6912: under 6 us", None if small is None else small.us, 6.0, False),
    ]
    for tokens, bound in ((16, 4.0), (256, 1.3), (4096, 1.0)):
        for shape in ("8192x8192", "14336x4096"):
            name = f"M {tokens}, {shape}: {bound:g}x bf16"
            listed.append(Target(name, speedup(shape, tokens), bound))
    return listed


def table(rows: list[Row]) -> str:
    """Returns the rows in Markdown, one line for both sides of a layer."""
    lines = ["| shape | M | bitlab us | bf16 us | speed-up | GB/s packed | TOP/s |"]
    lines.append("|---|--:|--:|--:|--:|--:|--:|")
    for ours, peer in zip(rows[::2], rows[1::2], strict=True):
        lines.append(
            f"| {ours.shape} | {ours.tokens} | {ours.us:.2f} | {peer.us:.2f} | "
            f"{peer.us / ours.us:.2f} | {ours.gbs:.0f} | {ours.tops:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxK")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--json", type=Path, default=Path("out/bench_cuda.json"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_cuda.py needs a CUDA device; torch finds none.")
    from bitcore.kernels.native import LIBRARY_DIRECTORY_VARIABLE, library_path

    if not library_path("bitkernels_cuda").is_file():
        os.environ[LIBRARY_DIRECTORY_VARIABLE] = build_library()
    import bitcore

    properties = torch.cuda.get_device_properties(0)
    l2_bytes = getattr(properties, "L2_cache_size", 64 * MIB)
    print(f"{properties.name}, {properties.multi_processor_count} multiprocessors, "
          f"torch {torch.__version__}, CUDA {torch.version.cuda}")  # fmt: skip
    limits = ceilings()
    print(f"copy {limits['copy_gbs']:.0f} GB/s, bf16 matmul {limits['bf16_tops']:.0f} TFLOP/s")
    rows: list[Row] = []
    with bitcore.use_backend("cuda"):
        for shape in options.shapes:
            for tokens in options.tokens:
                rows += measure(shape, tokens, l2_bytes)
                print(table(rows[-2:]).splitlines()[-1], flush=True)
                torch.cuda.empty_cache()
    closing = targets(rows, limits)
    for target in closing:
        figure = "-" if target.measured is None else f"{target.measured:.2f}"
        print(f"{target.name:48} {figure:>8}  {target.verdict}")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "device": properties.name,
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "ceilings": limits,
        "rows": [asdict(row) for row in rows],
        "targets": [{**asdict(target), "verdict": target.verdict} for target in closing],
    }
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    options.json.with_suffix(".md").write_text(table(rows) + "\n")


if __name__ == "__main__":
    main()
