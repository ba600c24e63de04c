"""Kinds of damage to a model's folder, and every command that reads one."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

UP = "model.layers.1.mlp.up_proj"


def commands(model: Path, output: Path) -> dict[str, tuple[object, ...]]:
    """Every command that reads a model, on this one, as short as it gets."""
    text = ("--text", __file__, "--length", 16)
    return {
        "info": ("info", model),
        "eval": ("eval", model, *text, "--tokens", 16),
        "generate": ("generate", model, "def", "--max-tokens", 1),
        "chat": ("chat", model),
        "export": ("export", model, output),
        "deploy": ("deploy", model, output),
        "convert": ("convert", model, output),
        "import": ("import", model, output),
        "train": ("train", model, output, *text, "--steps", 1),
        "demo": ("demo", "--model", model, "--output", output),
        "bench": ("bench", model, "--seconds", 0.001, "--cold-mb", 0.001, "--tokens", 1),
        "push": ("push", model, "me/model"),
    }


COMMANDS = sorted(commands(Path(), Path()))
# Those that load the weights of a float model.
LOADING = ("chat", "demo", "deploy", "eval", "export", "generate", "train")


def set_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(fields)
    (folder / "config.json").write_text(json.dumps(config))


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrites a folder's tensors."""
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(file)
    edit(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, metadata)


def _nest(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)


def _pipe(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def _socket(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    here = os.getcwd()
    os.chdir(folder)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            # A longer path than this would not fit into an address.
            made.bind("tokenizer.json")
    finally:
        os.chdir(here)


# How a folder is damaged, and what every message about it says.
FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "nested JSON": (_nest, "recursion"),
    "a pipe": (_pipe, "must be an ordinary one, got a named pipe"),
    "a socket": (_socket, "must be an ordinary one, got a socket"),
    "a scheme that is a list": (
        lambda folder: set_config(folder, quantization_config=[1]),
        "quant_method must be",
    ),
}
# How the weights of a float model are damaged.
WEIGHTS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no embedding": (
        lambda held: held.pop("model.embed_tokens.weight"),
        "got none of lm_head.weight, model.embed_tokens.weight",
    ),
    "no norm": (lambda held: held.pop("model.norm.weight"), "got none of model.norm.weight"),
    "no layer": (lambda held: held.pop(f"{UP}.weight"), f"{UP}.weight"),
    "a misshapen norm": (
        lambda held: held.update({"model.norm.weight": held["model.norm.weight"][1:]}),
        "model.norm.weight must be [256]",
    ),
    "a misshapen layer": (
        lambda held: held.update({f"{UP}.weight": held[f"{UP}.weight"][1:]}),
        f"{UP}.weight must be",
    ),
    "a bias too many": (
        lambda held: held.update({f"{UP}.bias": held["model.norm.weight"]}),
        f"got {UP}.bias without one",
    ),
    "a block too many": (
        lambda held: held.update({"model.layers.99.mlp.up_proj.weight": held[f"{UP}.weight"]}),
        "got model.layers.99.mlp.up_proj.weight without one",
    ),
}
