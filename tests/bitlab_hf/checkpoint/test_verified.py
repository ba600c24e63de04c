"""The record of files that were scanned: skips a scan of the very same files, and only that."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import bitlab_hf.checkpoint.loading as loading
import bitlab_hf.checkpoint.verified as verified
from bitcore.errors import CheckpointError
from bitlab_hf import BitLabConfig, save
from bitlab_hf.checkpoint.verified import Verification
from tests.bitlab_hf.models import logits_of, make_float_model


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("packed")
    source = make_float_model("llama", base)
    config = BitLabConfig(mode="infer", head="int8", weight_granularity="per_group", group_size=64)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    save(model, base / "deployed")
    return base / "deployed"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BITLAB_CACHE", str(tmp_path / "cache"))
    # Files that a test has just written count as settled.
    monkeypatch.setattr(verified, "_SETTLED_NS", -1)
    return tmp_path / "cache" / "verified"


@pytest.fixture
def folder(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "model"))


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each scan."""
    done: list[str] = []
    scan: Callable[..., None] = loading.verify_packed

    def counted(layers: Any) -> None:
        done.append("scan")
        scan(layers)

    monkeypatch.setattr(loading, "verify_packed", counted)
    return done


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def damage(folder: Path) -> None:
    """Writes the code 3 into one byte of a packed tensor, and puts the times back."""
    file = folder / "model.safetensors"
    before = file.stat()
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    name = next(key for key in header if key.endswith("mlp.up_proj.qweight"))
    with file.open("r+b") as target:
        target.seek(8 + length + header[name]["data_offsets"][0])
        target.write(b"\xff")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert file.stat().st_size == before.st_size


def test_scanned_once(folder: Path, cache: Path, scans: list[str]) -> None:
    wanted = logits_of(load(folder))
    assert scans == ["scan"]
    assert len(list(cache.iterdir())) == 1
    assert torch.equal(logits_of(load(folder)), wanted)
    assert scans == ["scan"]


def test_a_damaged_file_is_refused_with_and_without_a_record(
    folder: Path, cache: Path, scans: list[str]
) -> None:
    load(folder)
    assert len(list(cache.iterdir())) == 1
    damage(folder)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="invalid code 3"):
            load(folder)
    shutil.rmtree(cache)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="invalid code 3"):
            load(folder)
    # Nothing is noted of what was refused.
    assert not list(cache.iterdir())
    assert len(scans) == 5


@pytest.mark.parametrize("edit", ["time", "copy", "exchange", "longer"])
def test_an_edited_file_is_scanned_again(
    edit: str, folder: Path, cache: Path, scans: list[str]
) -> None:
    load(folder)
    file = folder / "model.safetensors"
    if edit == "time":
        os.utime(file)
    elif edit == "copy":
        other = Path(shutil.copytree(folder, folder.with_name("other")))
        shutil.rmtree(folder)
        other.rename(folder)
    elif edit == "exchange":
        shutil.copy2(file, file.with_name("new"))
        file.with_name("new").replace(file)
    else:
        raw = file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = raw[8 : 8 + length] + b" " * 64
        file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    load(folder)
    assert scans == ["scan", "scan"]
    load(folder)
    assert scans == ["scan", "scan"]


def test_a_change_during_the_load_is_not_trusted(
    folder: Path, cache: Path, scans: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(folder)
    realign = loading.realign

    def change(model: Any) -> None:
        os.utime(folder / "model.safetensors")
        realign(model)

    monkeypatch.setattr(loading, "realign", change)
    before = [path.read_bytes() for path in cache.iterdir()]
    load(folder)
    assert scans == ["scan", "scan"]
    assert [path.read_bytes() for path in cache.iterdir()] == before


def test_a_file_written_just_now_is_not_noted(
    folder: Path, cache: Path, scans: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verified, "_SETTLED_NS", 10**12)
    load(folder)
    load(folder)
    assert scans == ["scan", "scan"]
    assert not list(cache.iterdir())


def test_other_modules_are_another_record(folder: Path, cache: Path, scans: list[str]) -> None:
    """What one configuration has scanned says nothing of what another one scans."""
    files = [str(folder / "model.safetensors")]
    first = Verification(files, ["a", "b"])
    first.keep()
    assert Verification(files, ["a", "b"]).is_known
    assert not Verification(files, ["a", "b", "c"]).is_known
    assert not Verification([], ["a", "b"]).is_known


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"[[1]]", b"\xff" * 9])
def test_a_record_that_makes_no_sense(
    content: bytes, folder: Path, cache: Path, scans: list[str]
) -> None:
    load(folder)
    next(cache.iterdir()).write_bytes(content)
    load(folder)
    assert scans == ["scan", "scan"]


def test_no_cache_does_no_harm(
    folder: Path, cache: Path, scans: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITLAB_CACHE", "off")
    load(folder)
    load(folder)
    # A folder where nothing can be written, even by root.
    blocked = folder.with_name("blocked")
    blocked.write_text("a file")
    monkeypatch.setenv("BITLAB_CACHE", str(blocked))
    load(folder)
    assert scans == ["scan"] * 3
    assert not cache.exists()


def test_a_record_that_cannot_be_written(
    folder: Path, cache: Path, scans: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("bitcore.user_cache.tempfile.mkstemp", refuse)
    load(folder)
    assert not list(cache.iterdir())
    assert scans == ["scan"]


def test_without_verification_nothing_is_noted(folder: Path, cache: Path, scans: list[str]) -> None:
    load(folder, quantization_config=BitLabConfig(verify=False))
    assert not scans
    assert not cache.exists()


def test_pages_are_asked_for_where_there_is_a_scan(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(verified, "_CHUNK", 4096)
    monkeypatch.setattr(
        os, "posix_fadvise", lambda handle, start, size, advice: asked.append((start, size))
    )
    load(folder)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.daemon:
            thread.join(1)
    size = (folder / "model.safetensors").stat().st_size
    assert asked == [(start, 4096) for start in range(0, size, 4096)]
    asked.clear()
    load(folder)
    assert not asked
