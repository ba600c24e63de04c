"""Tensors at aligned places, so that a memory-mapped model computes the bits of one in memory.

safetensors packs tensors without gaps, ordered by dtype and name: a scale of four bytes shifts all
that follow it, and products of float matrices are summed in another order where a matrix does not
start at a vector's boundary. torch's own memory does.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bitlayers.quantized import QuantizedModule

# What torch's allocator gives on a CPU.
ALIGNMENT = 64
_CHUNK = 2**24


def align_file(file: Path) -> None:
    """Writes a safetensors file anew with its tensors in an aligned order, where it has another.

    Tensors whose size is a multiple of the alignment come first, so that all of them are aligned;
    the others follow by the size of their elements. The new file takes the place of the old one.

    Args:
        file: A file that nobody else reads yet.
    """
    with file.open("rb") as source:
        length = int.from_bytes(source.read(8), "little")
        header: dict[str, Any] = json.loads(source.read(length))
        metadata = header.pop("__metadata__", None)
        order = sorted(header, key=lambda name: _place(header[name]))
        starts = [header[name]["data_offsets"][0] for name in order]
        if starts == sorted(starts) and (8 + length) % ALIGNMENT == 0:
            return
        places: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
        offset = 0
        for name in order:
            first, last = header[name]["data_offsets"]
            places[name] = {**header[name], "data_offsets": [offset, offset + last - first]}
            offset += last - first
        text = json.dumps(places, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        staged = file.with_name(f"{file.name}.aligned")
        with staged.open("xb") as target:
            target.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                first, last = header[name]["data_offsets"]
                source.seek(8 + length + first)
                for done in range(0, last - first, _CHUNK):
                    target.write(source.read(min(_CHUNK, last - first - done)))
    os.chmod(staged, file.stat().st_mode & 0o777)
    staged.replace(file)


def _place(entry: dict[str, Any]) -> tuple[bool, int, int]:
    first, last = entry["data_offsets"]
    count = 1
    for size in entry["shape"]:
        count *= size
    element = (last - first) // max(1, count)
    return (last - first) % ALIGNMENT != 0, -element, first


def realign(model: nn.Module) -> None:
    """Copies float tensors of a mapped model that do not start where torch's own would.

    Of files that `align_file` wrote these are few and small: packed weights are not among them,
    since integer sums do not depend on where they start.
    """
    for module in model.modules():
        tensors: list[Tensor | None] = [*module._parameters.values(), *module._buffers.values()]
        if isinstance(module, QuantizedModule):
            tensors = [module._parameters.get("bias")]
        for tensor in tensors:
            if (
                tensor is not None
                and tensor.is_floating_point()
                and tensor.device.type == "cpu"
                and tensor.numel()
                and tensor.data_ptr() % ALIGNMENT
            ):
                tensor.data = tensor.data.clone()
