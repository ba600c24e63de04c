"""Which layers' weights a model reads itself, from the source of its classes.

A layer is converted on the understanding that it is called. A model that multiplies with
``self.dt_proj.weight``, hands it to a fused kernel or rescales it in place would compute with the
float weight in training and with another one once it is packed. The source says so beforehand: in
what a class's ``forward`` and public methods reach among its methods, every ``.weight`` of a
submodule is looked up, and what is made of it. Its dtype, device and shape may be asked for.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from bitlab_hf.model.guards import Guard, guards_of

# Asked of a weight, they do not depend on its values.
_HARMLESS = {
    "device", "dim", "dtype", "element_size", "is_contiguous", "is_cuda", "is_floating_point",
    "is_meta", "ndim", "numel", "requires_grad", "shape", "size",
}  # fmt: skip
_HARMLESS_CALLS = {"hasattr", "id", "isinstance", "type", "getattr"}
# Their sources say nothing of a model's layers.
_LIBRARIES = ("torch.", "transformers.modeling_utils", "transformers.generation", "builtins")
# They run when a model is made, resized or saved.
_NOT_CALLED = {*dir(PreTrainedModel), "reset_parameters"}


_Paths = dict[tuple[str, ...], list[tuple[Guard, ...]]]


@dataclass
class Reads:
    """What a class reads of the weights of modules below it.

    Attributes:
        values: Paths from a module of the class to modules whose values it reads; ``*`` stands for
            any item of a list. A path that starts with ``?`` ends so, from anywhere below. With
            each of them the tests behind which it is read, once for each place.
        dtypes: The same of modules whose weight's dtype it reads.
    """

    values: _Paths = field(default_factory=dict)
    dtypes: _Paths = field(default_factory=dict)


def find_reads(model: nn.Module) -> tuple[set[str], set[str]]:
    """Returns the names of modules of which the model reads the weight's values, and its dtype."""
    modules = dict(model.named_modules(remove_duplicate=False))
    values: set[str] = set()
    dtypes: set[str] = set()
    for name, module in modules.items():
        kind: Any = type(module)
        reads = reads_of(kind)
        for paths, into in ((reads.values, values), (reads.dtypes, dtypes)):
            for path, places in paths.items():
                if any(all(guard.holds(module) for guard in place) for place in places):
                    into.update(_matching(modules, name, path))
        if isinstance(module, PreTrainedModel):
            # What `model.dtype` is taken from.
            parameters = module.named_parameters()
            first = next((key for key, one in parameters if one.is_floating_point()), "")
            dtypes.add(".".join(filter(None, (name, first.rpartition(".")[0]))))
    return values, dtypes


def _matching(modules: dict[str, nn.Module], base: str, path: tuple[str, ...]) -> Iterator[str]:
    prefix = f"{base}." if base else ""
    if "*" not in path and path[0] != "?":
        name = prefix + ".".join(path)
        if name in modules:
            yield name
        return
    anywhere, parts = path[0] == "?", path[1:] if path[0] == "?" else path
    for name in modules:
        if name.startswith(prefix) and name != base:
            own = name.removeprefix(prefix).split(".")
            own = own[-len(parts) :] if anywhere else own
            if len(own) == len(parts) and all(
                part in ("*", have) for part, have in zip(parts, own, strict=True)
            ):
                yield name


@cache
def reads_of(kind: type) -> Reads:
    """Returns what a module class's ``forward`` and public methods, and what they call, read."""
    methods: dict[str, list[ast.FunctionDef]] = {}
    for base in kind.__mro__:
        if f"{base.__module__}.".startswith(_LIBRARIES):
            continue
        for name, body in _methods(base).items():
            held = methods.setdefault(name, [])
            # A method of a base runs where the one that hides it calls it.
            if not held or _calls_super(held[-1], name):
                held.append(body)
    # A block calls `forward` of what is in it, or any other method that is its own.
    own = [name for name in methods if name not in _NOT_CALLED and not name.startswith("_")]
    reads, reached, waiting = Reads(), set(), ["forward", *own]
    while waiting:
        name = waiting.pop()
        if name in reached or name not in methods:
            continue
        reached.add(name)
        for body in methods[name]:
            _Reader(body, reads)
        waiting += [
            node.attr
            for body in methods[name]
            for node in ast.walk(body)
            if isinstance(node, ast.Attribute)
            and node.attr in methods
            and node.attr not in _NOT_CALLED
        ]
    return reads


def _calls_super(body: ast.FunctionDef, name: str) -> bool:
    return any(
        isinstance(node, ast.Attribute)
        and node.attr == name
        and isinstance(node.value, ast.Call)
        and getattr(node.value.func, "id", "") == "super"
        for node in ast.walk(body)
    )


def _methods(kind: type) -> dict[str, ast.FunctionDef]:
    body = _classes(kind.__module__).get(kind.__qualname__)
    found = body.body if body is not None else []
    return {node.name: node for node in found if isinstance(node, ast.FunctionDef)}


@cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    """Returns the classes of a module by their qualified names; none where there is no source."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, KeyError, SyntaxError):
        return {}
    classes: dict[str, ast.ClassDef] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = prefix
            if isinstance(child, ast.ClassDef):
                classes[prefix + child.name] = child
                inner = f"{prefix}{child.name}."
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                inner = f"{prefix}{child.name}.<locals>."
            visit(child, inner)

    visit(tree, "")
    return classes


class _Reader:
    """Adds the reads of one method."""

    def __init__(self, function: ast.FunctionDef, reads: Reads) -> None:
        self._aliases: dict[str, tuple[str, ...]] = {"self": ()}
        parents: dict[ast.AST, ast.AST] = {}
        nodes = list(ast.walk(function))
        for node in nodes:
            for child in ast.iter_child_nodes(node):
                parents[child] = node
        # In the order of the source: a name is given before it is used.
        for node in sorted(nodes, key=lambda one: getattr(one, "lineno", 0)):
            self._note_names(node)
        for node in nodes:
            if not isinstance(node, ast.Attribute) or node.attr != "weight":
                continue
            path = self._path(node.value)
            if not path or path == ("?",) or set(path) <= {"*", "?"}:
                continue
            use = self._use(node, parents)
            if use != "nothing":
                into = reads.values if use == "values" else reads.dtypes
                into.setdefault(path, []).append(guards_of(node, parents))

    def _note_names(self, node: ast.AST) -> None:
        target: Any = None
        value: Any = None
        item = False
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], node.value
        elif isinstance(node, (ast.For, ast.comprehension)):
            target, value, item = node.target, node.iter, True
            if isinstance(value, ast.Call) and getattr(value.func, "id", "") == "enumerate":
                value = value.args[0]
                target = target.elts[1] if isinstance(target, ast.Tuple) else None
        if isinstance(target, ast.Name) and isinstance(
            value, (ast.Attribute, ast.Subscript, ast.Name)
        ):
            path = self._path(value)
            if path is not None:
                self._aliases[target.id] = (*path, "*") if item else path

    def _path(self, node: ast.AST) -> tuple[str, ...] | None:
        """Returns the path of an expression that names a module; None of any other."""
        if isinstance(node, ast.Name):
            return self._aliases.get(node.id, ("?",))
        if isinstance(node, ast.Attribute):
            path = self._path(node.value)
            return None if path is None else (*path, node.attr)
        if isinstance(node, ast.Subscript):
            path = self._path(node.value)
            return None if path is None else (*path, "*")
        return None

    def _use(self, node: ast.AST, parents: dict[ast.AST, ast.AST]) -> str:
        """Says what is made of a weight: "values", its "dtype", or "nothing" that matters."""
        parent = parents.get(node)
        while isinstance(parent, ast.Attribute) and parent.attr == "data":
            node, parent = parent, parents.get(parent)
        if isinstance(parent, ast.Attribute):
            if parent.attr == "dtype":
                return "dtype"
            return "nothing" if parent.attr in _HARMLESS else "values"
        if isinstance(parent, ast.Call) and getattr(parent.func, "id", "") in _HARMLESS_CALLS:
            return "nothing"
        if isinstance(parent, ast.Compare) and all(
            isinstance(operator, (ast.Is, ast.IsNot)) for operator in parent.ops
        ):
            return "nothing"
        return "values"
