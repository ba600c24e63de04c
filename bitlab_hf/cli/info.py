"""``bitlab info``: the kernels of this machine, or what a checkpoint holds."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bitlab_hf.cli.common import Json, emit, megabytes, progress


def info(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="A model's folder. Default: this machine.")
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="One line for every layer.")] = False,
    as_json: Json = False,
) -> None:
    """Shows which kernels run on this machine and why, or what a checkpoint holds.

    Of a checkpoint: its scheme, its sizes, and the shares of -1, 0 and +1, counted in the file.
    """
    if checkpoint is None:
        _machine(as_json)
    else:
        _checkpoint(checkpoint, layers, as_json)


def _machine(as_json: bool) -> None:
    import torch
    from rich.table import Table

    import bitcore

    found = bitcore.backends()
    result = {
        "bitlab": importlib.metadata.version("bitlab-hf"),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "backends": [dataclasses.asdict(item) for item in found],
    }
    if as_json:
        emit(result, True, "")
        return
    table = Table("device", "backend", "available", "chosen", "why")
    for item in found:
        flags = ("yes" if flag else "no" for flag in (item.available, item.chosen))
        table.add_row(item.device, item.name, *flags, item.reason)
    console = Console()
    console.print(
        f"BitLab {result['bitlab']}, torch {result['torch']}, transformers "
        f"{result['transformers']}; {result['machine']}, {result['threads']} threads, "
        f"GPU: {result['gpu'] or 'none'}",
        highlight=False,
    )
    console.print(table)


def _checkpoint(folder: Path, layers: bool, as_json: bool) -> None:
    from bitlab_hf.checkpoint.files import weight_files
    from bitlab_hf.cli.statistics import examine

    size = sum(file.stat().st_size for file in weight_files(folder, "info"))
    with progress("reading", size) as advance:
        found = examine(folder, advance)
    result = found.to_dict()
    if as_json:
        emit(result, True, "")
        return
    _show(result, layers)


def _show(result: dict[str, Any], layers: bool) -> None:
    from rich.table import Table

    console = Console()
    scheme = result["scheme"]
    what = "float" if scheme is None else f"{scheme['quant_method']}, {scheme['weight_format']}"
    console.print(
        f"{result['architecture']}: {what}, {megabytes(result['bytes'])} of weights",
        highlight=False,
    )
    table = Table("", "tensors", "weights", "bytes", "share of the bytes")
    for name, part in result["parts"].items():
        share = part["bytes"] / max(1, result["bytes"])
        table.add_row(
            name, f"{part['tensors']}", f"{part['weights']:,}", megabytes(part["bytes"]),
            f"{share:.1%}",
        )  # fmt: skip
    console.print(table)
    if scheme is not None:
        details = {
            name: value for name, value in scheme.items()
            if name not in ("quant_method", "weight_format", "modules_to_not_convert")
        }  # fmt: skip
        console.print(", ".join(f"{k} {v}" for k, v in details.items()), highlight=False)
    if result["codes"] is not None:
        shares = ", ".join(f"{code}: {share:.1%}" for code, share in result["codes"].items())
        console.print(f"codes: {shares}", highlight=False)
    if not layers:
        kinds = Counter(layer["scheme"] for layer in result["layers"])
        for kind, count in kinds.items():
            console.print(f"{count} packed layers, scales {kind}", highlight=False)
        return
    width = max((len(layer["name"]) for layer in result["layers"]), default=0)
    for layer in result["layers"]:
        codes = " ".join(f"{code} {share:6.1%} " for code, share in layer["codes"].items())
        size = f"{layer['outputs']} x {layer['inputs']}"
        typer.echo(f"{layer['name']:<{width}}  {size:>13}  {codes} {layer['scheme']}")
