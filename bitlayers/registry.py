"""The layers that a configuration can name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from bitcore.errors import ArgumentError, ArgumentTypeError
from bitlayers.base import BitLayerBase

LayerClass = TypeVar("LayerClass", bound=type[BitLayerBase])

LAYER_REGISTRY: dict[str, type[BitLayerBase]] = {}


def register_layer(name: str) -> Callable[[LayerClass], LayerClass]:
    """Registers a layer class, so that ``BitLabConfig(layer=name)`` uses it.

    Registering the same class again under its name changes nothing.

    Args:
        name: The name, not empty.

    Raises:
        ArgumentTypeError: The decorated object is not a subclass of `BitLayerBase`.
        ArgumentError: The name is empty or belongs to another class.
    """
    if not isinstance(name, str) or not name:
        raise ArgumentError(f"register_layer: name must be a non-empty string, got {name!r}")

    def register(layer: LayerClass) -> LayerClass:
        if not (isinstance(layer, type) and issubclass(layer, BitLayerBase)):
            raise ArgumentTypeError(
                f"register_layer: {name!r} must be a subclass of BitLayerBase, got {layer!r}"
            )
        held = LAYER_REGISTRY.get(name)
        if held is not None and (held.__module__, held.__qualname__) != (
            layer.__module__,
            layer.__qualname__,
        ):
            raise ArgumentError(
                f"register_layer: {name!r} must be a free name, got one that belongs to "
                f"{held.__module__}.{held.__qualname__}"
            )
        LAYER_REGISTRY[name] = layer
        return layer

    return register


def get_layer(name: str) -> type[BitLayerBase]:
    """Returns the class registered under a name.

    Raises:
        ArgumentError: No class is; the message names `register_layer`.
    """
    if name not in LAYER_REGISTRY:
        raise ArgumentError(
            f"bitlab: layer must be one of {sorted(LAYER_REGISTRY)}, got {name!r}\n"
            f'Import the module that defines it, with @register_layer("{name}") on the class.'
        )
    return LAYER_REGISTRY[name]
