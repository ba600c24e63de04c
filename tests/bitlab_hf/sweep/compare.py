"""Outputs beside outputs, and errors and names in a line."""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor


def equal(got: list[Tensor], want: list[Tensor], tolerance: float) -> bool:
    """Tells whether all tensors are equal within a relative and absolute tolerance; 0: exactly."""
    if len(got) != len(want) or any(g.shape != w.shape for g, w in zip(got, want, strict=True)):
        return False
    return all(
        torch.allclose(g.float(), w.float(), rtol=tolerance, atol=tolerance, equal_nan=True)
        for g, w in zip(got, want, strict=True)
    )


def difference(got: list[Tensor], want: list[Tensor]) -> str:
    """Returns the largest difference, beside the largest value."""
    if len(got) != len(want) or any(g.shape != w.shape for g, w in zip(got, want, strict=True)):
        return "shape"
    pairs = [(g, w) for g, w in zip(got, want, strict=True) if g.numel()]
    worst = max(float((g.float() - w.float()).abs().max()) for g, w in pairs)
    largest = max(float(w.abs().max()) for _, w in pairs)
    return f"{worst:.2g} of {largest:.2g}"


def listed(names: Iterable[str], count: int = 3) -> str:
    """Returns the first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def describe(error: BaseException) -> str:
    """Returns an error in one line, with the place that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{place}"
