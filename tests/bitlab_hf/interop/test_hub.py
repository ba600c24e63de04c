"""Push with the real client to a small hub on loopback, and load from there."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitcore.errors import ArgumentError, CheckpointError
from bitlab_hf import BitLabConfig, push, save
from tests.bitlab_hf.interop.hub_server import TOKEN, Hub, serve
from tests.bitlab_hf.interop.stock import ROOT
from tests.processes import BITLAB, Elsewhere

pytestmark = pytest.mark.ci

DEMO = ROOT / "bitlab_hf/demo/model"
# The client reads its settings when it is imported, so it runs in processes of its own.
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("me/model")
tokenizer = AutoTokenizer.from_pretrained("me/model")
torch.save(model(input_ids=torch.arange(3, 27).view(1, 24)).logits.detach(), sys.argv[1])
print(tokenizer("def main():")["input_ids"])
"""


PUSH = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
from bitcore.errors import ArgumentError, CheckpointError
from bitlab_hf import BitLabConfig, push
latent = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=BitLabConfig())
try:
    push(latent, "me/latent")
except ArgumentError as error:
    print(error)
model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
push(model, "me/model", tokenizer=AutoTokenizer.from_pretrained(sys.argv[2]))
model.push_to_hub("me/other", private=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deployed model in shards, among things that must not be uploaded."""
    path = tmp_path_factory.mktemp("push") / "deployed"
    model = AutoModelForCausalLM.from_pretrained(
        DEMO, quantization_config=BitLabConfig(mode="infer")
    )
    save(model, path, tokenizer=AutoTokenizer.from_pretrained(DEMO), max_shard_size="1MB")
    (path / "checkpoint-5").mkdir()
    (path / "checkpoint-5/model.safetensors").write_bytes(b"latent")
    for name in ("optimizer.pt", "training_args.bin", "trainer_state.json", "old.safetensors"):
        (path / name).write_bytes(b"{}")
    return path


@pytest.fixture(scope="module")
def port() -> int:
    """A free one; nobody else is likely to be given it soon."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def processes(port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elsewhere]:
    """Of clients of the hub on that port."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str(tmp_path_factory.mktemp("client") / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
        "no_proxy": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    server = Elsewhere(Path(sys.executable), environment, "tests.preloaded")
    yield server
    server.close()


@pytest.fixture
def client(processes: Elsewhere) -> Elsewhere:
    """With nothing in its cache."""
    shutil.rmtree(processes.environment["HF_HOME"], ignore_errors=True)
    return processes


@pytest.fixture
def hub(port: int) -> Iterator[Hub]:
    with serve(port) as running:
        yield running


def push_by_command(
    client: Elsewhere, folder: Path, *options: str, token: str = TOKEN
) -> subprocess.CompletedProcess[str]:
    return client.run(BITLAB, "push", folder, "me/model", *options, HF_TOKEN=token)


def test_push_and_load(hub: Hub, client: Elsewhere, folder: Path, tmp_path: Path) -> None:
    """Through a hub that fails once in every way, bytes arrive equal and the model loads."""
    hub.faults += [
        ("POST", "/preupload/", 429),
        ("PUT", "/lfs/", 500),
        ("PUT", "/lfs/", "cut"),
        ("GET", "/resolve/", "cut"),
    ]
    done = push_by_command(client, folder, "--json")
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["me/model"]
    assert json.loads(done.stdout)["commit"].endswith(repository.sha)
    assert repository.private
    weights = sorted(file.name for file in folder.glob("model-*.safetensors"))
    assert len(weights) > 1
    others = {"config.json", "generation_config.json", "README.md", "tokenizer.json",
              "tokenizer_config.json", "model.safetensors.index.json"}  # fmt: skip
    assert set(repository.files) == {*weights, *others}
    for name in {*weights, *others} - {"README.md"}:
        assert repository.files[name] == (folder / name).read_bytes(), name
    card = repository.files["README.md"].decode()
    assert 'from_pretrained("me/model")' in card
    assert "\n# me/model\n" in card
    loaded = client.run("-c", LOAD, tmp_path / "logits.pt")
    assert loaded.returncode == 0, loaded.stderr
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = model(input_ids=torch.arange(3, 27).view(1, 24)).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)
    assert not [fault for fault in hub.faults if fault[0] != "GET"]


def test_push_of_a_model(hub: Hub, client: Elsewhere, folder: Path, tmp_path: Path) -> None:
    """Ours and transformers' own: the same weights and configuration."""
    done = client.run("-c", PUSH, DEMO, folder)
    assert done.returncode == 0, done.stderr
    assert "must be packed, got latent ones" in done.stdout
    assert set(hub.repositories) == {"me/model", "me/other"}
    ours, theirs = hub.repositories["me/model"], hub.repositories["me/other"]
    assert ours.private
    assert "# me/model" in ours.files["README.md"].decode()
    assert ours.files["config.json"] == theirs.files["config.json"]
    # Not the bytes: safetensors writes its metadata in any order.
    weights, others = (load(hub.files["model.safetensors"]) for hub in (ours, theirs))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    for shard in folder.glob("model-*.safetensors"):
        for name, tensor in load(shard.read_bytes()).items():
            assert torch.equal(weights.pop(name), tensor)
    assert not weights
    loaded = client.run("-c", LOAD, tmp_path / "logits.pt")
    assert loaded.returncode == 0, loaded.stderr


def test_again_sends_nothing_twice_and_removes_old_weights(
    hub: Hub, client: Elsewhere, folder: Path
) -> None:
    # The first time, the hub goes away for good before the commit.
    hub.faults += [("POST", "/commit/", 403)]
    first = push_by_command(client, folder)
    assert first.returncode == 1
    assert "me/model must accept the upload, got 403" in first.stderr
    assert "Traceback" not in first.stderr
    assert not hub.repositories["me/model"].files
    sent = [request for request in hub.requests if request[0] == "PUT"]
    assert sent
    hub.requests.clear()
    hub.repositories["me/model"].files["model.safetensors"] = b"of an older upload"
    assert push_by_command(client, folder).returncode == 0
    assert not [request for request in hub.requests if request[0] == "PUT"]
    assert "model.safetensors" not in hub.repositories["me/model"].files


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (("POST", "/api/repos/create", 500), "got 500"),
        (("POST", "/api/repos/create", 429), "Wait a while and run the command again"),
        (("POST", "/commit/", 409), "Something else writes to it"),
        (("POST", "/api/repos/create", "cut"), "the hub must be reachable"),
    ],
)
def test_faults_are_explained(
    fault: tuple[str, str, int | str], message: str, hub: Hub, client: Elsewhere, folder: Path
) -> None:
    hub.faults.append(fault)
    done = push_by_command(client, folder)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("hub")
def test_a_wrong_token(client: Elsewhere, folder: Path) -> None:
    done = push_by_command(client, folder, token="hf_wrong")
    assert done.returncode == 1
    assert "got 401" in done.stderr
    assert "hf auth login" in done.stderr


def test_public_only_when_asked(hub: Hub, client: Elsewhere, folder: Path) -> None:
    assert push_by_command(client, folder, "--public").returncode == 0
    assert not hub.repositories["me/model"].private


def test_what_is_not_uploaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitlab_hf.interop.hub.get_token", lambda: None)
    with pytest.raises(ArgumentError, match="a token must be given, got none"):
        push(folder, "me/model")
    # A name that leads out of the folder in which a model is written first, too.
    for given, name in (
        (folder, "me/my/model"),
        (AutoModelForCausalLM.from_pretrained(folder), "me/.."),
    ):
        with pytest.raises(ArgumentError, match="repo_id must be 'name/model'"):
            push(given, name)
    with pytest.raises(ArgumentError, match="must hold a ternary model, got floats"):
        push(DEMO, "me/model")
    with pytest.raises(ArgumentError, match="must be left out for a folder"):
        push(folder, "me/model", tokenizer=AutoTokenizer.from_pretrained(DEMO))
    with pytest.raises(ArgumentError, match="must hold config.json"):
        push(tmp_path, "me/model")
    latent = tmp_path / "latent"
    shutil.copytree(folder, latent)
    config = json.loads((latent / "config.json").read_text())
    config["quantization_config"]["weight_format"] = "latent"
    (latent / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArgumentError, match="must be packed, got latent ones"):
        push(latent, "me/model")
    with pytest.raises(ArgumentError, match="a token must be given"):
        push(latent, "me/model", latent=True)


def test_only_known_files_are_taken(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    taken: list[str] = []

    def commit(_api: object, _repo: str, operations: list[Any], **_options: object) -> Any:
        taken.extend(operation.path_in_repo for operation in operations)
        return SimpleNamespace(commit_url="there")

    monkeypatch.setattr(HfApi, "create_repo", lambda *_args, **_options: None)
    monkeypatch.setattr(HfApi, "list_repo_files", lambda *_args: [])
    monkeypatch.setattr(HfApi, "create_commit", commit)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    secret = tmp_path / "id_rsa"
    secret.write_text("PRIVATE")
    (copy / "vocab.json").symlink_to(secret)
    others = ("secrets.json", "notes.txt", "a.model", "b.jinja", "pytorch_model.bin")
    for name in others:
        (copy / name).write_text("{}")
    assert push(copy, "me/model", token="hf_x") == "there"
    weights = {file.name for file in folder.glob("model-*.safetensors")}
    assert set(taken) == {
        *weights, "config.json", "generation_config.json", "README.md", "tokenizer.json",
        "tokenizer_config.json", "model.safetensors.index.json",
    }  # fmt: skip
    for name in (*others, "optimizer.pt", "vocab.json"):
        assert repr(name) in caplog.text, name
    for name in ("config.json", min(weights)):
        (copy / name).rename(copy / "elsewhere")
        (copy / name).symlink_to("elsewhere")
        with pytest.raises(ArgumentError, match=f"{name} must be a file of the folder itself"):
            push(copy, "me/model", token="hf_x")
        (copy / "elsewhere").replace(copy / name)
    index = copy / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["x"] = "optimizer.pt"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="must name safetensors files, got 'optimizer.pt'"):
        push(copy, "me/model", token="hf_x")


@pytest.mark.parametrize(
    ("network", "arguments"),
    [
        (True, ("import", "me/none", "OUT")),
        (True, ("deploy", "me/none", "OUT")),
        (True, ("generate", "me/none", "hello")),
        (False, ("import", "me/none", "OUT")),
    ],
)
def test_what_is_not_there(
    network: bool, arguments: tuple[str, ...], port: int, client: Elsewhere, tmp_path: Path
) -> None:
    """One message that names the repository, a code for scripts, and nothing written."""
    output = tmp_path / "out"
    given = [str(output) if word == "OUT" else word for word in arguments]
    with serve(port) if network else nullcontext():
        done = client.run(BITLAB, *given)
    assert done.returncode == 1
    # The client tells of its retries before.
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    said = "is not a valid model identifier" if network else "We couldn't connect"
    assert message.startswith("error: me/none: the model must be a folder, or on the hub")
    assert said in message
    assert "Traceback" not in done.stderr
    assert not output.exists()


@pytest.mark.usefixtures("hub")
def test_no_token(client: Elsewhere, folder: Path) -> None:
    done = push_by_command(client, folder, token="")
    assert done.returncode == 1
    assert "hf auth login" in done.stderr
    assert "Traceback" not in done.stderr
