"""``bitlab bench``: the kernels on this machine, against torch's dense products, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bitcore.errors import ArgumentError
from bitlab_hf.cli.common import MOST, MOST_THREADS, Json, emit, finite, progress
from bitlab_hf.cli.errors import doing
from bitlab_hf.cli.loading import DAMAGED
from bitlab_hf.cli.places import check_folder
from bitlab_hf.fit.memory import available_bytes

# Of BitNet-2B-4T: q and o, k and v, gate and up, down; N x K.
SHAPES = ((2560, 2560), (640, 2560), (6912, 2560), (2560, 6912))
ENGINES = ("bitlab", "torch float32", "torch bfloat16")
_LIMIT = 3.0


def bench(
    model: Annotated[
        Path | None,
        typer.Argument(help="A checkpoint's folder, for the shapes of its ternary layers. Default: "
                       "those of BitNet-2B-4T.", exists=True, file_okay=False),
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="Outputs x inputs, such as 4096x14336; repeatable.")
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(min=1, max=MOST, help="Tokens of a call; repeatable. Default: 1, 8, 128."),
    ] = None,
    threads: Annotated[
        list[int] | None,
        typer.Option(min=1, max=MOST_THREADS, help="CPU threads; repeatable. Default: torch's."),
    ] = None,
    isa: Annotated[
        str | None, typer.Option(help="Instruction set of BitLab's kernels; see bitlab info.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.001, max=3600, callback=finite, help="Timed for each figure.")
    ] = 0.3,
    cold_mb: Annotated[
        float | None,
        typer.Option(min=0.001, callback=finite, help="Distinct weights that each rotates over. "
                     "Default: four times the last-level cache."),
    ] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Times one linear layer, ternary against dense, at each shape.

    Weights are cold, as in a model: each call uses another copy than the call before. The
    contenders take turns, so that what disturbs the machine disturbs them all; p50 is the median.
    """
    import torch

    from bitcore.kernels import kernels_for
    from bitlab_hf.cli.timing import last_level_cache, machine

    shapes = [_parse(one) for one in shape or ()]
    if not shapes:
        shapes = list(SHAPES) if model is None else _shapes_of(model)
    counts = tokens or [1, 8, 128]
    before = torch.get_num_threads()
    pools = threads or [before]
    cold = int(1e6 * cold_mb) if cold_mb is not None else max(4 * last_level_cache(), 64_000_000)
    kernels: Any = kernels_for("cpu")
    if isa is not None and not hasattr(kernels, "use_isa"):
        raise ArgumentError(f"bench: isa must be left out without native kernels, got {isa}")
    for one in shapes:
        _check_memory(one, max(counts), cold)
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()
    with nullcontext() if isa is None else kernels.use_isa(isa):
        used = str(getattr(kernels, "isa", "torch reference"))
        try:
            with progress("measuring", len(shapes) * len(pools) * len(counts)) as advance:
                for one in shapes:
                    rows += _measure(one, counts, pools, cold, seconds, advance)
        finally:
            torch.set_num_threads(before)
    result = {
        "machine": machine(), "isa": used, "cold_bytes": cold,
        "seconds": time.perf_counter() - started, "rows": rows,
    }  # fmt: skip
    if as_json:
        emit(result, True, "")
    else:
        _show(result)


def _parse(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    fits = [part.isdecimal() and len(part) < 16 and int(part) > 0 for part in parts]
    if len(parts) != 2 or not all(fits):
        raise typer.BadParameter(f"must be like 4096x14336, got {text}", param_hint="--shape")
    return int(parts[0]), int(parts[1])


def _check_memory(shape: tuple[int, int], tokens: int, cold: int) -> None:
    """Refuses what does not fit into memory, before the system ends the process for it.

    Raises:
        ArgumentError: It does not fit.
    """
    outputs, inputs = shape
    # The float layer, its copies in the three forms, and what is rotated over.
    needed = 14 * outputs * inputs + 3 * cold + 16 * tokens * (outputs + inputs)
    free = available_bytes()
    if free is not None and needed > free:
        raise ArgumentError(
            f"bench: a shape with its tokens and cold weights must fit into {free / 1e9:.1f} GB of "
            f"free memory, got {outputs}x{inputs} with {tokens} tokens, about {needed / 1e9:.1f} GB"
        )


def _shapes_of(folder: Path) -> list[tuple[int, int]]:
    """Returns the distinct shapes of a checkpoint's converted layers, read from its headers."""
    from bitlab_hf.cli.statistics import examine

    check_folder(folder)
    with doing(f"reading {folder}", DAMAGED):
        found = examine(folder, lambda _amount: None)
    shapes = list(dict.fromkeys((one["outputs"], one["inputs"]) for one in found.layers))
    if not shapes:
        raise ArgumentError(
            f"bench: the model must have packed layers, got none in {folder}\n"
            "Deploy it first (bitlab deploy), or pass --shape."
        )
    return shapes


def _measure(
    shape: tuple[int, int],
    counts: list[int],
    pools: list[int],
    cold: int,
    seconds: float,
    advance: Callable[[float], None],
) -> list[dict[str, Any]]:
    """Returns one row for each number of threads and of tokens."""
    import torch

    from bitlab_hf.cli.timing import Contender, race

    outputs, inputs = shape
    engines = _engines(outputs, inputs, cold)
    rows = []
    with torch.no_grad():
        for pool in pools:
            torch.set_num_threads(pool)
            for count in counts:
                x = torch.randn(count, inputs)
                contenders = [
                    Contender(name, [partial(one, x.to(dtype)) for one in layers])
                    for name, layers, dtype in engines
                ]
                times = race(contenders, seconds, _LIMIT)
                us = {name: asdict(times[name]) for name in ENGINES}
                rows.append(
                    {"outputs": outputs, "inputs": inputs, "threads": pool, "tokens": count,
                     "us": us}
                )  # fmt: skip
                advance(1)
    return rows


def _engines(outputs: int, inputs: int, cold: int) -> list[tuple[str, list[Any], Any]]:
    """Returns name, layers on distinct memory, and the input's dtype, of each contender."""
    import copy

    import torch
    from torch import nn

    from bitlayers import BitLinear

    linear = nn.Linear(inputs, outputs, bias=False)
    packed = BitLinear.from_linear(linear).deploy()
    dense = linear.requires_grad_(False)
    found = []
    for name, layer, dtype, size in (
        ("bitlab", packed, torch.float32, packed.qweight.numel()),
        ("torch float32", dense, torch.float32, 4 * outputs * inputs),
        ("torch bfloat16", copy.deepcopy(dense).bfloat16(), torch.bfloat16, 2 * outputs * inputs),
    ):
        copies = max(1, -(-cold // size))
        layers = [layer.eval(), *(copy.deepcopy(layer).eval() for _ in range(copies - 1))]
        found.append((name, layers, dtype))
    return found


def _show(result: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    console = Console()
    about = result["machine"]
    console.print(
        f"{about['cpu']}, {about['cores']} cores; kernels: {result['isa']}; torch "
        f"{about['versions']['torch']}; cold weights, µs p50",
        highlight=False,
    )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("N x K", "threads", "tokens", *ENGINES, "float32 / bitlab", "bfloat16 / bitlab"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        p50 = [row["us"][name]["p50"] for name in ENGINES]
        table.add_row(
            f"{row['outputs']}x{row['inputs']}", str(row["threads"]), str(row["tokens"]),
            *(f"{value:,.0f}" for value in p50),
            *(f"{value / p50[0]:.1f}x" for value in p50[1:]),
        )  # fmt: skip
    console.print(table)
