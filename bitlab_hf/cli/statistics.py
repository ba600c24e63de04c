"""What a checkpoint's files hold, counted in the files themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from operator import mul
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitcore.errors import CheckpointError
from bitlab_hf.checkpoint.files import read_config, scheme_of, shard_keys, weight_files

_BLOCK = 2**22


@dataclass
class Part:
    """Tensors of one kind: how many, how many values, how many bytes."""

    tensors: int = 0
    weights: int = 0
    bytes: int = 0


@dataclass
class Found:
    """What `examine` found.

    Attributes:
        architecture: The first name of ``architectures`` in config.json.
        bytes: Size of the weight files.
        scheme: The quantization_config, or None.
        parts: Tensors by kind: ternary layers and embeddings, their scales, others and the rest.
        layers: Name, sizes, scheme, bits a weight and shares of the codes of every packed layer,
            and of every packed tensor of experts, with their number.
        codes: Shares of -1, 0 and +1 over all packed layers; None without any.
        bits_per_weight: Bits that the packed layers take for each weight, scales included; None
            without any.
    """

    architecture: str
    bytes: int
    scheme: dict[str, Any] | None
    parts: dict[str, Part] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    codes: dict[str, float] | None = None
    bits_per_weight: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns it as plain values."""
        return asdict(self)


def examine(folder: Path, advance: Callable[[float], None]) -> Found:
    """Reads a checkpoint of BitLab's, of bitnet's, or a float one.

    Args:
        folder: With config.json and safetensors files.
        advance: Called with the bytes done.

    Raises:
        ArgumentError: There is no config.json.
        CheckpointError: config.json is damaged, a file is missing or damaged, a packed layer has no
            scale, or a tensor stands in two files.
        ConfigError: BitLab does not know the scheme.
    """
    files = weight_files(folder, "info")
    config = read_config(folder)
    found = Found(
        architecture=_architecture(config),
        bytes=sum(file.stat().st_size for file in files),
        scheme=scheme_of(config.get("quantization_config"), str(folder)),
    )
    total = torch.zeros(3, dtype=torch.int64)
    places = shard_keys(files, "info")
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                total += _examine_file(handle, places, found, advance)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file.name}: the file must be a whole safetensors file, got: {error}"
            ) from error
    if found.layers:
        found.codes = _shares(total)
        weights = [_weights(layer) for layer in found.layers]
        bits = [layer["bits_per_weight"] for layer in found.layers]
        found.bits_per_weight = sum(map(mul, bits, weights)) / sum(weights)
    found.layers.sort(key=lambda layer: str(layer["name"]))
    return found


def _architecture(config: dict[str, Any]) -> str:
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    return first if isinstance(first, str) else "unknown architecture"


def _examine_file(
    handle: Any, places: dict[str, Path], found: Found, advance: Callable[[float], None]
) -> Tensor:
    total = torch.zeros(3, dtype=torch.int64)
    for key in sorted(handle.keys()):
        tensor = handle.get_tensor(key)
        base, _, leaf = key.rpartition(".")
        # BitLab's and bitnet's names of packed weights.
        packed = leaf in ("qweight", "weight") and tensor.dtype == torch.uint8 and tensor.dim() == 2
        experts = leaf.endswith("_qweight") and tensor.dtype == torch.uint8 and tensor.dim() == 3
        weights = tensor.numel()
        if packed or experts:
            scale, multiplier = (
                _beside(f"{key}_{suffix}", places) for suffix in ("scale", "multiplier")
            )
            if scale is None:
                raise CheckpointError(
                    f"info: {key}_scale must be in the checkpoint, got none\n"
                    "The checkpoint is incomplete; fetch or write it again."
                )
            name = key.removesuffix("_qweight") if experts else base
            layer, counts = _examine_layer(name, tensor, scale, multiplier)
            found.layers.append(layer)
            total += counts
            weights = _weights(layer)
            kind = "ternary embeddings" if "embed" in base else "ternary layers"
            kind = "ternary experts" if experts else kind
        elif leaf.endswith(("qweight_scale", "qweight_multiplier")) or leaf == "weight_scale":
            kind = "their scales"
        elif leaf == "qweight":
            kind = "int8 layers"
        elif "embed" in key or base.endswith("head"):
            kind = "embeddings and head"
        else:
            kind = "the rest"
        part = found.parts.setdefault(kind, Part())
        part.tensors += 1
        part.weights += weights
        part.bytes += tensor.nbytes
        advance(tensor.nbytes)
    return total


def _beside(key: str, places: dict[str, Path]) -> Tensor | None:
    """Returns a tensor from whichever file of the checkpoint holds it; None if none does."""
    if key not in places:
        return None
    with safe_open(places[key], framework="pt") as handle:
        tensor: Tensor = handle.get_tensor(key)
    return tensor


def _examine_layer(
    name: str, qweight: Tensor, scale: Tensor, multiplier: Tensor | None
) -> tuple[dict[str, Any], Tensor]:
    histogram = torch.zeros(256, dtype=torch.int64)
    for block in qweight.reshape(-1).split(_BLOCK):
        histogram += torch.bincount(block, minlength=256)
    counts = torch.zeros(3, dtype=torch.int64)
    for value in range(256):
        for lane in range(4):
            code = value >> 2 * lane & 3
            if code < 3:
                counts[code] += histogram[value]
    *stacked, rows, columns = qweight.shape
    experts = math.prod(stacked)
    # Only scales of rows tell how many of the last rows are padding, which is written as code 0.
    outputs = scale.shape[len(stacked)] if scale.numel() > 1 else 4 * rows
    counts[1] -= experts * (4 * rows - outputs) * columns
    if multiplier is not None:
        scheme = f"per group of {columns // multiplier.shape[-1]}"
    elif scale.dim() == 2 + len(stacked):
        scheme = f"per group of {columns // scale.shape[-1]} in float32"
    else:
        # Experts keep a scale a row, of gate and up the two that they have.
        alone = scale.numel() == 1 or (bool(stacked) and len(scale[0].unique()) <= 2)
        scheme = "per tensor" if alone else "per channel"
    stored = sum(tensor.nbytes for tensor in (qweight, scale, multiplier) if tensor is not None)
    layer: dict[str, Any] = {
        "name": name,
        "outputs": outputs,
        "inputs": columns,
        "scheme": scheme,
        "bits_per_weight": 8 * stored / (experts * outputs * columns),
        "codes": _shares(counts),
    }
    if stacked:
        layer["experts"] = experts
    return layer, counts


def _weights(layer: dict[str, Any]) -> int:
    return int(layer["outputs"] * layer["inputs"] * layer.get("experts", 1))


def _shares(counts: Tensor) -> dict[str, float]:
    shares = (counts / counts.sum().clamp(min=1)).tolist()
    return dict(zip(("-1", "0", "+1"), shares, strict=True))
