"""Weights that were rotated: they compute nothing without the rotation of their inputs."""

from __future__ import annotations

from typing import Any

from bitcore.errors import ConfigError

_WORDS = ("hadamard", "rotation", "quarot", "spinquant")
_NONE = (None, False, 0, "", "none")


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
        if held and any(word in name.lower() for word in _WORDS):
            raise ConfigError(
                f"{op}: {name} must be empty, since BitLab's layers do not rotate their inputs, "
                f"got {value!r:.80}\nRun the checkpoint with the library that made it."
            )
        if isinstance(value, dict):
            check_not_rotated(op, value)
