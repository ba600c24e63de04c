"""Conditions in a model's source that its own settings decide: branches that are dead in it."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Is: operator.is_, ast.IsNot: operator.is_not,
}  # fmt: skip
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Guard:
    """A test that a line of source stands behind, and what it has to come out as."""

    test: ast.expr
    wanted: bool

    def holds(self, module: nn.Module) -> bool:
        """Tells whether the line can be reached in a module; so it is where nobody can tell."""
        found = _truth(self.test, module)
        return found is None or found == self.wanted


def guards_of(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> tuple[Guard, ...]:
    """Returns the tests of the ``if`` statements around a node of a function."""
    found = []
    while (parent := parents.get(node)) is not None:
        if isinstance(parent, ast.If) and node is not parent.test:
            found.append(Guard(parent.test, node in parent.body))
        node = parent
    return tuple(found)


def _truth(test: ast.expr, module: nn.Module) -> bool | None:
    """Returns what a test comes out as by a module's settings; None where it depends on more."""
    if isinstance(test, ast.BoolOp):
        parts = [_truth(part, module) for part in test.values]
        decisive = isinstance(test.op, ast.Or)
        if decisive in parts:
            return decisive
        return None if None in parts else not decisive
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        inner = _truth(test.operand, module)
        return None if inner is None else not inner
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        compare = _COMPARISONS.get(type(test.ops[0]))
        sides = [_setting(side, module) for side in (test.left, test.comparators[0])]
        if compare is None or () in sides:
            return None
        try:
            return bool(compare(*(side[0] for side in sides)))
        except TypeError:
            return None
    held = _setting(test, module)
    return bool(held[0]) if held else None


def _setting(node: ast.expr, module: nn.Module) -> tuple[Any, ...]:
    """Returns the plain value of a constant, or of an attribute of ``self``; nothing of others."""
    if isinstance(node, ast.Constant):
        return (node.value,)
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    # The mode is no setting.
    if not isinstance(node, ast.Name) or node.id != "self" or not names or "training" in names:
        return ()
    value: Any = module
    for name in reversed(names):
        value = getattr(value, name, module)
    return (value,) if isinstance(value, _PLAIN) else ()
