"""vLLM itself on deployed folders: the tokens of transformers."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.bitlab_vllm.conftest import variables
from tests.bitlab_vllm.models import CASES, make_all

pytestmark = pytest.mark.ci
# Of log-probabilities. A float32 sum in another order can move an int8 code by one, and a bfloat16
# model rounds each result.
TOLERANCE = {"float32": 2e-2, "bfloat16": 0.2}


class Job(NamedTuple):
    """A folder, over how many processes, and whether these share experts by vLLM's option."""

    folder: Path
    processes: int = 1
    expert_parallel: bool = False


def change(folder: Path, target: Path, **fields: Any) -> Path:
    """A copy of a folder with other fields in its quantization_config."""
    target.mkdir()
    for file in folder.iterdir():
        if file.is_file() and file.name != "config.json":
            (target / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= fields
    (target / "config.json").write_text(json.dumps(config))
    return target


def run(
    environment: Path, *jobs: Job, compiled: bool = False, spread: bool = False
) -> dict[str, dict[str, Any]]:
    """What vLLM gives for folders, by their names."""
    given = {
        "jobs": [{**job._asdict(), "folder": str(job.folder)} for job in jobs],
        "compiled": compiled,
        "spread": spread,
    }
    done = subprocess.run(
        [environment / "bin/python", Path(__file__).with_name("worker.py"), json.dumps(given)],
        capture_output=True, text=True, check=False, env=variables(), timeout=1500,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"name"')]
    found = {one["name"]: one for one in map(json.loads, lines)}
    assert len(found) == len(jobs) + 1, done.stdout[-3000:] + done.stderr[-3000:]
    # vLLM's transformers is too old for them.
    assert found.pop("imported")["others"] == []
    return found


def differences(folder: Path, found: dict[str, Any]) -> str:
    """What of a folder's answers is not transformers', empty if nothing."""
    if "error" in found:
        return str(found["trace"][-2000:])
    expected = json.loads((folder / "answers.json").read_text())
    dtype = json.loads((folder / "config.json").read_text())["dtype"]
    compared, tolerance = 0, TOLERANCE[dtype]
    for at, leads in enumerate(expected["leads"]):
        # From the first token on that the tolerance leaves open, either way, anything may follow.
        close = (place for place, lead in enumerate(leads) if lead < 2 * tolerance)
        sure = next(close, len(leads))
        ours, theirs = (one["greedy"][at][:sure] for one in (found, expected))
        if ours != theirs:
            return f"{ours} for {theirs}"
        count = len(expected["prompts"][at]) - 1 + sure
        pairs = zip(found["logprobs"][at][:count], expected["logprobs"][at][:count], strict=True)
        wrong = [pair for pair in pairs if not abs(pair[0] - pair[1]) <= tolerance]
        if wrong:
            return f"log-probabilities differ: {wrong}"
        compared += sure
    total = sum(map(len, expected["leads"]))
    return "" if compared >= total / 2 else f"only {compared} of {total} tokens are sure"


def check(models: Path, found: dict[str, dict[str, Any]]) -> None:
    wrong = {name: differences(models / name, one) for name, one in found.items()}
    assert not any(wrong.values()), wrong


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_all(folder, list(CASES))
    return folder


def test_one_process(vllm_environment: Path, models: Path, tmp_path: Path) -> None:
    """All architectures and schemes, and what is refused, by one start of vLLM."""
    base = models / "llama-tensor"
    latent = change(base, tmp_path / "latent", weight_format="latent")
    newer = change(base, tmp_path / "newer", format_version=99)
    batch = change(base, tmp_path / "batch", activation_granularity="per_tensor")
    incomplete = change(base, tmp_path / "incomplete", weight_granularity="per_channel")
    uneven = change(base, tmp_path / "uneven")
    refused = [*map(Job, (latent, newer, batch, incomplete)), Job(uneven, 3)]
    found = run(vllm_environment, *refused, *(Job(models / name) for name in CASES))
    messages = {one.folder.name: found.pop(one.folder.name).get("error", "") for one in refused}
    check(models, found)
    assert found.keys() == CASES.keys()
    assert "weight_format must be 'packed' to be served, got 'latent'" in messages["latent"]
    assert "bitlab deploy" in messages["latent"]
    assert "format_version must be at most" in messages["newer"]
    assert "got 99: the checkpoint was written by a newer BitLab" in messages["newer"]
    assert "activation_granularity of quantization_config must be" in messages["batch"]
    assert ".qweight_scale must be torch.float32 [" in messages["incomplete"]
    assert "must be divisible by tensor parallel size (3)" in messages["uneven"]


def test_two_processes(vllm_environment: Path, models: Path) -> None:
    """Int8 layers, groups cut in the middle, one head of keys for both; a tied int8 embedding and
    a ternary one; experts, and such by vLLM's option beside a shared one.
    """
    names = "qwen3-mixed", "gemma3", "ternary-tied", "qwen3-moe"
    jobs = [Job(models / name, 2) for name in names] + [Job(models / "qwen2-moe", 2, True)]
    check(models, run(vllm_environment, *jobs, spread=True))


def test_compiled(vllm_environment: Path, models: Path) -> None:
    names = "qwen3-mixed", "qwen3-moe"
    check(models, run(vllm_environment, *(Job(models / name) for name in names), compiled=True))
