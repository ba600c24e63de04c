"""Where calibration holds what samples make of a model: in memory, or on disk."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from bitlab_hf.checkpoint.atomic import DiskFullError
from bitlab_hf.fit import memory, room
from bitlab_hf.fit.calibrate import calibrate
from bitlab_hf.fit.memory import available_bytes
from bitlab_hf.fit.room import Room
from tests.bitlab_hf.experts import make_moe
from tests.bitlab_hf.models import make_float_model, taught, training_data
from tests.bitlab_hf.test_trainer import assert_equal_states, state_of
from tests.bitlab_hf.train.test_trainer import load

SHORT = "MemTotal: 1000 kB\nMemFree: 10 kB\nMemAvailable: 249 kB\n"
ENOUGH = SHORT.replace("249", "250")


def give_memory(monkeypatch: pytest.MonkeyPatch, **texts: str) -> None:
    """Lets the system say of its memory what files of these names hold."""
    monkeypatch.setattr(
        memory, "system_text", lambda path: texts.get(Path(path).name.split(".")[-1], "")
    )


def samples() -> list[Any]:
    return [row["input_ids"] for row in training_data(12)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_tensors_in_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    give_memory(monkeypatch, meminfo=SHORT)
    x = torch.randn(3, 1, 5).mul(100).to(dtype).transpose(0, 2)
    held = Room(tmp_path).hold(x)
    assert held.data_ptr() != x.data_ptr()
    assert (held.dtype, held.shape) == (x.dtype, x.shape)
    assert torch.equal(held, x)
    mapped = [
        line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line
    ]
    assert len(mapped) == 1
    # A file without a name is gone with the process, however that ends.
    assert not os.listdir(tmp_path)
    del held
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert Room(None).hold(x) is x
    assert len(Room(tmp_path).hold(x[:0])) == 0


def test_files_are_not_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand of them is what a process may have by default; each folder is made."""
    give_memory(monkeypatch, meminfo=SHORT)
    room = Room(tmp_path / "not/there/yet")
    before = len(os.listdir("/proc/self/fd"))
    held = [room.hold(torch.full((5,), number)) for number in range(50)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert [int(one[4]) for one in held] == list(range(50))


@pytest.mark.parametrize(
    ("texts", "short"),
    [
        ({"meminfo": SHORT}, True),
        ({"meminfo": ENOUGH}, False),
        ({}, False),
        ({"meminfo": ENOUGH, "max": "max\n", "current": "9\n"}, False),
        # Of a container's 400,000 bytes 99,999 are free, or with pages of files 100,000.
        ({"meminfo": ENOUGH, "max": "400000\n", "current": "300001\n", "stat": "anon 7\n"}, True),
        (
            {
                "meminfo": ENOUGH,
                "max": "400000\n",
                "current": "300001\n",
                "stat": "inactive_file 1",
            },
            False,
        ),
    ],
)
def test_when_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: dict[str, str], short: bool
) -> None:
    give_memory(monkeypatch, **texts)
    x = torch.ones(4)
    assert (Room(tmp_path).hold(x) is not x) is short


def test_this_machine() -> None:
    free = available_bytes()
    assert free is None or 2**20 < free < 2**50


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_the_same_bits_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    make = make_float_model if kind == "llama" else make_moe
    source = taught(make(kind, tmp_path / "source"))
    in_memory, on_disk = load(source), load(source)
    calibrate(in_memory, samples())
    held: list[torch.Tensor] = []
    mapped = room._mapped
    monkeypatch.setattr(room, "_mapped", lambda *args: held.append(mapped(*args)) or held[-1])
    give_memory(monkeypatch, meminfo=SHORT)
    with caplog.at_level(logging.INFO, "bitlab"):
        calibrate(on_disk, samples(), folder=tmp_path / "kept")
    assert_equal_states(state_of(in_memory), state_of(on_disk))
    assert caplog.text.count(f"memory is short: what samples make goes to {tmp_path}") == 1
    # Two streams, and of each layer of the decoder its output, its sums and what its layers read.
    assert len(held) > 2 * 6
    assert all(
        part.name.endswith((".safetensors", ".json")) for part in (tmp_path / "kept").iterdir()
    )


def test_no_room_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = taught(make_float_model("llama", tmp_path / "source"))
    straight, stopped = load(source), load(source)
    calibrate(straight, samples())
    before = state_of(stopped)
    give_memory(monkeypatch, meminfo=SHORT)
    given, calls = os.posix_fallocate, [0]

    def full(*args: Any) -> None:
        calls[0] += 1
        if calls[0] > 14:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        given(*args)

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        DiskFullError, match=f"calibrate: {tmp_path / 'kept'} must be written whole"
    ):
        calibrate(stopped, samples(), folder=tmp_path / "kept")
    assert_equal_states(state_of(stopped), before)
    kept = len(list((tmp_path / "kept").glob("*.safetensors")))
    assert 0 < kept < 14
    monkeypatch.setattr(os, "posix_fallocate", given)
    calibrate(stopped, samples(), folder=tmp_path / "kept")
    assert_equal_states(state_of(stopped), state_of(straight))
