"""A virtual environment that has all that this one has, but no BitLab."""

from __future__ import annotations

import os
import subprocess
import sysconfig
import venv
from pathlib import Path

# Packages, the installed distribution, and what an editable installation leaves.
OURS = ("bitcore", "bitlayers", "bitlab", "_editable_skbc_bitlab", "__editable__.bitlab")


def make_stock_environment(folder: Path) -> Path:
    """Makes it, by links to the installed packages; returns its Python."""
    venv.create(folder, symlinks=True, with_pip=False)
    python = folder / "bin" / "python"
    asked = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    target = Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(OURS) and not (target / entry.name).exists():
            (target / entry.name).symlink_to(entry)
    return python


def run_stock(python: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs Python there, on a script or with ``-c``, away from this repository's folders."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [python, "-P", *arguments],
        capture_output=True, text=True, check=False, cwd=python.parent,
        env={**environment, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
