"""The default way on a real model: the first eight layers of SmolLM2, killed and resumed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bitlab_hf import BitLabConfig, deploy
from tests import processes

pytestmark = pytest.mark.ci

ROOT = Path(__file__).parents[3]
LENGTH = 128
BLOCKS = 16


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What scripts/real_models.py fetches, cut to eight layers, and text of so many samples."""
    folder = tmp_path_factory.mktemp("real")
    fetched = processes.run(
        ROOT / "scripts/real_models.py", folder, "--only", "smollm2", "wikipedia"
    )
    assert fetched.returncode == 0, fetched.stderr
    source, cut = folder / "smollm2-135m", folder / "eight-layers"
    config = AutoConfig.from_pretrained(source, num_hidden_layers=8)
    AutoModelForCausalLM.from_pretrained(source, config=config).save_pretrained(cut)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(cut)
    text = read_text(folder / "wikipedia" / "fit.jsonl")
    ids = tokenizer(text)["input_ids"][: LENGTH * (BLOCKS + 1)]
    (folder / "fit.txt").write_text(tokenizer.decode(ids), encoding="utf-8")
    return folder


def read_text(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()[:400]
    return "\n\n".join(json.loads(line)["text"] for line in lines)


def command(real: Path, output: Path, *options: str) -> list[str]:
    return [
        *(processes.BITLAB, "train", str(real / "eight-layers")),
        *(str(output), "--text", str(real / "fit.txt"), "--length", str(LENGTH), "--batch", "2"),
        *("--save-every", "3", "--threads", "1", *options),
    ]


def kill_when(arguments: list[str], ready: Callable[[], bool]) -> None:
    """Runs a command and kills it, without a word, once something is there."""
    process = processes.start(*arguments)
    try:
        while not ready():
            assert process.is_alive(), "it ended before it could be killed"
            time.sleep(0.05)
    finally:
        process.kill()
        process.join()


def distance(model: Any, wanted: Tensor, ids: Tensor) -> float:
    """Returns the divergence of a model's next tokens from wanted ones, in nats a token."""
    with torch.no_grad():
        found = model.eval()(input_ids=ids).logits.log_softmax(-1)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def test_killed_and_resumed_it_is_the_same_and_far_below_rounding(
    real: Path, tmp_path: Path
) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    processes.run(*command(real, straight)).check_returncode()
    run = resumed / "run"
    kill_when(
        command(real, resumed),
        lambda: len(list((run / "calibration").glob("*.safetensors"))) >= 20,
    )
    kill_when(
        command(real, resumed, "--resume"),
        lambda: (run / "checkpoint-3/trainer_state.json").exists(),
    )
    processes.run(*command(real, resumed, "--resume")).check_returncode()
    files = [folder / "model.safetensors" for folder in (straight, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()

    tokenizer = AutoTokenizer.from_pretrained(real / "eight-layers")
    text = read_text(real / "wikipedia" / "test.jsonl")
    ids = torch.tensor(tokenizer(text)["input_ids"][: 8 * LENGTH]).view(8, LENGTH)
    model = load(resumed)
    config = model.config.quantization_config.to_dict()
    assert (config["weight_granularity"], config["group_size"]) == ("per_group", 64)
    latent = model.eval()(input_ids=ids[:1]).logits
    original = load(real / "eight-layers")
    rounding = BitLabConfig(weight_granularity="per_group", group_size=64)
    rounded = load(real / "eight-layers", quantization_config=rounding)
    with torch.no_grad():
        wanted = original.eval()(input_ids=ids).logits.log_softmax(-1)
    assert distance(model, wanted, ids) < 0.5 * distance(rounded, wanted, ids)
    deploy(model).save_pretrained(tmp_path / "deployed")
    assert torch.equal(load(tmp_path / "deployed")(input_ids=ids[:1]).logits, latent)
