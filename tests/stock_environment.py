"""A virtual environment that has all that this one has, but no BitLab."""

from __future__ import annotations

import os
import subprocess
import sysconfig
import venv
from pathlib import Path

from tests.processes import Elsewhere

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


def stock_processes(folder: Path) -> Elsewhere:
    """Makes such an environment and a server of its processes, which need no hub."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return Elsewhere(
        make_stock_environment(folder), {**environment, "HF_HUB_OFFLINE": "1"},
        "transformers.modeling_utils", "transformers.models.llama.modeling_llama",
    )  # fmt: skip
