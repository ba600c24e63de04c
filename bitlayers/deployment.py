"""What a custom layer's own packing leaves behind, held until a whole model can be deployed; and
layers with empty tensors, for a loader to fill.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bitlayers.state import LayerState, Packed

_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


@dataclass(frozen=True)
class Registered:
    """The fields of a module at one moment: parameters, buffers, modules, attributes."""

    fields: dict[str, Any]

    @classmethod
    def of(cls, module: nn.Module) -> Registered:
        """Returns what a module has registered; no tensor is copied."""
        fields = vars(module)
        return cls({**fields, **{name: fields[name].copy() for name in _TABLES}})

    def restore(self, module: nn.Module) -> None:
        """Gives a module these fields, and no others."""
        fields = vars(module)
        # The tables stay the same objects: others may hold them.
        tables = {name: fields[name] for name in _TABLES}
        for name, table in tables.items():
            table.clear()
            table.update(self.fields[name])
        fields.clear()
        fields.update({**self.fields, **tables})


# What deploying a layer takes: its packed tensors, or all that it registered itself.
Deployment = Packed | Registered


def expect_own(
    layer: LayerState, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> None:
    """Makes a packed skeleton that of a layer that packed itself, for a loader to fill.

    Args:
        layer: The skeleton.
        tensors: dtype and shape of each tensor that the layer's file holds, by its name.
    """
    device = layer.qweight.device
    for table in (layer._parameters, layer._buffers):
        table.update(dict.fromkeys(table.keys() - tensors.keys()))
    for name, (dtype, shape) in tensors.items():
        owner, _, leaf = name.rpartition(".")
        module = layer.get_submodule(owner)
        if module._parameters.get(leaf) is None:
            module._parameters.pop(leaf, None)
            module.register_buffer(leaf, torch.empty(shape, dtype=dtype, device=device))
    layer.packs_itself = True


def meta_twin(layer: LayerState) -> Any:
    """Returns another such layer on the meta device, in a fifth of the time that
    ``packed_skeleton`` takes: a model has hundreds of layers and a handful of kinds.

    Args:
        layer: One on the meta device that holds no modules, and that nobody has hooked.
    """
    twin = type(layer).__new__(type(layer))
    for name, value in vars(layer).items():
        twin.__dict__[name] = value.copy() if isinstance(value, dict | set) else value
    for name, parameter in layer._parameters.items():
        if parameter is not None:
            # There is no memory that the two could share.
            own = nn.Parameter(parameter.detach(), parameter.requires_grad)
            twin._parameters[name] = own
    for name, buffer in layer._buffers.items():
        twin._buffers[name] = None if buffer is None else buffer.detach()
    return twin
