"""The tables of docs/benchmarks.md: for each question, which of a run's figures stand in a row.

A ratio is that of the two figures before it. "-" is what a run did not measure or did not keep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from page_runs import Run

Row = dict[str, Any]
Cells = list[str]
SHAPES = ((6912, 2560), (4096, 14336))
PEERS = ("torch bf16", "torch int8", "ggml TQ2_0", "transformers")
QUICK_PEERS = PEERS[:-1]
GPU_SHAPES = ("2560x2560", "6912x2560", "14336x4096", "8192x8192", "28672x8192", "8192x28672")


@dataclass(frozen=True)
class Table:
    """One question.

    Attributes:
        columns: What a row says; its run is added behind.
        rows: Yields the rows of a run.
        left: How many of the columns are names.
    """

    columns: Cells
    rows: Callable[[Run], Iterator[Cells]]
    left: int = 2


def figure(value: float | None) -> str:
    """Returns a figure with about three digits; "-" where there is none."""
    if value is None:
        return "-"
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:.0f}"
    decimals = 1 if abs(value) >= 10 else 2 if abs(value) >= 0.1 else 3
    return f"{value:.{decimals}f}"


def pair(ours: float | None, theirs: float | None, over: bool) -> Cells:
    """Returns two figures and their ratio: ours over theirs, or the other way round."""
    ratio = None
    if ours is not None and theirs is not None:
        ratio = ours / theirs if over else theirs / ours
    return [figure(ours), figure(theirs), figure(ratio)]


def _find(rows: list[Row], **wanted: Any) -> Row | None:
    found = (row for row in rows if all(row.get(key) == value for key, value in wanted.items()))
    return next(found, None)


def _p50(row: Row | None) -> float | None:
    return None if row is None else float(row["us"]["p50"])


def _layers(
    tokens: tuple[int, ...], peers: tuple[str, ...] = PEERS
) -> Callable[[Run], Iterator[Cells]]:
    def rows(run: Run) -> Iterator[Cells]:
        if run.kind != "linear":
            return
        measured = run.result["rows"]
        for (n, k), m in ((shape, m) for shape in SHAPES for m in tokens):
            ours = _find(measured, n=n, k=k, m=m, engine="bitlab")
            for peer in peers:
                theirs = _find(measured, n=n, k=k, m=m, engine=peer)
                if ours is not None and theirs is not None:
                    cells = pair(_p50(ours), _p50(theirs), over=False)
                    yield [f"{n}x{k}", str(m), peer, *cells]

    return rows


def _groups(run: Run) -> Iterator[Cells]:
    if run.kind != "groups":
        return
    measured, kept = run.result.get("rows", []), run.result.get("ratios", [])
    for (n, k), m in ((shape, m) for shape in SHAPES for m in (1, 8, 16, 64, 512)):
        one = _find(measured, n=n, k=k, m=m, engine="bitlab")
        for scales in ("groups of 128", "groups of 64"):
            groups = _find(measured, n=n, k=k, m=m, engine=f"bitlab {scales}")
            ratio = _find(kept, shape=f"{n}x{k}", m=m, scales=scales)
            if one is not None and groups is not None:
                cells = pair(_p50(groups), _p50(one), over=True)
            elif ratio is not None:
                cells = ["-", "-", figure(ratio["of_one_scale"])]
            else:
                continue
            yield [f"{n}x{k}", str(m), scales, *cells]


def _head(run: Run) -> Iterator[Cells]:
    measured = run.result.get("head", []) if run.kind == "linear" else []
    ours = _find(measured, engine="bitlab int8")
    for row in measured:
        if ours is not None and row is not ours:
            yield [
                f"{row['n']}x{row['k']}",
                row["engine"],
                *pair(_p50(ours), _p50(row), over=False),
            ]


def _packing(run: Run) -> Iterator[Cells]:
    for row in run.result.get("packing", []) if run.kind in ("linear", "groups") else []:
        cells = pair(row["pack_us"]["p50"], row["read_us"]["p50"], over=True)
        yield [f"{row['n']}x{row['k']} {row['dtype']}", row["scales"], *cells]


def _experts(on_gpu: bool) -> Callable[[Run], Iterator[Cells]]:
    def rows(run: Run) -> Iterator[Cells]:
        if run.kind != "experts" or run.on_gpu != on_gpu:
            return
        measured = run.result.get("rows", [])
        for row in measured:
            if not row["engine"].startswith("bitlab"):
                key = {name: row[name] for name in ("geometry", "threads", "tokens")}
                ours = _find(measured, engine="bitlab", **key)
                cells = pair(_p50(ours), _p50(row), over=False)
                yield [row["geometry"], str(row["tokens"]), row["engine"], *cells]
        for kept in run.result.get("ratios", []):
            cells = ["-", "-", figure(kept["ratio"])]
            yield [run.result["geometry"], str(kept["tokens"]), kept["engine"], *cells]

    return rows


def _whole(on_gpu: bool) -> Callable[[Run], Iterator[Cells]]:
    def rows(run: Run) -> Iterator[Cells]:
        if run.kind != "generate" or run.on_gpu != on_gpu:
            return
        engines = run.result["engines"]
        for ours in (one for one in engines if one["engine"].startswith("bitlab")):
            for theirs in (one for one in engines if not one["engine"].startswith("bitlab")):
                cells = pair(ours["decode_tok_s"], theirs["decode_tok_s"], over=True)
                prompts = pair(ours.get("prompt_tok_s"), theirs.get("prompt_tok_s"), over=True)
                yield [ours["engine"], theirs["engine"], *cells, *prompts]

    return rows


def _compiled(run: Run) -> Iterator[Cells]:
    engines = run.result["engines"] if run.kind.startswith("generate") and not run.on_gpu else []
    for one in engines:
        name, _, how = one["engine"].rpartition(" ")
        base = _find(engines, engine=name) if how in ("exact", "fused") else None
        if base is not None:
            geometry = "BitNet-2B-4T" if run.kind == "generate" else run.kind.partition("-")[2]
            cells = pair(one["decode_tok_s"], base["decode_tok_s"], over=True)
            yield [geometry, name, how, str(run.result["threads"]), *cells]


def _lookup(run: Run) -> Iterator[Cells]:
    rows = run.result["rows"] if run.kind == "lookup" else []
    for one in rows[1:]:
        yield [
            run.result["model"], one["how"], str(run.result["guesses"]),
            *(figure(row["tokens_per_second"]) for row in (one, rows[0])),
            *(f"{one[f'gain_{what}']:.2f}" for what in ("p50", "least", "most")),
            f"{one['same_texts']} of {one['texts']}",
        ]  # fmt: skip


def _mixtures(run: Run) -> Iterator[Cells]:
    for one in run.result["engines"] if run.kind == "experts_model" else []:
        names = ("decode_tok_s", "prompt_tok_s", "load_seconds", "peak_gb", "file_gb")
        threads = str(run.result["threads"])
        yield [one["engine"], threads, *(figure(one[name]) for name in names)]


def _whole_groups(run: Run) -> Iterator[Cells]:
    engines = run.result["engines"] if run.kind == "generate" else []
    one = _find(engines, engine="bitlab int8")
    for name in ("bitlab g128", "bitlab g64"):
        groups = _find(engines, engine=name)
        if one is not None and groups is not None:
            cells = pair(groups["decode_tok_s"], one["decode_tok_s"], over=True)
            yield [name, figure(groups["bits_per_weight"]), *cells]


def _memory(run: Run) -> Iterator[Cells]:
    for one in run.result["engines"] if run.kind == "generate" and not run.on_gpu else []:
        names = ("load_seconds", "file_gb", "peak_gb", "above_gb")
        yield [one["engine"], *(figure(one.get(name)) for name in names)]


def _load(run: Run) -> Iterator[Cells]:
    engines = run.result["engines"] if run.kind.startswith("load") else []
    peers = [one for one in engines if one["engine"].startswith("dense")]
    for one in (one for one in engines if "hooks_seconds" not in one and one not in peers):
        for other in peers:
            first, second = (figure(each["load_seconds"]) for each in (one, other))
            ratio = figure(one["load_seconds"] / other["load_seconds"])
            tensors = [figure(each["tensors"]) for each in (one, other)]
            names = [run.result["geometry"], one["engine"], other["engine"]]
            yield [*names, *tensors, first, second, ratio]


def _loads(run: Run) -> Iterator[Cells]:
    # Of a run with timers in it, which no command makes.
    engines = run.result["engines"] if run.kind == "load" else []
    for one in (one for one in engines if "hooks_seconds" in one):
        names = ("load_seconds", "load_seconds_least", "hooks_seconds", "scan_seconds")
        cells = [figure(one[name]) for name in (*names, "own_seconds", "tensors")]
        yield [one["engine"], *cells]


def _fitting(run: Run) -> Iterator[Cells]:
    for one in run.result["layers"] if run.kind == "calibration" else []:
        names = ("peak_gb", "above_gb", "layers", "whole_cpu_hours")
        seconds = (one["seconds"], one["cpu_seconds"], one["parts"]["down_proj"])
        cells = [figure(value) for value in (*seconds, *(one[name] for name in names))]
        yield [one["title"], str(run.result["threads"]), *cells]


def _step(part: str, name: str, on_gpu: bool) -> Callable[[Run], Iterator[Cells]]:
    def rows(run: Run) -> Iterator[Cells]:
        if run.kind != "train" or run.on_gpu != on_gpu:
            return
        measured = run.result["rows"]
        for row in (row for row in measured if row["engine"] == "bitlab" and row[part]):
            key = {name: row[name] for name in ("precision", "geometry", "m")}
            for peer in ("plain", "transformers", "onebitllms"):
                theirs = _find(measured, engine=peer, **key)
                if theirs is not None and theirs[part] is not None:
                    cells = pair(row[part][name], theirs[part][name], over=True)
                    how = " compiled" if run.result.get("compiled") else ""
                    block = f"{row['geometry']}{how}, {row['precision']}"
                    yield [block, str(row["m"]), peer, *cells]

    return rows


def _gpu_layers(run: Run) -> Iterator[Cells]:
    measured = run.result["rows"] if run.kind == "cuda" else []
    for shape, m in ((shape, m) for shape in GPU_SHAPES for m in (1, 16, 256, 4096)):
        ours, theirs = (
            _find(measured, shape=shape, tokens=m, engine=engine)
            for engine in ("bitlab", "cublas bf16")
        )
        if ours is not None and theirs is not None:
            yield [shape, str(m), *pair(ours["us"], theirs["us"], over=False)]


def _gpu_groups(run: Run) -> Iterator[Cells]:
    measured = run.result["rows"] if run.kind == "cuda" else []
    for shape, m in (("8192x8192", 1), ("8192x8192", 4096), ("14336x4096", 4096)):
        one = _find(measured, shape=shape, tokens=m, engine="bitlab")
        for scales in ("groups of 128", "groups of 64"):
            groups = _find(measured, shape=shape, tokens=m, engine=f"bitlab, {scales}")
            if one is not None and groups is not None:
                yield [shape, str(m), scales, *pair(groups["us"], one["us"], over=True)]


def _gpu_speedups(run: Run) -> Iterator[Cells]:
    found = run.result.get("speedups", []) if run.kind == "cuda" else []
    for shape in dict.fromkeys(one["shape"] for one in found):
        yield [shape, *(figure(one["speedup"]) for one in found if one["shape"] == shape)]


def _quantizers(run: Run) -> Iterator[Cells]:
    for one in run.result.get("quantizers", []):
        cells = pair(one["us"], one["compiled_us"], over=False)
        yield [one["name"], f"{one['shape']} {one['dtype']}", *cells]


def _gpu_quality(run: Run) -> Iterator[Cells]:
    results = run.result["results"] if run.kind == "quality" and run.on_gpu else {}
    original = results.get("original", [{}])[0].get("nats")
    for name, seeds in results.items():
        if name != "original":
            one = seeds[0]
            yield [one["title"], figure(one["tokens"]), figure(one["nats"]), figure(original)]


def _servers(kind: str) -> Callable[[Run], Iterator[Cells]]:
    def rows(run: Run) -> Iterator[Cells]:
        for one in run.result["rows"] if run.kind == kind else []:
            seconds = ("first_p50", "first_p95", "between_p50", "between_p95")
            same = (one["as_one_by_one"], one["as_transformers"])
            yield [
                one["server"], str(one["clients"]), f"{one['tokens_per_s']:.1f}",
                *(f"{one[name]:.3f}" for name in seconds), f"{one['memory_gb']:.2f}",
                str(one["errors"]),
                *("-" if count is None else f"{count} of {one['texts']}" for count in same),
            ]  # fmt: skip

    return rows


def _targets(run: Run) -> Iterator[Cells]:
    # A command's table names those too that its run did not ask for.
    for one in run.result.get("targets", []):
        measured = one["measured"]
        if measured is None:
            continue
        many = measured if isinstance(measured, list) else [measured]
        text = ", ".join(f"{value:.4g}" for value in many)
        met = one["met"] if "met" in one else one["verdict"] == "yes"
        unit = one.get("unit", "").strip()
        yield [one["name"], f"{text} {unit}".strip(), "yes" if met else "**no**"]


_LAYER = ["layer, N x K", "M"]
_US = ["BitLab, µs", "the other, µs", "ratio"]
_COST = ["groups, µs", "one scale, µs", "ratio"]
_SERVED = [
    "server", "clients", "tokens/s", "first token, s: p50", "p95", "between tokens, s: p50", "p95",
    "memory, GB", "errors", "as one by one", "as transformers",
]  # fmt: skip
_RATE = ["BitLab, tokens/s", "the other, tokens/s", "ratio"]
TABLES: dict[str, Table] = {
    "one-token": Table([*_LAYER, "against", *_US], _layers((1,)), 3),
    "many-tokens": Table([*_LAYER, "against", *_US], _layers((8, 512), QUICK_PEERS), 3),
    "groups": Table([*_LAYER, "scales", *_COST], _groups, 3),
    "groups-model": Table(
        ["engine", "bits a weight", "groups, tokens/s", "one scale, tokens/s", "ratio"],
        _whole_groups, 1,
    ),
    "head": Table(["head, N x K", "against", *_US], _head),
    "packing": Table(["weight", "scales", "packing, µs", "reading, µs", "ratio"], _packing),
    "experts": Table(["experts of", "M", "against", *_US], _experts(False), 3),
    "whole": Table(
        ["engine", "against", *_RATE, "prompt, tokens/s", "the other's", "ratio"],
        _whole(False),
    ),
    "mixture": Table(
        ["engine", "threads", "decode, tokens/s", "prompt, tokens/s", "load, s", "peak, GB",
         "file, GB"],
        _mixtures,
    ),
    "memory": Table(["engine", "load, s", "file, GB", "peak, GB", "above, GB"], _memory, 1),
    "compiled": Table(
        ["geometry", "engine", "compiled", "threads", "tokens/s", "without", "ratio"], _compiled, 4,
    ),
    "lookup": Table(
        ["model", "guesses verified by", "guesses", "tokens/s", "without", "gain, p50", "least",
         "most", "same text"],
        _lookup,
    ),
    "load": Table(
        ["geometry", "engine", "against", "tensors", "the other's", "load, s", "the other, s",
         "ratio"],
        _load, 3,
    ),
    "loads": Table(
        ["engine", "load, s", "least", "in BitLab's hooks", "the scan", "transformers' own",
         "tensors"],
        _loads, 1,
    ),
    "fitting": Table(
        ["a layer of", "threads", "s", "CPU s", "down_proj, s", "peak, GB", "above, GB", "layers",
         "whole model, CPU h"],
        _fitting, 1,
    ),
    "step-time": Table(
        ["block", "M", "against", "BitLab, ms", "the other, ms", "ratio"],
        _step("time", "step_ms", False), 3,
    ),
    "step-memory": Table(
        ["block", "M", "against", "BitLab, MB", "the other, MB", "ratio"],
        _step("bytes_mb", "peak", False), 3,
    ),
    "gpu-layers": Table([*_LAYER, "BitLab, µs", "bf16 cuBLAS, µs", "ratio"], _gpu_layers),
    "gpu-groups": Table([*_LAYER, "scales", *_COST], _gpu_groups, 3),
    "gpu-speedups": Table(
        ["layer, N x K", *(f"M={2**power}" for power in range(13))], _gpu_speedups, 1
    ),
    "gpu-quantizers": Table(
        ["quantizer", "of", "BitLab, µs", "torch.compile, µs", "ratio"], _quantizers
    ),
    "gpu-step-time": Table(
        ["block", "M", "against", "BitLab, ms", "the other, ms", "ratio"],
        _step("time", "step_ms", True), 3,
    ),
    "gpu-step-memory": Table(
        ["block", "M", "against", "BitLab, MB", "the other, MB", "ratio"],
        _step("bytes_mb", "peak", True), 3,
    ),
    "gpu-whole": Table(
        ["engine", "against", *_RATE, "prompt, tokens/s", "the other's", "ratio"],
        _whole(True),
    ),
    "gpu-experts": Table(["experts of", "M", "against", *_US], _experts(True), 3),
    "gpu-quality": Table(["model", "tokens", "nats", "full precision"], _gpu_quality, 1),
    "serve": Table(_SERVED, _servers("serve"), 1),
    "serve-1b": Table(_SERVED, _servers("serve-1b"), 1),
    "targets": Table(["what is asked for", "measured", "met"], _targets, 1),
}  # fmt: skip
# What scripts/gpu.sh finds.
GPU_TABLES = [name for name in TABLES if name.startswith("gpu-") and name != "gpu-speedups"]
