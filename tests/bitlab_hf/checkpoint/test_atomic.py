"""What a full disk says, in the words of each library that writes."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

import bitlab_hf.interop.gguf
from bitlab_hf import BitLabConfig, export_gguf, save
from bitlab_hf.checkpoint.atomic import DiskFullError, naming_full_disk, write_atomically
from tests.bitlab_hf.models import make_float_model

FULL = Path("/dev/full")


def write_text() -> None:
    FULL.write_text("x")


def write_array() -> None:
    with FULL.open("wb") as file:
        np.zeros(2**20, dtype=np.uint8).tofile(file)


def write_safetensors() -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")


def exceed_quota() -> None:
    raise OSError(errno.EDQUOT, "Disk quota exceeded")


@pytest.mark.parametrize("write", [write_text, write_array, write_safetensors, exceed_quota])
def test_the_output_is_named(write: Callable[[], None]) -> None:
    with pytest.raises(DiskFullError) as caught, naming_full_disk("here", "save"):
        write()
    assert str(caught.value).startswith("save: here must be written whole, got a full disk (")
    assert "\nFree some space" in str(caught.value)
    assert caught.value.errno in (errno.ENOSPC, errno.EDQUOT)


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "28"), SafetensorError("os error 2")])
def test_other_errors_stay(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, naming_full_disk("here", "save"):
        raise error
    assert caught.value is error


def test_every_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(
        make_float_model("llama", tmp_path), quantization_config=BitLabConfig(mode="infer")
    )
    before = set(tmp_path.iterdir())
    monkeypatch.setattr(model, "save_pretrained", lambda *_args, **_options: write_safetensors())
    with pytest.raises(DiskFullError, match="save: .*/out must be written whole"):
        save(model, tmp_path / "out")
    monkeypatch.setattr(bitlab_hf.interop.gguf, "_write", lambda *_args: write_array())
    monkeypatch.setattr(bitlab_hf.interop.gguf, "find_tokenizer", lambda *_args: None)
    monkeypatch.setattr(bitlab_hf.interop.gguf, "add_tokenizer", lambda *_args: None)
    with pytest.raises(DiskFullError, match=r"export_gguf: .*/m\.gguf must be written whole"):
        export_gguf(model, tmp_path / "m.gguf", "BF16")
    monkeypatch.setattr("os.fsync", lambda _file: write_text())
    with pytest.raises(DiskFullError, match="write: .*/small must be written whole"):
        write_atomically(tmp_path / "small", "x")
    assert set(tmp_path.iterdir()) == before
