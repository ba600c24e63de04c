"""The structure of the tree: no import leads back to where it came from; a hall with few doors."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("bitcore", "bitlayers", "bitlab_hf", "bitlab_autoload", "bitlab_vllm")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return {module_name(path): path for path in paths}


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules that a module imports: anywhere, also in functions and for types only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports by a relative path"
            # Either a name of a module, or a module of a package.
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & known.keys()) or {str(node.module)}
    return (found & known.keys()) - {name}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Every circle that a walk in depth first meets."""
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for other in sorted(graph[name]):
                walk(other, [*path, name])
            done.add(name)

    for name in sorted(graph):
        walk(name, [])
    return found


def test_no_import_leads_back() -> None:
    known = modules()
    graph = {name: imports(name, path, known) for name, path in known.items()}
    assert sum(map(len, graph.values())) > 300
    assert not circles(graph)


def test_a_circle_is_noticed() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}
    assert circles(graph) == [["a", "b", "c", "a"]]


def test_the_hall_holds_what_transformers_calls() -> None:
    """And the names that users import, one of them under an old path."""
    hall = {path.name for path in (ROOT / "bitlab_hf").glob("*.py")}
    assert hall == {"__init__.py", "api.py", "config.py", "quantizer.py", "replace.py"}


def changed_elsewhere(code: str) -> list[str]:
    """The attributes of imported things that a module writes to when it is imported, but for the
    path on which scripts find each other.
    """
    top, found = ast.parse(code).body, []
    imported = {
        (alias.asname or alias.name).partition(".")[0]
        for node in top if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names
    }  # fmt: skip
    for node in top:
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            root = target
            while isinstance(root, ast.Attribute | ast.Subscript):
                root = root.value
            if root is not target and isinstance(root, ast.Name) and root.id in imported:
                found.append(ast.unparse(target))
    return [target for target in found if target != "sys.path[:0]"]


def test_no_test_changes_another_module_for_all_that_run_after_it() -> None:
    assert changed_elsewhere("from a import b\nimport c.d\nb.X = 1\nc.d['y'] = 2\nz = 3") == [
        "b.X", "c.d['y']",
    ]  # fmt: skip
    paths = [path for place in ("tests", "scripts") for path in (ROOT / place).rglob("*.py")]
    found = {str(path.relative_to(ROOT)): changed_elsewhere(path.read_text()) for path in paths}
    assert {name: attributes for name, attributes in found.items() if attributes} == {}
