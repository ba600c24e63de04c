"""The user's cache folder: named, turned off, private, whole files only."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitcore.user_cache import cache_folder, keep


def test_named_by_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITLAB_CACHE", str(tmp_path / "mine"))
    folder = cache_folder("things")
    assert folder == tmp_path / "mine" / "things"
    assert folder.is_dir()
    assert folder.stat().st_mode & 0o777 == 0o700


def test_follows_the_desktop_convention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITLAB_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("things") == tmp_path / "bitlab" / "things"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("things") == tmp_path / ".cache" / "bitlab" / "things"


@pytest.mark.parametrize("off", ["off", "0"])
def test_turned_off(off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITLAB_CACHE", off)
    assert cache_folder("things") is None


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_refuses_what_others_may_write_to(
    mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITLAB_CACHE", str(tmp_path))
    folder = cache_folder("things")
    assert folder is not None
    folder.chmod(mode)
    assert cache_folder("things") is None
    folder.chmod(0o755)
    tmp_path.chmod(mode)
    assert cache_folder("things") is None


def test_no_folder_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BITLAB_CACHE", str(tmp_path / "file"))
    assert cache_folder("things") is None


def test_files_are_whole_or_not_there(tmp_path: Path) -> None:
    assert keep(tmp_path / "a", b"one")
    assert keep(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two"
    assert not keep(tmp_path / "missing" / "a", b"one")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
