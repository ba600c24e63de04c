"""What waits for another library's module, whoever asks for it and in whichever order."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

from bitlab_hf.peft.arrival import when_imported


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "waited_for").mkdir()
    (tmp_path / "waited_for" / "__init__.py").write_text("")
    (tmp_path / "waited_for" / "part.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    return "waited_for.part"


def test_asking_whether_there_is_a_module_is_no_import(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    finders = len(sys.meta_path)
    when_imported(library, lambda module: seen.append(module.value))
    when_imported(library, lambda module: seen.append(-1))
    assert importlib.util.find_spec(library) is not None
    assert importlib.util.find_spec(library) is not None
    assert not seen
    importlib.import_module(library)
    assert seen == [1]
    assert len(sys.meta_path) == finders
    when_imported(library, lambda module: seen.append(2))
    assert seen == [1, 2]
    monkeypatch.delitem(sys.modules, library)
    importlib.import_module(library)
    assert seen == [1, 2]


def test_a_module_that_there_is_not_stays_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    when_imported("no_such_library.part", lambda module: pytest.fail("called"))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_library.part")
