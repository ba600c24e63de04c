"""The weights of a deployed model from matrices of another format, in one file and proven after."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from torch import Tensor

from bitcore.errors import CheckpointError
from bitlab_hf.checkpoint.headers import LAYERS_KEY, MODEL_NAMES, NAMES_KEY
from bitlab_hf.interop.packed_stream import packed_entries, same_values, write_packed
from bitlab_hf.interop.source import Experts, Source
from bitlab_hf.interop.stream import Entry, StreamWriter
from bitlab_hf.interop.structure import Structure, find_structure, row_blocks

logger = logging.getLogger("bitlab")
_DAMAGED = "\nThe file is damaged; fetch or write it again."
_EXACT = "must have finite scales and codes of -1, 0 and 1"
# From coarse to fine.
_SCHEMES = ("per_tensor", "per_channel", "per_group")
_STORED = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def find_structures(
    op: str, sources: dict[str, Source], names: dict[str, str]
) -> dict[str, Structure]:
    """Finds the structure of each linear layer that is exactly ternary.

    Args:
        op: Who asks, for error messages.
        sources: The tensors by the model's names of them.
        names: The model's name of each linear layer, by its weight's.

    Raises:
        CheckpointError: A matrix that is meant to be ternary is not.
    """
    structures: dict[str, Structure] = {}
    for key in names:
        structure = find_structure(cast(Tensor, sources[key]))
        if structure.scheme is not None:
            structures[key] = structure
        elif sources[key].ternary:
            raise CheckpointError(f"{op}: {key} {_EXACT}, got {structure.label}{_DAMAGED}")
    return structures


def find_expert_structures(
    op: str, sources: dict[str, Source], experts: dict[str, list[str]]
) -> dict[str, Structure]:
    """Finds the structure of each projection of experts of which all matrices are exactly ternary.

    It is the coarsest that holds every matrix of the projection. Experts in floats of which not all
    are ternary stay float, as linear layers do.

    Args:
        op: Who asks, for error messages.
        sources: The tensors by the model's names of them.
        experts: The names of the tensors of each module.

    Raises:
        CheckpointError: A matrix that is meant to be ternary is not.
    """
    structures: dict[str, Structure] = {}
    left: list[str] = []
    for keys in experts.values():
        found = {key: _of_experts(key, cast(Experts, sources[key])) for key in keys}
        inexact = [structure.label for structure in found.values() if structure.scheme is None]
        if not inexact:
            structures |= found
        elif any(sources[key].ternary for key in keys):
            raise CheckpointError(f"{op}: {inexact[0]}{_DAMAGED}")
        left += inexact[:1]
    if left:
        logger.warning("%s: the experts of %d layers stay float: %s", op, len(left), left[0])
    return structures


def _of_experts(key: str, source: Experts) -> Structure:
    """Returns the structure of a projection; of one that is not ternary, what is wrong."""
    schemes: set[tuple[int, int]] = set()
    for expert in range(len(source)):
        parts = source.matrix(expert).parts
        for name, part in zip(("gate", "up") if len(parts) > 1 else ("",), parts, strict=True):
            found = find_structure(cast(Tensor, part))
            if found.scheme is None:
                which = f"{key} of expert {expert}" + (name and f" ({name})")
                return Structure(None, label=f"{which} {_EXACT}, got {found.label}")
            schemes.add((_SCHEMES.index(found.scheme), -(found.group_size or 0)))
    # A coarse structure is a fine one whose scales repeat; small groups are finer than large ones.
    scheme, size = max(schemes)
    return Structure(_SCHEMES[scheme], -size or None)


def write_file(
    op: str,
    target: Path,
    sources: dict[str, Source],
    structures: dict[str, Structure],
    advance: Callable[[int], None],
) -> float:
    """Writes a deployed model's weights, with about a million values in memory at a time.

    Args:
        op: Who asks, for error messages.
        target: The file.
        sources: The tensors by the model's names of them.
        structures: Structure of each that is packed.
        advance: Called with the bytes of the source done.

    Returns:
        The largest relative change of a scale.

    Raises:
        CheckpointError: A float tensor is not finite.
    """
    change = 0.0
    entries: list[Entry] = []
    for key, source in sources.items():
        if key in structures:
            entries += packed_entries(key, source.shape, structures[key])
        else:
            entries.append(Entry(key, _STORED[source.dtype], source.shape))
    # Without BitLab, this key makes a load fail instead of giving random weights.
    entries.append(Entry(next(iter(structures)), "U8", (0,)))
    layers = list(dict.fromkeys(key.rpartition(".")[0] for key in structures))
    metadata = {"format": "pt", LAYERS_KEY: json.dumps(layers), NAMES_KEY: MODEL_NAMES}
    with StreamWriter(target, entries, metadata) as out:
        for key, source in sources.items():
            if key not in structures:
                for block in _blocks(source):
                    part = source[block]
                    if not bool(torch.isfinite(part).all()):
                        raise CheckpointError(
                            f"{op}: {key} must be finite, got NaN or infinity{_DAMAGED}"
                        )
                    out.write(key, part)
            else:
                change = max(change, write_packed(out, key, source, structures[key]))
            advance(source.n_bytes)
    return change


def _blocks(source: Source) -> Iterator[slice]:
    return row_blocks(source.shape[0], math.prod(source.shape[1:]))


def prove_file(target: Path, sources: dict[str, Source], structures: dict[str, Structure]) -> None:
    """Reads what was written back and compares it with the source, value for value.

    Raises:
        CheckpointError: A value differs.
    """
    with safe_open(target, "pt") as written:
        for key, source in sources.items():
            if key in structures:
                same = same_values(written, key, source, structures[key])
            else:
                tensor = written.get_tensor(key)
                same = all(
                    torch.equal(
                        source[part].contiguous().view(torch.uint8),
                        tensor[part].contiguous().view(torch.uint8),
                    )
                    for part in _blocks(source)
                )
            if not same:
                raise CheckpointError(f"{key} must come back as it was, got other values")
