"""The names of a package, imported with it, or when they are asked for: by the command ``bitlab``.

torch and transformers take seconds to import, which a shell's completion does not have. In a
process of the command (`bitlab_autoload.command.main`) all that runs is BitLab's own, and imports
what it uses. Anywhere else users count on what importing BitLab does: it registers
``torch.ops.bitlab``, and makes transformers, PEFT and TRL know it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def is_command() -> bool:
    """Tells whether this process is one of the command."""
    return getattr(sys.modules.get("bitlab_autoload.command"), "runs", False)


def attach(package: str) -> Callable[[str], Any]:
    """Gives a package the names of its module ``api``, now or when one of them is asked for.

    Args:
        package: Its ``__name__``.

    Returns:
        The package's ``__getattr__`` (PEP 562).
    """

    def fill() -> dict[str, Any]:
        api, names = import_module(f"{package}.api"), vars(sys.modules[package])
        names.update({name: getattr(api, name) for name in ("__all__", *api.__all__)})
        return names

    def find(name: str) -> Any:
        # Python asks here, too, before it looks for a module in `from package import module`.
        is_name = name.isidentifier() and not name.startswith("__")
        if is_name and find_spec(f"{package}.{name}") is not None:
            return import_module(f"{package}.{name}")
        if (is_name or name == "__all__") and name in (names := fill()):
            return names[name]
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    if not is_command():
        fill()
    return find
