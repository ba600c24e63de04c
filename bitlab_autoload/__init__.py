"""Makes transformers know BitLab's checkpoints where nobody imports BitLab.

``import torch`` calls `install` through the entry point group ``torch.backends``. It costs next to
nothing there: transformers' table of quantization methods gets a placeholder when that table comes
into being, and BitLab itself is imported when a checkpoint of its kind is loaded. Registering the
real classes at once was rejected: they need ``transformers.modeling_utils``, which is half imported
at that moment, and would cost every user of transformers BitLab's import.

``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` turns it off; ``import bitlab_hf`` then registers the format. A
package of its own, because an entry point imports the whole package it points into.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

METHOD = "bitlab"
_TABLE = "transformers.quantizers.auto"
# Torch can be imported from within the first of them, whose end is then not seen; models cannot be
# loaded without the second.
_WATCHED = (_TABLE, "transformers.modeling_utils")


class Placeholder:
    """Stands in transformers' table for BitLab's configuration until one is read."""

    @classmethod
    def from_dict(cls, config: dict[str, Any], **kwargs: Any) -> Any:
        """Imports BitLab, which registers itself, and reads the configuration."""
        from bitlab_hf import BitLabConfig

        return BitLabConfig.from_dict(config, **kwargs)


class Finder:
    """Lets the other finders find the watched modules, and acts when they have been executed.

    It finds nothing itself, and leaves ``sys.meta_path`` as soon as the placeholder is in its
    place.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns what the other finders return for a watched name, None for any other."""
        if name not in _WATCHED:
            return None
        try:
            for finder in sys.meta_path:
                spec = None if finder is self else finder.find_spec(name, path, target)
                if spec is not None:
                    _call_after(spec.loader, self._act)
                    return spec
        except Exception:
            _log()
        return None

    def _act(self) -> None:
        if place() and self in sys.meta_path:
            sys.meta_path.remove(self)


def install() -> None:
    """Puts the placeholder in its place, now or when transformers is imported; never raises."""
    try:
        if not place() and not any(isinstance(finder, Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, Finder())
    except Exception:
        _log()


def place() -> bool:
    """Puts the placeholder into transformers' table; tells whether there is such a table yet."""
    table = getattr(sys.modules.get(_TABLE), "AUTO_QUANTIZATION_CONFIG_MAPPING", None)
    if table is None:
        return False
    table.setdefault(METHOD, Placeholder)
    return True


def _call_after(loader: Any, action: Any) -> None:
    """Makes a module's loader call the action once, when it has executed the module."""
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        # The instance's attribute hides the method until now; the loader stays what it was.
        del loader.exec_module
        execute(module)
        try:
            action()
        except Exception:
            _log()

    loader.exec_module = exec_module


def _log() -> None:
    import logging

    logging.getLogger("bitlab").warning(
        "bitlab: transformers was not told of BitLab; import bitlab_hf before loading its "
        "checkpoints",
        exc_info=True,
    )
