"""What the script that makes vLLM's environment asks for before it makes anything."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts/vllm_environment.sh"


def test_without_a_compiler_nothing_is_made(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "dirname", "python3"):
        (programs / name).symlink_to(str(shutil.which(name)))
    done = subprocess.run(
        [SCRIPT, tmp_path / "vllm"], env={"PATH": str(programs)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "needs a C++ compiler; run: apt-get install g++" in done.stderr
    assert not (tmp_path / "vllm").exists()
