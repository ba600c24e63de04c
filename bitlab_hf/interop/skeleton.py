"""Models without weights, built from what a file says of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from huggingface_hub.errors import StrictDataclassError

from bitcore.errors import BitLabError, CheckpointError

# What transformers and torch say of values that make no model.
_NO_MODEL = (
    ValueError, RuntimeError, TypeError, LookupError, ArithmeticError, AttributeError,
    StrictDataclassError,
)  # fmt: skip


@contextmanager
def building(source: str, op: str) -> Iterator[None]:
    """Builds models on the meta device; names the source where it describes none.

    Raises:
        CheckpointError: Instead of what transformers or torch say of values that make no model.
    """
    try:
        with torch.device("meta"):
            yield
    except _NO_MODEL as error:
        if isinstance(error, BitLabError):
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{op}: {source} must describe a model, got: {said:.300}\n"
            "It is damaged; fetch or write it again."
        ) from error
