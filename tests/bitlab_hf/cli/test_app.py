"""The command as scripts see it: exit codes, one message, no traceback."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from bitlab_hf.cli.app import app
from tests import processes

COMMANDS = [
    "bench", "chat", "convert", "demo", "deploy", "eval", "export", "generate", "import", "info",
    "push", "report", "rotate", "serve", "train",
]  # fmt: skip


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return processes.run(processes.BITLAB, *arguments)


def test_every_command_is_listed() -> None:
    names = {
        item.name or item.callback.__name__ for item in app.registered_commands if item.callback
    }
    assert sorted(names) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_help(cli: Callable[..., Any], command: str) -> None:
    shown = cli(command, "--help")
    assert shown.code == 0
    assert "Examples:" in shown.out
    assert f"bitlab {command}" in shown.out
    assert "--json" in shown.out


def test_failure_is_one_message(tmp_path: Path) -> None:
    done = run("generate", str(tmp_path), "x")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "must hold config.json" in done.stderr
    assert "Traceback" not in done.stderr
    debugged = run("generate", str(tmp_path), "x", "--debug")
    assert debugged.returncode == 1
    assert "Traceback" in debugged.stderr


def test_other_errors_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    done = run("export", str(tmp_path), str(tmp_path / "out"))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "nonsense" in done.stderr


def test_usage_and_quick_help() -> None:
    assert run("nonsense").returncode == 2
    assert run().returncode == 2
    code = (
        "import sys; sys.argv[1:] = ['--help']\n"
        "from bitlab_autoload.command import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'bitlab_hf.api'} & sys.modules.keys()\n"
        "import bitlab_hf, bitcore, torch\n"
        "assert not hasattr(torch.ops.bitlab, 'linear')\n"
        "from bitlab_hf import BitLabConfig, deploy\n"
        "assert bitcore.backends() and hasattr(torch.ops.bitlab, 'linear')\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as table\n"
        "assert table['bitlab'] is BitLabConfig and 'save' in dir(bitlab_hf)\n"
        "assert not hasattr(bitlab_hf, 'nonsense')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_version(cli: Callable[..., Any]) -> None:
    shown = cli("--version")
    assert (shown.code, shown.out) == (0, version("bitlab-hf") + "\n")
