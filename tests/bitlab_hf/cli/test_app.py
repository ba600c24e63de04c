"""The command as scripts see it: exit codes, one message, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from bitlab_hf.cli.app import app
from tests import processes
from tests.bitlab_hf.cli.conftest import DEMO

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


@pytest.mark.ci
def test_the_command_in_its_own_process(tmp_path: Path) -> None:
    """Where nothing but the command imports anything: deploys, loads again, and could train."""
    code = (
        "import sys\n"
        "from bitlab_autoload.command import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "import bitcore.lazy, bitlayers, torch\n"
        "assert bitcore.lazy.is_command()\n"
        "bitlayers.BitLinear(64, 64)(torch.ones(1, 64)).sum().backward()\n"
    )
    packed = str(tmp_path / "packed")
    for arguments in (
        ("deploy", str(DEMO), packed),
        ("generate", packed, "x", "--max-tokens", "2"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False,
            env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_whoever_imports_the_command_is_not_it() -> None:
    code = "import bitlab_autoload.command, bitcore, sys; assert 'bitcore.api' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_version(cli: Callable[..., Any]) -> None:
    shown = cli("--version")
    assert (shown.code, shown.out) == (0, version("bitlab-hf") + "\n")
