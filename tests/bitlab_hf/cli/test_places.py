"""Where commands may write and read: refused before any work, and never waited for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitcore.errors import ArgumentError
from bitlab_hf.cli import places
from bitlab_hf.cli.common import read_texts
from bitlab_hf.cli.places import check_output, check_output_file

Run = Callable[..., Any]
WRITING = ("deploy", "export", "convert", "import", "train", "demo")


def arguments(command: str, model: Path, output: Path) -> tuple[object, ...]:
    if command == "demo":
        return ("demo", "--output", output)
    more = ("--text", __file__) if command == "train" else ()
    return (command, model, output, *more)


def loop(folder: Path) -> Path:
    (folder / "a").symlink_to(folder / "b")
    (folder / "b").symlink_to(folder / "a")
    return folder / "a"


def pipe_within(folder: Path) -> Path:
    (folder / "out/deep").mkdir(parents=True)
    os.mkfifo(folder / "out/deep/pipe")
    return folder / "out"


OUTPUTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a loop": (loop, "Too many levels of symbolic links"),
    "below a loop": (lambda folder: loop(folder) / "x", "Too many levels of symbolic links"),
    "a long name": (lambda folder: folder / ("x" * 300), "File name too long"),
    "a pipe within": (pipe_within, "must be an ordinary one, got a named pipe"),
    "the working directory": (lambda _folder: Path(), "must not hold the working directory"),
    "its parent": (lambda _folder: Path(".."), "must not hold the working directory"),
    "a mount point": (lambda _folder: Path("/proc"), "be a mount point"),
    "a place that refuses": (lambda _folder: Path("/proc/x"), "must lie where it can be written"),
    "a device": (lambda _folder: Path("/dev/null"), "is no folder"),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs(bitlab: Run, states: dict[str, Path], tmp_path: Path, kind: str) -> None:
    make, told = OUTPUTS[kind]
    output = make(tmp_path)
    for command in WRITING:
        done = bitlab(*arguments(command, states["float"], output), "--json")
        assert done.code == 1, done
        assert told in done.json["error"]
        assert str(output)[:50] in done.json["error"]
        assert len(done.err.strip().splitlines()) == 1


def test_good_outputs(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "new")
    (tmp_path / "there/run").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    for name in ("new", "link", "there", "new/deep/er"):
        check_output(None, tmp_path / name)
    for name in ("new.gguf", "there/new.gguf"):
        check_output_file(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the file is exchanged: neither this folder nor a mount point is in the way."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os.path, "ismount", lambda place: Path(place) == tmp_path)
    check_output_file(Path("new.gguf"))
    check_output_file(tmp_path.parent / "new.gguf")


def test_a_part_of_the_same_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is bound to a folder has the device of its parent; the system's list tells."""
    place = tmp_path / "a place"
    place.mkdir()
    line = f"22 1 8:1 /x {str(place).replace(' ', chr(92) + '040')} rw - ext4 /dev/sda rw\n"
    monkeypatch.setattr(places.Path, "read_text", lambda *_given, **_options: line)
    with pytest.raises(ArgumentError, match="be a mount point"):
        check_output(None, place)
    with pytest.raises(ArgumentError, match="must hold no mount point, got .*/a place is one"):
        check_output(None, tmp_path)


def test_files(bitlab: Run, states: dict[str, Path], tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    model = states["float"]
    for given in (
        ("eval", model, "--text", pipe),
        ("eval", model, "--text", "/dev/zero"),
        ("train", model, tmp_path / "out", "--text", pipe),
        ("train", model, tmp_path / "out", "--text", __file__, "--recipe", tmp_path / "pipe.json"),
        ("import", tmp_path / "pipe.gguf", tmp_path / "out"),
        ("eval", tmp_path / "pipe.gguf", "--text", __file__),
        ("export", states["deployed"], pipe, "--to", "gguf"),
    ):
        for named in (tmp_path / "pipe.json", tmp_path / "pipe.gguf"):
            if not named.exists():
                os.mkfifo(named)
        done = bitlab(*given, "--json")
        assert done.code == 1, done
        assert "got a named pipe" in done.json["error"] or "got a device" in done.json["error"]
    assert not (tmp_path / "out").exists()


def test_report(bitlab: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "trainer_state.json")
    done = bitlab("report", tmp_path, "--json")
    assert "trainer_state.json: the file must be an ordinary one" in done.json["error"]
    for output, told in ((tmp_path, "got a folder"), (loop(tmp_path), "symbolic links")):
        with pytest.raises(ArgumentError, match=told):
            check_output_file(output)


def test_json_lines_are_texts_of_their_own(tmp_path: Path) -> None:
    """As ``scripts/real_models.py`` writes them."""
    file = tmp_path / "fit.jsonl"
    file.write_text('{"title": "A", "text": "One \\u00e9."}\n{"text": "Two."}\n')
    assert [one.text for one in read_texts([file])] == ["One é.", "Two."]
    file.write_text('{"text": "One\u2028more."}', encoding="utf-8")
    assert [one.text for one in read_texts([file])] == ["One\u2028more."]
    file.write_text('{"text": "One."}\n{"titel": "B"}\n')
    with pytest.raises(ArgumentError, match=r"^--text: .*fit.jsonl, line 2 must be an object with"):
        read_texts([file])


def test_what_a_shell_hands_over() -> None:
    """``--text <(command)`` is a pipe, too, and one that ends."""
    reading, writing = os.pipe()
    os.write(writing, b"text of a process")
    os.close(writing)
    try:
        (found,) = read_texts([Path(f"/dev/fd/{reading}")])
    finally:
        os.close(reading)
    assert found.text == "text of a process"


@pytest.mark.parametrize(
    "given",
    [
        ("bench", "--threads", 100_000),
        ("bench", "--tokens", 10**30),
        ("bench", "--seconds", "nan"),
        ("bench", "--cold-mb", "inf"),
        ("bench", "--shape", f"{10**30}x64"),
        ("bench", "--shape", f"{'9' * 5000}x64"),
        ("generate", "m", "x", "--seed", 10**30),
        ("generate", "m", "x", "--seed", -1),
        ("generate", "m", "x", "--temperature", "nan"),
        ("generate", "m", "x", "--temperature", "inf"),
        ("generate", "m", "x", "--max-tokens", 10**30),
        ("eval", "m", "--text", __file__, "--batch", 10**30),
        ("eval", "m", "--text", __file__, "--length", 10**30),
        ("train", "m", "o", "--text", __file__, "--seed", 10**30),
        ("train", "m", "o", "--text", __file__, "--threads", 100_000),
        ("train", "m", "o", "--text", __file__, "--learning-rate", "nan"),
        ("train", "m", "o", "--text", __file__, "--steps", 10**30),
        ("demo", "--tokens", 10**30),
        ("report", "r", "--baseline", "nan"),
    ],
    ids=lambda given: " ".join(str(item)[:12] for item in (given[0], *given[-2:])),
)
def test_numbers_out_of_bounds(bitlab: Run, given: tuple[object, ...]) -> None:
    done = bitlab(*given, "--json")
    assert done.code == 2, done
    assert given[-2] in done.json["error"]


def test_what_does_not_fit_into_memory(bitlab: Run) -> None:
    for given in (
        ("--shape", "99999999x64"),
        ("--shape", "64x64", "--tokens", 2**31 - 1),
        ("--cold-mb", 1e12),
    ):
        done = bitlab("bench", *given, "--seconds", 0.001, "--json")
        assert done.code == 1
        assert "must fit into" in done.json["error"]
