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
from bitlab_hf.cli.errors import doing
from bitlab_hf.cli.loading import DAMAGED
from bitlab_hf.cli.places import check_folder
from bitlab_hf.demo.terminal import printable


def info(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="A model's folder. Default: this machine.")
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="One line for every layer.")] = False,
    as_json: Json = False,
) -> None:
    """Shows which kernels run on this machine and why, or what a checkpoint holds.

    Of a checkpoint: its scheme, its sizes, the bits that a weight takes with its share of the
    scales, and the shares of -1, 0 and +1, counted in the file.
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

    check_folder(folder)
    with doing(f"reading {folder}", DAMAGED, str(folder)):
        size = sum(file.stat().st_size for file in weight_files(folder, "info"))
    with progress("reading", size) as advance, doing(f"reading {folder}", DAMAGED, str(folder)):
        found = examine(folder, advance)
    result = found.to_dict()
    if as_json:
        emit(result, True, "")
        return
    _show(result, layers)


def _show(result: dict[str, Any], layers: bool) -> None:
    from rich.table import Table

    scheme = result["scheme"]
    what = "float" if scheme is None else f"{scheme['quant_method']}, {_state(scheme)}"
    _say(f"{result['architecture']}: {what}, {megabytes(result['bytes'])} of weights")
    table = Table("", "tensors", "weights", "bytes", "share of the bytes")
    for name, part in result["parts"].items():
        share = part["bytes"] / max(1, result["bytes"])
        table.add_row(
            name, f"{part['tensors']}", f"{part['weights']:,}", megabytes(part["bytes"]),
            f"{share:.1%}",
        )  # fmt: skip
    Console().print(table)
    if scheme is not None:
        details = {
            name: value for name, value in scheme.items()
            if name not in ("quant_method", "weight_format", "modules_to_not_convert")
        }  # fmt: skip
        _say(", ".join(f"{k} {v}" for k, v in details.items()))
    if result["codes"] is not None:
        shares = ", ".join(f"{code}: {share:.1%}" for code, share in result["codes"].items())
        _say(f"codes: {shares}")
        _say(f"{result['bits_per_weight']:.2f} bits a weight, scales included")
    if not layers:
        kinds = Counter((_kind(layer), layer["scheme"]) for layer in result["layers"])
        for (kind, scheme), count in kinds.items():
            _say(f"{count} {kind}, scales {scheme}")
        return
    names = [printable(layer["name"]) for layer in result["layers"]]
    width = max(map(len, names), default=0)
    for name, layer in zip(names, result["layers"], strict=True):
        codes = " ".join(f"{code} {share:6.1%} " for code, share in layer["codes"].items())
        size = f"{layer['outputs']} x {layer['inputs']}"
        if "experts" in layer:
            size = f"{layer['experts']} x {size}"
        bits = f"{layer['bits_per_weight']:.2f} bits a weight"
        typer.echo(f"{name:<{width}}  {size:>13}  {codes} {layer['scheme']}, {bits}")


def _kind(layer: dict[str, Any]) -> str:
    if "experts" in layer:
        return "tensors of experts"
    return "packed embeddings" if "embed" in layer["name"] else "packed layers"


def _say(text: str) -> None:
    """Prints a line that holds words out of files."""
    Console().print(printable(text), markup=False, highlight=False)


def _state(scheme: dict[str, Any]) -> str:
    """Returns whether a scheme's weights are packed or latent; bitnet has no field for it."""
    if scheme["quant_method"] == "bitlab":
        return str(scheme.get("weight_format", "latent"))
    online = scheme.get("quantization_mode") == "online"
    latent = online and scheme.get("linear_class") == "autobitlinear"
    return "latent" if latent else "packed"
