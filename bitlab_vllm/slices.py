"""One process's part of a stored matrix, and several such parts packed as one.

vLLM multiplies queries, keys and values as one matrix, and with tensor parallelism gives each
process some of its rows or columns. The packed format interleaves rows in fours of different
quarters, so rows are cut out and joined as codes, and packed again, once, while loading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bitcore.across import filled_up
from bitcore.config import BitQuantConfig
from bitcore.errors import CheckpointError, ConfigError
from bitcore.ops import has_invalid_code
from bitcore.packing import pack_codes, unpack_ternary

_DAMAGED = "The file is damaged; fetch or write it again."


@dataclass(frozen=True)
class Slice:
    """What one process has of a stored matrix [N, K].

    Attributes:
        name: The layer's name in the checkpoint, for messages.
        shape: N and K as stored.
        rows: Ranges of rows, in the order in which they are multiplied.
        columns: The range of columns.
        padding: Rows of zeros behind them.
    """

    name: str
    shape: tuple[int, int]
    rows: tuple[tuple[int, int], ...]
    columns: tuple[int, int]
    padding: int = 0

    @property
    def count(self) -> int:
        """The number of rows, padding included."""
        return sum(stop - start for start, stop in self.rows) + self.padding

    @property
    def is_spread(self) -> bool:
        """Whether other processes have other columns of the same rows."""
        return self.columns != (0, self.shape[1])

    def take_rows(self, stored: Tensor) -> Tensor:
        """Returns the rows of a tensor [N, ...], padded with zeros."""
        taken = torch.cat([stored[start:stop] for start, stop in self.rows])
        return F.pad(taken, (0, 0) * (taken.dim() - 1) + (0, self.padding))


def output_slices(
    names: Sequence[str],
    columns: int,
    sizes: Sequence[int],
    copies: Sequence[int],
    rank: int,
    processes: int,
) -> list[Slice]:
    """What one process has of the stored layers whose rows are spread over processes.

    Args:
        names: The stored layers: one for each of vLLM's parts, or one that holds all of them.
        columns: Their number of inputs.
        sizes: Rows of each part in one process.
        copies: By how many processes each row of a part is held.
        rank: Which process.
        processes: How many there are.

    Raises:
        CheckpointError: There are neither as many stored layers as parts, nor one.
    """
    wholes = [size * processes // many for size, many in zip(sizes, copies, strict=True)]
    starts = [rank // many * size for size, many in zip(sizes, copies, strict=True)]
    if len(names) == 1:
        starts = [sum(wholes[:at]) + start for at, start in enumerate(starts)]
        rows = tuple((start, start + size) for start, size in zip(starts, sizes, strict=True))
        return [Slice(names[0], (sum(wholes), columns), rows, (0, columns))]
    if len(names) != len(sizes):
        raise CheckpointError(
            f"bitlab: layers that vLLM fuses must be one or {len(sizes)}, got {list(names)}"
        )
    return [
        Slice(name, (whole, columns), ((start, start + size),), (0, columns))
        for name, whole, start, size in zip(names, wholes, starts, sizes, strict=True)
    ]


@dataclass(frozen=True)
class Codes:
    """Codes with their scales: ternary ones, not yet packed, or int8 ones.

    Attributes:
        codes: int8 [n, k].
        scale: float32 [n], or [n, k / G].
        multiplier: uint8 [n, k / G], or None.
    """

    codes: Tensor
    scale: Tensor
    multiplier: Tensor | None

    @property
    def columns(self) -> tuple[int, int]:
        """How many scales and how many multipliers a row has: what can be joined has the same."""
        return (
            self.scale.shape[1] if self.scale.dim() == 2 else 0,
            0 if self.multiplier is None else self.multiplier.shape[1],
        )


def take(part: Slice, config: BitQuantConfig, tensors: dict[str, Tensor]) -> Codes:
    """Cuts a process's part out of a layer's stored tensors.

    Args:
        part: Which rows and columns.
        config: How the layer is quantized.
        tensors: ``qweight`` uint8 [ceil(N / 4), K], ``qweight_scale`` float32 [1], [N] or
            [N, K / G], and ``qweight_multiplier`` uint8 [N, K / G] where there are two levels.

    Raises:
        CheckpointError: A tensor is missing, has another shape or dtype, or holds values that no
            writer gives.
        ConfigError: The columns end within a group.
    """
    rows, columns = part.shape
    per_tensor = config.granularity == "per_tensor"
    check_stored(f"{part.name}.", layout(config, (rows,), columns, per_tensor), tensors)
    start, stop = part.columns
    qweight = tensors["qweight"][:, start:stop].contiguous()
    codes = part.take_rows(unpack_ternary(qweight, rows))
    scale = tensors["qweight_scale"]
    if per_tensor:
        scale = scale.expand(rows)
    if config.group_size is None:
        return Codes(codes, part.take_rows(scale), None)
    if config.granularity == "per_group":
        multiplier = part.take_rows(_group_columns(part, config, tensors["qweight_multiplier"]))
        return Codes(codes, part.take_rows(scale), multiplier)
    return Codes(codes, part.take_rows(_group_columns(part, config, scale)), None)


def take_int8(part: Slice, tensors: dict[str, Tensor]) -> Codes:
    """Cuts a process's part out of an int8 layer's stored tensors.

    Args:
        part: Which rows and columns.
        tensors: ``qweight`` int8 [N, K] and ``qweight_scale`` float32 [N].

    Returns:
        Codes as they are multiplied: of a spread part with the columns of zeros that
        `bitcore.across.across_int8` wants.

    Raises:
        CheckpointError: A tensor is missing, has another shape or dtype, or holds values that no
            writer gives.
    """
    rows, columns = part.shape
    wanted = {"qweight": (torch.int8, [rows, columns]), "qweight_scale": (torch.float32, [rows])}
    check_stored(f"{part.name}.", wanted, tensors)
    start, stop = part.columns
    codes = part.take_rows(tensors["qweight"][:, start:stop])
    codes = filled_up(codes) if part.is_spread else codes
    return Codes(codes, part.take_rows(tensors["qweight_scale"]), None)


def _group_columns(part: Slice, config: BitQuantConfig, groups: Tensor) -> Tensor:
    """Returns the columns of scales or multipliers [N, K / G] that belong to a part's inputs.

    A group of 128 that is cut in the middle becomes two of 64 with the same scale.
    """
    size = config.group_size or 0
    start, stop = part.columns
    if size == 128 and (start % size or stop % size):
        groups, size = groups.repeat_interleave(2, 1), 64
    if start % size or stop % size:
        raise ConfigError(
            f"bitlab: tensor_parallel_size must give each process whole groups of 64 inputs of "
            f"{part.name}, got {part.shape[1]} inputs over {part.shape[1] // (stop - start)} "
            "processes\nUse fewer processes."
        )
    return groups[:, start // size : stop // size].contiguous()


def layout(
    config: BitQuantConfig, rows: tuple[int, ...], columns: int, one_scale: bool = False
) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Returns dtype and shape of each tensor of stored matrices, by the end of its name.

    Args:
        config: How they are quantized.
        rows: N, or E and N of the matrices of E experts.
        columns: K.
        one_scale: Whether a matrix has one scale in all, and not one a row or group.
    """
    *several, count = rows
    groups = columns // (config.group_size or columns)
    two_levels = config.granularity == "per_group"
    by_group = [*rows, groups]
    scale = by_group if config.group_size and not two_levels else list(rows)
    found = {
        "qweight": (torch.uint8, [*several, (count + 3) // 4, columns]),
        "qweight_scale": (torch.float32, [*several, 1] if one_scale else scale),
    }
    return found | ({"qweight_multiplier": (torch.uint8, by_group)} if two_levels else {})


def check_stored(
    stem: str, wanted: Mapping[str, tuple[torch.dtype, list[int]]], tensors: Mapping[str, Tensor]
) -> None:
    """Checks the tensors of stored matrices.

    Args:
        stem: What the names of the tensors begin with.
        wanted: See `layout`.
        tensors: By the ends of their names.

    Raises:
        CheckpointError: One is missing, has another shape or dtype, or holds values that no writer
            gives.
    """
    for leaf, (dtype, shape) in wanted.items():
        found = tensors.get(leaf)
        if found is None:
            raise CheckpointError(f"{stem}{leaf} must be in the checkpoint, got none\n{_DAMAGED}")
        if found.dtype != dtype or list(found.shape) != shape:
            raise CheckpointError(
                f"{stem}{leaf} must be {dtype} {shape}, got {found.dtype} {list(found.shape)}\n"
                f"{_DAMAGED}"
            )
    qweight = tensors["qweight"]
    if qweight.dtype == torch.int8:
        if int(qweight.min()) == -128:
            raise CheckpointError(f"{stem}qweight must be from -127 to 127, got -128\n{_DAMAGED}")
    elif has_invalid_code(qweight):
        raise CheckpointError(f"{stem}qweight must hold the codes 0, 1 and 2, got 3\n{_DAMAGED}")
    scale = tensors["qweight_scale"]
    if not bool(((scale > 0) & torch.isfinite(scale)).all()):
        raise CheckpointError(
            f"{stem}qweight_scale must be finite and positive, got other values\n{_DAMAGED}"
        )
    multiplier = tensors.get("qweight_multiplier")
    if multiplier is not None and int(multiplier.max()) > 127:
        raise CheckpointError(
            f"{stem}qweight_multiplier must be from 0 to 127, got {int(multiplier.max())}\n"
            f"{_DAMAGED}"
        )


def join(parts: Sequence[Codes]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Packs parts that have the same number of scales a row as one matrix.

    Returns:
        qweight uint8 [ceil(n / 4), k], its scale float32 [n] or [n, k / G], and multipliers
        uint8 [n, k / G] or None.
    """
    multipliers = [one.multiplier for one in parts if one.multiplier is not None]
    return (
        pack_codes(torch.cat([one.codes for one in parts])),
        torch.cat([one.scale for one in parts]).contiguous(),
        torch.cat(multipliers) if multipliers else None,
    )
