"""How tests wait for programs that start others."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from tests.processes import launch

# As torchrun does it: the other one has a session of its own, and the same output.
STARTS = """
import pathlib, subprocess, sys, time
def wait_for_ever():
    time.sleep(600)
if sys.argv[1] == "outer":
    inner = subprocess.Popen([sys.executable, __file__, "inner"], start_new_session=True)
    pathlib.Path(sys.argv[2]).write_text(str(inner.pid))
    inner.wait() if sys.argv[3] == "waits" else None
else:
    print("started", flush=True)
    wait_for_ever()
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "starts.py"
    path.write_text(STARTS)
    return path


def test_what_hangs_tells_where_and_is_gone(script: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no end within 10 s") as caught:
        launch(sys.executable, script, "outer", tmp_path / "inner", "waits", timeout=10)
    assert "started" in str(caught.value)
    assert str(caught.value).count("in wait_for_ever") == 1
    assert not psutil.pid_exists(int((tmp_path / "inner").read_text()))


def test_what_it_leaves_running_is_not_waited_for(script: Path, tmp_path: Path) -> None:
    done = launch(sys.executable, script, "outer", tmp_path / "inner", "leaves", timeout=60)
    assert done.returncode == 0
    psutil.Process(int((tmp_path / "inner").read_text())).kill()
