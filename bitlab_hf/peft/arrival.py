"""Acts on another library's module when it has been imported, and not before.

Importing PEFT or TRL costs more than importing BitLab, and neither has a hook for what is done
here.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def when_imported(name: str, action: Callable[[Any], None]) -> None:
    """Calls ``action(module)`` once the module of this name has been executed: now if it has been.

    A module that is asked for again changes nothing: the first action stays.
    """
    module = sys.modules.get(name)
    if module is not None:
        action(module)
    elif not any(isinstance(finder, _Finder) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(name, action))


class _Finder:
    """Finds nothing itself: it acts when its module has been executed, and leaves."""

    def __init__(self, name: str, action: Callable[[Any], None]) -> None:
        self.name = name
        self._action = action
        self._asking = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                # The instance's attribute hides the method until now.
                del loader.exec_module
                execute(module)
                # Only now: whoever merely asks whether there is such a module gets a spec too.
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                self._action(module)

            loader.exec_module = exec_module
        return spec
