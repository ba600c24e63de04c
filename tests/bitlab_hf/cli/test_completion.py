"""Shell completion: installed into a home, and asked by a real bash."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bitlab_hf.cli.test_app import COMMANDS

pytestmark = pytest.mark.ci

_ASK = """
source "$HOME/.bashrc"
COMP_WORDS=({words}) COMP_CWORD={place}
_bitlab_completion bitlab
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def bash(script: str, home: Path) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "HOME": str(home), "PATH": path, "SHELL": "/bin/bash"}
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True, text=True, check=False, timeout=60, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_bash(tmp_path: Path) -> None:
    # The trailing command keeps bash from replacing itself: completion looks at its parent.
    assert "completion installed" in bash("bitlab --install-completion; true", tmp_path)
    offered = bash(_ASK.format(words="bitlab ''", place=1), tmp_path).split()
    assert sorted(set(COMMANDS) & set(offered)) == COMMANDS
    assert bash(_ASK.format(words="bitlab ben", place=1), tmp_path).split() == ["bench"]
    offered = bash(_ASK.format(words="bitlab report --", place=2), tmp_path).split()
    assert {"--out", "--baseline", "--json"} <= set(offered)
