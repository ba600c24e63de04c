"""Places that cannot be written to are refused before any work, and copies are staged safely."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from bitcore.errors import ArgumentError
from bitlab_hf import BitLabConfig, save
from bitlab_hf.checkpoint import atomic, saving
from bitlab_hf.checkpoint.atomic import (
    OutputError,
    check_folder,
    put_in_place,
    staged_beside,
    write_atomically,
)
from bitlab_hf.interop.gguf import check_target
from tests import processes
from tests.bitlab_hf.models import make_float_model


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def circle(place: Path) -> None:
    place.symlink_to(place.name)


def plain_file(place: Path) -> None:
    place.write_text("")


@pytest.mark.parametrize("make", [circle, plain_file, os.mkfifo])
def test_outputs_that_are_no_folder(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    make(tmp_path / "there")
    for name in ("there", "there/below"):
        with pytest.raises(ArgumentError, match="^save: the output must "):
            check_folder(tmp_path / name, "save")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "y" * 5000])
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    for check in (lambda place: check_folder(place, "save"), check_target):
        with pytest.raises(ArgumentError, match="must have a name that leads somewhere"):
            check(tmp_path / name)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    for make in (circle, os.mkfifo):
        make(tmp_path / "there")
        with pytest.raises(ArgumentError, match="^export_gguf: "):
            check_target(tmp_path / "there")
        (tmp_path / "there").unlink()


def test_a_parent_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of the system, as another user or on a disk that is read-only."""
    (tmp_path / "held" / "model").mkdir(parents=True)
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path) != tmp_path / "held" and access(path, mode)
    )
    for name in ("held/model", "held/new", "held/new/deep"):
        with pytest.raises(ArgumentError, match="must be a place that can be written to"):
            check_folder(tmp_path / name, "save")
    with pytest.raises(ArgumentError, match="must be a place that can be written to"):
        check_target(tmp_path / "held/m.gguf")
    check_folder(tmp_path / "other", "save")


def test_a_mount_point() -> None:
    for place in ("/proc", "/dev/shm"):
        if os.path.ismount(place):
            with pytest.raises(ArgumentError, match="must not be a mount point"):
                check_folder(place, "save")


def mount(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """Makes the system's list say that a folder is mounted from the same disk."""
    line = f"36 35 98:0 / {str(place).replace(' ', chr(92) + '040')} rw - ext4 /dev/sda rw\n"
    monkeypatch.setattr(Path, "read_text", lambda _path, **_options: line)


def test_a_folder_mounted_from_the_same_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("my model", "my model 2"):
        (tmp_path / name).mkdir()
    mount(monkeypatch, tmp_path / "my model")
    with pytest.raises(ArgumentError, match="must not be a mount point"):
        check_folder(tmp_path / "my model", "save")
    check_folder(tmp_path / "my model 2", "save")


def test_a_volume_below_the_folder_keeps_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It would move along with the folder that is exchanged, and be emptied with it."""
    target = tmp_path / "target"
    volume = target / "deep" / "a volume"
    volume.mkdir(parents=True)
    (volume / "precious").touch()
    with monkeypatch.context() as context:
        mount(context, volume)
        with pytest.raises(ArgumentError, match="must hold no mount point, got .*/deep/a volume"):
            check_folder(target, "save")
        with (
            pytest.raises(ArgumentError, match="must hold no mount point"),
            saving.replacing(target, "save"),
        ):
            pass
    with saving.replacing(target, "save") as staged:
        (staged / "model.safetensors").touch()
        mount(monkeypatch, staged / "deep" / "a volume")
    assert (staged / "deep" / "a volume" / "precious").exists()
    assert f"{staged}: left, because {staged}/deep/a volume is a mount point" in caplog.text


def test_a_folder_that_cannot_be_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_float_model("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=BitLabConfig())
    save(model, tmp_path / "target")

    def busy(*_paths: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(saving, "_exchange", busy)
    with pytest.raises(OutputError, match=r"save: .*target must be a place .* resource busy"):
        save(model, tmp_path / "target")
    AutoModelForCausalLM.from_pretrained(tmp_path / "target")


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o027, 0o077])
def test_new_files_are_as_the_umask_says(
    tmp_path: Path, umask: Callable[[int], int], mask: int
) -> None:
    umask(mask)
    write_atomically(tmp_path / "new", "x")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o666 & ~mask
    with staged_beside(tmp_path / "folder", "save", folder=True) as staged:
        assert staged.stat().st_mode & 0o777 == 0o777 & ~mask


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    for mode in (0o600, 0o664):
        file.chmod(mode)
        write_atomically(file, "new")
        assert stat.S_IMODE(file.stat().st_mode) == mode
    assert file.read_text() == "new"


def test_a_group_that_cannot_be_kept_widens_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_arguments: object) -> None:
        raise PermissionError

    file = tmp_path / "file"
    file.write_text("old")
    file.chmod(0o664)
    monkeypatch.setattr(os, "chown", refused)
    write_atomically(file, "new")
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


def test_planted_links_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even of the one name that will be taken."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    numbers = iter(["0" * 16, "1" * 16])
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda _size: next(numbers))
    (tmp_path / f".file.bitlab-staged-{'0' * 16}").symlink_to(victim)
    (tmp_path / f".file.{os.getpid()}").symlink_to(victim)
    write_atomically(tmp_path / "file", "x")
    assert victim.read_text() == "precious"
    assert (tmp_path / "file").read_text() == "x"
    assert not (tmp_path / "file").is_symlink()


WRITE = """
import os, signal, sys, time
from pathlib import Path
from bitlab_hf.checkpoint.atomic import staged_beside
with staged_beside(Path(sys.argv[1]), "save", folder=sys.argv[2] == "folder") as staged:
    target = staged / "part" if staged.is_dir() else staged
    target.write_text("half")
    print(staged, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_process_left_goes_at_the_next_write(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "target"
    own = tmp_path / ".target.settings"
    own.write_text("mine")
    printed = [tmp_path / "first.txt", tmp_path / "second.txt"]
    for file in printed:
        file.touch()
    started = [processes.start("-c", WRITE, target, kind, output=file) for file in printed]
    try:
        while not all(file.read_text().endswith("\n") for file in printed):
            assert all(process.is_alive() for process in started)
            time.sleep(0.02)
        staged = [Path(file.read_text().strip()) for file in printed]
        started[0].kill()
        started[0].join()
        assert all(path.exists() for path in staged)
        with staged_beside(target, "save", folder=kind == "folder"):
            pass
        assert not staged[0].exists()
        assert f"{staged[0]}: removed" in caplog.text
        assert staged[1].exists()
        assert own.read_text() == "mine"
    finally:
        for process in started:
            process.kill()
            process.join()


def test_the_only_checkpoint_is_never_removed(tmp_path: Path) -> None:
    """A process killed between the two renames of a system without an exchange."""
    previous = tmp_path / f".target.bitlab-staged-{'0' * 16}.previous"
    previous.mkdir()
    with staged_beside(tmp_path / "target", "save"):
        assert previous.exists()
    (tmp_path / "target").mkdir()
    with staged_beside(tmp_path / "target", "save"):
        assert not previous.exists()


def test_a_link_of_such_a_name_stays(tmp_path: Path) -> None:
    link = tmp_path / f".target.bitlab-staged-{'0' * 16}"
    (tmp_path / "held").mkdir()
    link.symlink_to("held")
    with staged_beside(tmp_path / "target", "save") as staged:
        staged.write_text("x")
        put_in_place(staged, tmp_path / "target")
    assert link.is_symlink()
    assert (tmp_path / "held").is_dir()
    assert (tmp_path / "target").read_text() == "x"


def test_weights_that_the_umask_hides(tmp_path: Path, umask: Callable[[int], int]) -> None:
    source = make_float_model("llama", tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(source, quantization_config=BitLabConfig())
    umask(0o077)
    save(model, tmp_path / "target")
    modes = {file.stat().st_mode & 0o077 for file in (tmp_path / "target").iterdir()}
    assert modes == {0}
