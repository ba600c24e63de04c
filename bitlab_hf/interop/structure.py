"""Whether a float matrix is exactly ternary, and in what structure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_BLOCK = 2**20
# The least scale of BitNet's quantizer; stands where all values are zero.
LEAST = 1e-5


@dataclass(frozen=True)
class Structure:
    """What `find_structure` found.

    Attributes:
        scheme: ``"per_tensor"``, ``"per_channel"``, ``"per_group"``; None if it is not exactly
            ternary in any of them.
        group_size: 128 or 64 with ``"per_group"``, else None.
        scale: The scale of the matrix with ``"per_tensor"``, else None.
        label: The same in words; if it is not ternary, by how much.
        two_levels: Whether scales of groups are to be kept as multipliers of one a row.
    """

    scheme: str | None
    group_size: int | None = None
    scale: float | None = None
    label: str = ""
    two_levels: bool = False

    def kept_as(self, group_scale_dtype: str) -> Structure:
        """Returns the structure with scales of groups kept as ``"float32"`` or ``"uint8"``."""
        grouped = self.group_size is not None
        return replace(self, two_levels=grouped and group_scale_dtype == "uint8")

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Returns the shape of the scales: [1], [N] or [N, K / G]."""
        if self.group_size is not None:
            return (out_features, in_features // self.group_size)
        return (1,) if self.scheme == "per_tensor" else (out_features,)


def row_blocks(out_features: int, in_features: int) -> Iterator[slice]:
    """Yields slices of rows that hold about a million values each."""
    step = max(1, _BLOCK // in_features)
    for start in range(0, out_features, step):
        yield slice(start, min(start + step, out_features))


def find_structure(weight: Tensor) -> Structure:
    """Finds the coarsest structure in which every value is exactly 0 or plus or minus one scale.

    Args:
        weight: float [N, K]; read in blocks of rows.
    """
    in_features = weight.shape[1]
    sizes = [size for size in (128, 64) if in_features % size == 0]
    # Widths of groups that are still possible, from coarse to fine.
    widths = list(dict.fromkeys([in_features, *sizes]))
    scales: set[float] = set()
    off, worst = 0, 0.0
    for rows in row_blocks(*weight.shape):
        values = weight[rows].float().abs()
        for width in list(widths):
            grouped = values.view(-1, width)
            scale = grouped.amax(-1, keepdim=True)
            exact = ((grouped == 0) | (grouped == scale)).all() & torch.isfinite(scale).all()
            if not bool(exact) and width != widths[-1]:
                widths.remove(width)
            elif not bool(exact):
                count, distance = _distance(grouped)
                off, worst = off + count, max(worst, distance)
            else:
                if width == in_features:
                    scales.update(scale[scale > 0].unique().tolist()[:2])
                # What is exact in a group is exact in its parts.
                break
    if off or not widths:
        group = "row" if widths[-1] == in_features else f"group of {widths[-1]}"
        return Structure(
            None,
            label=f"{off} values ({off / weight.numel():.2%}) that are neither 0 nor the largest "
            f"of their {group}, but up to {worst:.3g} of it away",
        )
    width = widths[0]
    if width != in_features:
        return Structure("per_group", width, label=f"per group of {width}")
    if len(scales) <= 1:
        return Structure("per_tensor", None, next(iter(scales), LEAST), "per tensor")
    return Structure("per_channel", label="per channel")


def _distance(grouped: Tensor) -> tuple[int, float]:
    """Returns how many values are neither 0 nor the scale, and how far the worst is, in scales."""
    finite = torch.isfinite(grouped)
    values = grouped.where(finite, 0.0)
    scale = values.amax(-1, keepdim=True)
    nearest = torch.where(values > scale / 2, scale, 0.0)
    # 0 / 0 where a whole group is zero; what is not finite is as far off as can be.
    distance = ((values - nearest).abs() / scale).nan_to_num(0.0).where(finite, 1.0)
    return int((distance > 0).sum()), float(distance.max())


def scales_of(rows: Tensor, structure: Structure) -> Tensor:
    """Returns the scales of a block of rows, float32 [rows, groups].

    Args:
        rows: float [rows, K].
        structure: ``"per_channel"`` or ``"per_group"``; a ``"per_tensor"`` one holds its scale.
    """
    groups = rows.float().abs().view(len(rows), -1, structure.group_size or rows.shape[1])
    scale = groups.amax(-1)
    return torch.where(scale > 0, scale, LEAST)
