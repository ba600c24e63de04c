"""Facts of a model that its weights do not show, kept in a file beside them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from bitcore.config import check_fields
from bitcore.errors import ArgumentError, CheckpointError
from bitlab_hf.checkpoint.atomic import write_atomically
from bitlab_hf.checkpoint.files import FACTS_FILE, read_json


@dataclass(frozen=True)
class Facts:
    """What a model's files do not show by themselves, for its card; written as it is given.

    Args:
        base_model: The model that it was made from, by its name on the hub.
        recipe: How it was trained: a name of `RECIPES` and what differs from it, say.
        data: What it was trained on.
        perplexities: Of which text, and what it is; each measured on this model or, where the
            key says so, on another.
        speeds: What was measured where, and tokens a second.

    Raises:
        ArgumentError: A field has another type, or a figure is not above 0.
    """

    base_model: str | None = None
    recipe: str | None = None
    data: str | None = None
    perplexities: Mapping[str, float] = field(default_factory=dict)
    speeds: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("base_model", "recipe", "data"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ArgumentError(f"Facts: {name} must be a text or None, got {value!r}")
        for name in ("perplexities", "speeds"):
            for key, value in dict(getattr(self, name)).items():
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                if not isinstance(key, str) or not number or not 0 < value <= sys.float_info.max:
                    raise ArgumentError(
                        f"Facts: {name} must hold finite numbers above 0 by a text, "
                        f"got {key!r}: {value!r}"
                    )

    def merged(self, newer: Facts) -> Facts:
        """Returns these facts with another's, which win."""
        values: dict[str, Any] = {}
        for name in (entry.name for entry in fields(self)):
            old, new = getattr(self, name), getattr(newer, name)
            values[name] = {**old, **new} if isinstance(old, Mapping) else new or old
        return Facts(**values)

    def handed_down(self, *, computes_same: bool) -> Facts | None:
        """Returns those that are true of a model made from this one too; None if there are none.

        How this one was made stays so; how fast it is does not.

        Args:
            computes_same: Whether the other model's results are this one's, and with them its
                perplexities.
        """
        kept = replace(self, perplexities=self.perplexities if computes_same else {}, speeds={})
        return kept if kept != Facts() else None

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes them into a model's folder, in one step."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        write_atomically(Path(directory) / FACTS_FILE, text)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Facts:
        """Returns what a model's folder holds of them.

        Raises:
            CheckpointError: The file is damaged.
        """
        file = Path(directory) / FACTS_FILE
        if not file.exists():
            return cls()
        values = read_json(file)
        try:
            check_fields(cls, values)
            return cls(**values)
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"Facts: {file} must hold what Facts.save wrote, got: {error}\nRemove it."
            ) from error
