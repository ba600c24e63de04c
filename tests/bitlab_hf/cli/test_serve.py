"""``serve``: which server is started with what, and what is refused before."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitlab_hf.cli import serve

Cli = Callable[..., Any]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str], dict[str, str]]]:
    """What would have taken the command's place."""
    calls: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *given: calls.append(given))
    return calls


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """What looks like a virtual environment with vLLM and the plugin."""
    folder = tmp_path / "vllm"
    for module in ("vllm", "bitlab_vllm"):
        (folder / "lib/python3.11/site-packages" / module).mkdir(parents=True)
    (folder / "bin").mkdir()
    (folder / "bin/python").touch()
    return folder


def test_vllm_of_an_environment(
    cli: Cli, states: dict[str, Path], environment: Path, started: list[Any]
) -> None:
    folder = states["deployed"]
    done = cli("serve", folder, "--vllm", environment, "--port", 8123, "--json", "--", "--seed", 1)
    assert done.code == 0, done.error
    ((program, command, variables),) = started
    assert program == str(environment / "bin/python")
    dtype = json.loads((folder / "config.json").read_text())["dtype"]
    named = ["--dtype", "float32"] if dtype == "float32" else []
    assert command == [
        program, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *named,
        "--host", "127.0.0.1", "--port", "8123", "--seed", "1",
    ]  # fmt: skip
    assert variables["VLLM_NO_USAGE_STATS"] == "1"
    assert done.json == {
        "server": "vLLM", "address": "http://127.0.0.1:8123/v1", "command": command,
    }  # fmt: skip


def test_vllm_beside_bitlab_is_found(
    cli: Cli, states: dict[str, Path], started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: name in ("vllm", "fastapi", "uvicorn"))
    assert cli("serve", states["deployed"], "--", "--dtype=bfloat16").code == 0
    assert started[0][0] == sys.executable
    assert "--dtype" not in started[0][1]
    assert cli("serve", states["deployed"], "--with-transformers").code == 0
    assert Path(started[1][0]).name == "transformers"


def test_float32_stays_float32(
    cli: Cli, states: dict[str, Path], environment: Path, started: list[Any], tmp_path: Path
) -> None:
    folder = tmp_path / "single"
    folder.mkdir()
    for file in states["deployed"].iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    assert cli("serve", folder, "--vllm", environment).code == 0
    assert cli("serve", folder, "--vllm", environment, "--", "--dtype", "bfloat16").code == 0
    assert [call[1].count("float32") for call in started] == [1, 0]


def test_transformers_where_there_is_no_vllm(
    cli: Cli, states: dict[str, Path], started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    present = {"fastapi", "uvicorn"}
    monkeypatch.setattr(serve, "find_spec", lambda name: name in present)
    for state in ("float", "latent", "deployed"):
        done = cli("serve", states[state], "--host", "127.0.0.1")
        assert done.code == 0, done.error
        assert "served by transformers at http://127.0.0.1:8000/v1" in done.out.replace("\n", "")
        program, command, _ = started.pop()
        assert command == [
            program, "serve", str(states[state]), "--host", "127.0.0.1", "--port", "8000",
        ]  # fmt: skip
    present.clear()
    error = str(cli("serve", states["deployed"]).error)
    assert "must be installed, got neither\nRun `pip install 'transformers[serving]'`" in error
    assert not started


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--", "--continuous-batching", "--cb-block-size", 32], True),
        (["--", "--continuous-batching", "--no-continuous-batching"], False),
        (["--", "--device", "cpu"], False),
    ],
)
def test_who_batches_with_transformers_is_told(
    cli: Cli,
    states: dict[str, Path],
    environment: Path,
    started: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    options: list[object],
    told: bool,
) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: name in ("fastapi", "uvicorn"))
    done = cli("serve", states["deployed"], "--json", *options)
    assert done.code == 0, done.error
    assert done.json["server"] == "transformers"
    words = "an empty prompt, or one that the cache cannot hold, ends the worker"
    assert (words in done.err) == told
    assert done.err.count("\n") == told
    # vLLM goes on after such prompts, and has an option of that name no more than others.
    done = cli("serve", states["deployed"], "--vllm", environment, *options)
    assert not done.err
    assert len(started) == 2


def test_what_is_refused(
    cli: Cli, states: dict[str, Path], environment: Path, started: list[Any], tmp_path: Path
) -> None:
    latent = cli("serve", states["latent"], "--vllm", environment)
    assert "weight_format must be 'packed' to be served, got 'latent'\nPack" in str(latent.error)
    nowhere = cli("serve", states["deployed"], "--vllm", tmp_path)
    assert "--vllm must be a virtual environment with vLLM" in str(nowhere.error)
    plugin = environment / "lib/python3.11/site-packages/bitlab_vllm"
    plugin.rmdir()
    without = cli("serve", states["deployed"], "--vllm", environment)
    assert "--vllm must be a virtual environment with BitLab's plugin" in str(without.error)
    plugin.mkdir()
    both = cli("serve", states["deployed"], "--vllm", environment, "--with-transformers")
    assert "--vllm must be left out with --with-transformers" in str(both.error)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        used = cli("serve", states["deployed"], "--vllm", environment, "--port", port)
    assert f"must be free to listen on, got 127.0.0.1:{port}: Address already" in str(used.error)
    host = cli("serve", states["deployed"], "--vllm", environment, "--host", "256.0.0.1")
    assert "--host and --port must be free to listen on" in str(host.error)
    assert "must be a folder or a hub name" in str(cli("serve", tmp_path / "none").error)
    assert not started
