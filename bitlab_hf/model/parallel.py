"""Tensor parallel is refused before anything is loaded or trained."""

from __future__ import annotations

from typing import Any

from bitcore.errors import ArgumentError


def check_no_tensor_parallel(op: str, distributed: Any) -> None:
    """Checks that no layer is to be split between devices.

    The scale of a split latent weight would be that of a part of it, and rows of packed weights
    lie four to a byte: both would give wrong numbers without an error.

    Args:
        op: Who asks, for the message.
        distributed: transformers' DistributedConfig, accelerate's ParallelismConfig, or None.

    Raises:
        ArgumentError: Its tp_size is above 1.
    """
    size = getattr(distributed, "tp_size", None) or 1
    if size > 1:
        raise ArgumentError(
            f"{op}: tp_size must be 1, got {size} (tp_plan='auto' sets it to the number of "
            "processes)\nTernary layers cannot be split: train with DDP or FSDP2, run with "
            "device_map."
        )
