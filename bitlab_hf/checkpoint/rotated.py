"""Weights that were rotated: they compute nothing without the rotation of their inputs.

Asked at each border that a checkpoint's configuration crosses: where transformers is about to load
one into BitLab's layers, where a folder's model is built for a conversion, and of a GGUF file's
metadata.
"""

from __future__ import annotations

from typing import Any

from bitcore.errors import ConfigError

# Not "rotary": position embeddings rotate activations, and every model has them.
_WORDS = ("rotat", "hadamard", "quarot", "spinquant")
_NONE = (None, False, 0, "", "none")
# Names in these are a data set's.
_LABELS = ("id2label", "label2id")


def check_not_rotated(op: str, fields: dict[str, Any]) -> None:
    """Refuses a configuration that says that weights are rotated, at whatever depth.

    Args:
        op: Who asks, for error messages.
        fields: A file's configuration or metadata.

    Raises:
        ConfigError: A field that is named after a rotation holds something.
    """
    for name, value in fields.items():
        held = value not in _NONE and value not in ({}, [])
        if held and any(word in str(name).lower() for word in _WORDS):
            raise ConfigError(
                f"{op}: {name} must be empty, since BitLab's layers do not rotate their inputs, "
                f"got {value!r:.80}\nRun the checkpoint with the library that made it."
            )
        if name in _LABELS:
            continue
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                check_not_rotated(op, inner)
