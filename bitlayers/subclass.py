"""Classes that add ternary experts to a model's own class, made as they are needed."""

from __future__ import annotations

from torch import nn

_CLASSES: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def ternary_class(form: type[nn.Module], kind: type[nn.Module]) -> type[nn.Module]:
    """Returns the subclass of a model's experts class that lives and runs as ``form`` does."""
    if (form, kind) not in _CLASSES:
        fields = {"__module__": form.__module__, "__doc__": form.__doc__}
        _CLASSES[form, kind] = type(f"Bit{kind.__name__}", (form, kind), fields)
    return _CLASSES[form, kind]


def blank(form: type[nn.Module], kind: type[nn.Module]) -> nn.Module:
    """Returns one without any fields, for copy and pickle to fill."""
    ternary = ternary_class(form, kind)
    return ternary.__new__(ternary)
