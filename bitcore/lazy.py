"""The names of a package, imported with it, or when they are asked for: by the command ``bitlab``.

torch and transformers take seconds to import, which a shell's completion does not have. In a
process of the command (`bitlab_autoload.command`) all that runs is BitLab's own, and imports what
it uses. Anywhere else users count on what importing BitLab does: it registers ``torch.ops.bitlab``,
and makes transformers, PEFT and TRL know it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

_COMMAND = "bitlab_autoload.command"


def attach(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Imports the module ``api`` of a package, now or when one of its names is asked for.

    Args:
        package: Its ``__name__``.

    Returns:
        The package's ``__getattr__`` and ``__dir__`` (PEP 562).
    """

    def find(name: str) -> Any:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        # Python asks here before it looks for a module in `from package import module`.
        if find_spec(f"{package}.{name}") is not None:
            return import_module(f"{package}.{name}")
        return getattr(import_module(f"{package}.api"), name)

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *find("__all__")})

    if _COMMAND not in sys.modules:
        import_module(f"{package}.api")
    return find, names
