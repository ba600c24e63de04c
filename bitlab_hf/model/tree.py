"""The tree of a model's modules: what is in it, under which names, and how one is put in."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import nn

from bitcore.errors import ArgumentError
from bitlayers.base import BitLayerBase
from bitlayers.state import LayerState

Layer = TypeVar("Layer", bound=nn.Module)
# Where a module keeps the hooks that a user registered; a layer that takes its place takes them.
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks",
    "_backward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_is_full_backward_hook",
)  # fmt: skip


@dataclass
class Found(Generic[Layer]):
    """A layer of the model: the module and every name under which it is reachable."""

    module: Layer
    names: list[str] = field(default_factory=list)


def find_modules(model: nn.Module, kind: type[Layer]) -> list[Found[Layer]]:
    """Returns the modules of a kind, each once with all of its names, in order."""
    found: dict[int, Found[Layer]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, kind):
            found.setdefault(id(module), Found(module)).names.append(name)
    return list(found.values())


def aliases_of(model: nn.Module, name: str) -> list[str]:
    """Returns the names of a module in the model and in its family: with and without the prefix.

    A configuration written by a causal language model says ``model.layers.0``; the same layer of
    the base model that is loaded from it is called ``layers.0``.
    """
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix:
        return [name]
    if name.startswith(f"{prefix}."):
        return [name, name.removeprefix(f"{prefix}.")]
    return [name, f"{prefix}.{name}"]


def quantized_layers(model: nn.Module) -> list[Found[BitLayerBase]]:
    """Returns the quantized layers of a model, each once."""
    return find_modules(model, BitLayerBase)


def ternary_modules(model: nn.Module) -> list[Found[LayerState]]:
    """Returns the quantized layers and the ternary embeddings of a model, each once."""
    return find_modules(model, LayerState)


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of another in the tree."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    setattr(parent, child, module)
    if isinstance(parent, nn.TransformerEncoderLayer):
        # Its fast path in eval mode reads the weights itself; 0 turns it off.
        parent.activation_relu_or_gelu = 0


def take_hooks(old: nn.Module, new: nn.Module) -> None:
    """Gives a module the hooks that were registered on the one whose place it takes."""
    for table in _HOOKS:
        # The table itself: whoever removes a hook by its handle removes it here.
        vars(new)[table] = vars(old)[table]


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Returns the model's transformer layers, in order.

    Raises:
        ArgumentError: None were found.
    """
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and any(
            re.search("Layer|Block", type(item).__name__) for item in module
        ):
            return list(module)
    raise ArgumentError(
        f"bitlab: model must have a list of transformer layers, got {type(model).__name__}"
    )
