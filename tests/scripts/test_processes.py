"""The fine-tuning script in several processes: two launchers, as on two machines; a process that is
killed, and what torchrun starts again.
"""

from __future__ import annotations

import json
import socket
import sys
from contextlib import ExitStack
from importlib.resources import files
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from bitlab_hf.demo.corpus import source_files
from tests.processes import ROOT, Program

pytestmark = pytest.mark.ci
SCRIPT = str(ROOT / "scripts" / "finetune.py")
KILLED = str(Path(__file__).with_name("killed.py"))
TORCHRUN = str(Path(sys.executable).with_name("torchrun"))
# Losses are logged at every tenth step, as the mean of the steps since: the same of a run that goes
# on from a checkpoint, where that is a tenth step too.
STEPS, SAVE_STEPS = 22, 10
RESTARTS = "--standalone", "--nproc-per-node", 2, "--max-restarts", 1
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("given")
    tokenizer = AutoTokenizer.from_pretrained(str(files("bitlab_hf.demo") / "model"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    text = next(iter(source_files("heldout"))).text
    (folder / "text.txt").write_text(text[:40_000])
    return folder


def start(
    given: Path,
    output: Path,
    *launcher: object,
    script: tuple[str, ...] = (SCRIPT,),
    environment: dict[str, str] | None = None,
) -> Program:
    command = [
        TORCHRUN, *launcher, *script, "--model", given / "model", "--data", given / "text.txt",
        "--output", output, "--max-steps", STEPS, "--save-steps", SAVE_STEPS, "--block", 64,
        "--batch", 2, "--group-size", 64, "--cpu",
    ]  # fmt: skip
    return Program(*map(str, command), PYTHONPATH=str(ROOT), **(environment or {}))


def finish(*programs: Program, well: bool = True) -> list[str]:
    """Returns what they said, once all have ended; a launcher that fails ends the others."""
    with ExitStack() as stack:
        for program in programs:
            stack.callback(program.close)
        said = []
        for program in programs:
            done = program.end()
            said.append(done.stdout + done.stderr)
            assert (done.returncode == 0) == well, said[-1][-5000:]
        return said


@pytest.fixture(scope="module")
def straight(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes of one launcher, which nothing stops."""
    output = tmp_path_factory.mktemp("straight")
    finish(start(given, output, "--standalone", "--nproc-per-node", 2))
    assert result(output)["resumed_from"] is None
    return output


def result(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "finetune.json").read_text())
    return found


def losses(output: Path) -> list[float]:
    state = output / "checkpoints" / f"checkpoint-{STEPS}" / "trainer_state.json"
    history = json.loads(state.read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def checkpoints(output: Path) -> set[str]:
    return {path.name for path in (output / "checkpoints").glob("*checkpoint-*")}


def assert_same_run(output: Path, expected: Path) -> None:
    """Losses, latent weights and the deployed file, bit for bit."""
    assert losses(output) == losses(expected)
    assert len(losses(output)) == 2
    for what in ("perplexity_trained", "steps"):
        assert result(output)[what] == result(expected)[what]
    assert checkpoints(output) == checkpoints(expected)
    for file in (f"checkpoints/checkpoint-{STEPS}/model.safetensors", "model.safetensors"):
        found, other = load_file(output / file), load_file(expected / file)
        assert found.keys() == other.keys()
        assert all(torch.equal(found[key], other[key]) for key in found), file


def test_two_launchers_are_one(given: Path, straight: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launchers = [
        start(
            given, tmp_path, "--nnodes", 2, "--node-rank", rank, "--nproc-per-node", 1,
            "--master-addr", "127.0.0.1", "--master-port", port,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    said = finish(*launchers)
    assert_same_run(tmp_path, straight)
    # One process writes, and says what came of it.
    assert ["perplexity_trained" in text for text in said] == [True, False]
    states = {f"rng_state_{rank}.pth" for rank in (0, 1)}
    assert states <= {
        path.name for path in (tmp_path / f"checkpoints/checkpoint-{STEPS}").iterdir()
    }


@pytest.mark.parametrize(("rank", "when"), [(1, "stepping"), (0, "saving")])
def test_a_killed_process(
    given: Path, straight: Path, tmp_path: Path, rank: int, when: str
) -> None:
    """torchrun starts all anew; they go on from the last whole checkpoint, to the same end."""
    script = KILLED, str(rank), when, SCRIPT
    (said,) = finish(start(given, tmp_path, *RESTARTS, script=script, environment=OWN_STORE))
    assert "Signal 9 (SIGKILL)" in said or "exitcode: -9" in said
    assert result(tmp_path)["resumed_from"] == "checkpoint-10"
    assert_same_run(tmp_path, straight)


def test_restarts_that_would_fail_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_from_file_location("finetune", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    script.check_restarts()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(SystemExit, match="--max-restarts must be 0 with a store of its own, got 3"):
        script.check_restarts()


def test_machines_that_do_not_share_the_output(given: Path, straight: Path, tmp_path: Path) -> None:
    """The second one has none of the checkpoints: it would train from the start."""
    code = (
        "import os, runpy, sys\n"
        "if os.environ['RANK'] == '1': sys.argv[sys.argv.index('--output') + 1] += '-elsewhere'\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    other = tmp_path / "elsewhere.py"
    other.write_text(code.replace("sys.argv[0]", repr(SCRIPT)))
    output = tmp_path / "out"
    output.symlink_to(straight)
    launcher = "--standalone", "--nproc-per-node", 2
    (said,) = finish(start(given, output, *launcher, script=(str(other),)), well=False)
    assert "--output must be a folder that all machines share, got" in said
    assert f"None, checkpoint-{STEPS}" in said
