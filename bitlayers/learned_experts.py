"""Learned scales of latent experts: one Parameter a projection, beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitcore.errors import NonFiniteError
from bitlayers.stack import Stack

_END = "_learned_scale"


def of(module: nn.Module, name: str) -> Tensor | None:
    """Returns the learned scales of a projection's experts, float32, see `Stack.learned_shape`."""
    held: Tensor | None = module._parameters.get(name + _END)
    return held


def names(module: nn.Module) -> list[str]:
    """Returns the names of the Parameters of learned scales."""
    return [
        key for key, one in module._parameters.items() if key.endswith(_END) and one is not None
    ]


def make(module: nn.Module, stacks: Mapping[str, Stack]) -> None:
    """Gives latent experts the scale Parameters that their estimators train, if they do."""
    for name, stack in stacks.items():
        weight = module._parameters[name]
        if stack.learns and weight is not None:
            data = torch.empty(stack.learned_shape, dtype=torch.float32, device=weight.device)
            module.register_parameter(name + _END, nn.Parameter(data, weight.requires_grad))
    reset(module, stacks)


@torch.no_grad()
def reset(module: nn.Module, stacks: Mapping[str, Stack]) -> None:
    """Sets learned scales, where there are any, as their estimators start them for the weights."""
    for name, stack in stacks.items():
        scale, weight = of(module, name), module._parameters.get(name)
        if scale is None or weight is None or scale.is_meta or weight.is_meta:
            continue
        for expert, matrix in enumerate(stack.apart(weight)):
            start = stack.start_scale(stack.oriented(matrix))
            scale[expert] = start.view(stack.learned_shape[1:])


def drop(module: nn.Module, name: str) -> None:
    """Takes a projection's learned scales away, once it is packed or float."""
    module._parameters.pop(name + _END, None)


def check(module: nn.Module, name: str, said: str) -> None:
    """Checks that learned scales can be deployed; those at or below zero act as 1e-5.

    Args:
        module: Who holds them.
        name: The projection.
        said: What messages call it.

    Raises:
        NonFiniteError: An expert's holds NaN or infinity.
    """
    scale = of(module, name)
    if scale is None or bool(torch.isfinite(scale).all()):
        return
    bad = ~torch.isfinite(scale).flatten(1).all(1)
    raise NonFiniteError(
        f"deploy: {said}{_END} must be finite, got NaN or infinity in expert "
        f"{int(bad.nonzero()[0])}; nothing changed\nTrain with a lower learning rate."
    )


def exact_values(module: nn.Module) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Returns the values and gradients of scales, learned and packed ones, before a cast."""
    scales = {
        **{key: one for key, one in module._parameters.items() if key.endswith(_END)},
        **{key: one for key, one in module._buffers.items() if key.endswith("_qweight_scale")},
    }
    return {key: (one.data, one.grad) for key, one in scales.items() if one is not None}


def keep_exact(module: nn.Module, before: Mapping[str, tuple[Tensor, Tensor | None]]) -> None:
    """Gives scales what they had before a cast: ``.to(bfloat16)`` moves them, but must not round
    them.
    """
    for key, (values, gradient) in before.items():
        scale = module._parameters.get(key, module._buffers.get(key))
        if scale is None or scale.dtype == torch.float32:
            continue
        if key in module._buffers:
            module._buffers[key] = values.to(scale.device)
        else:
            scale.data = values.to(scale.device)
            scale.grad = None if gradient is None else gradient.to(scale.device)


def start_missing(
    module: nn.Module, stacks: Mapping[str, Stack], prefix: str, missing: list[Any]
) -> None:
    """Starts the scales that a float state dict cannot have from the weights just loaded."""
    lacking = {name: stack for name, stack in stacks.items() if f"{prefix}{name}{_END}" in missing}
    for name in lacking:
        missing.remove(f"{prefix}{name}{_END}")
    reset(module, lacking)
