"""What every format asks of a model: that each module is one that it can hold, or a plain one."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from bitcore.errors import ArgumentError
from bitlayers.base import BitLayerBase
from bitlayers.experts import BitExperts


def check_modules(
    op: str, model: nn.Module, holds: Callable[[nn.Module], bool], alternatives: str
) -> None:
    """Checks that a format can hold every quantized module.

    Args:
        op: Who asks, for error messages.
        model: The model.
        holds: Tells whether the format holds a quantized module.
        alternatives: The message's last line.

    Raises:
        ArgumentError: It cannot hold one, which is named, or an adapter is around one.
    """
    for name, module in model.named_modules():
        tensors: dict[str, Tensor | None] = {**module._parameters, **module._buffers}
        quantized = (
            isinstance(module, BitLayerBase | BitExperts) or tensors.get("qweight") is not None
        )
        if (quantized and not holds(module)) or hasattr(module, "base_layer"):
            raise ArgumentError(
                f"{op}: {name} must be a BitLinear or a plain module, got "
                f"{type(module).__name__}{alternatives}"
            )
