"""A checkpoint that is given up while another process still writes into it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from bitlab_hf.train.guard import whole_or_nothing


def test_what_is_written_late_does_not_keep_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, own = tmp_path / "checkpoint-4", os.rmdir

    def rmdir(path: Any, *args: Any, **kwargs: Any) -> None:
        if folder.is_dir():
            (folder / "rng_state_1.pth").write_text("late")
        own(path, *args, **kwargs)

    def write() -> None:
        with whole_or_nothing(folder, writes=True):
            folder.mkdir()
            (folder / "model").write_text("half")
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rmdir", rmdir)
    with pytest.raises(KeyboardInterrupt):
        write()
    assert not [*tmp_path.iterdir()]
