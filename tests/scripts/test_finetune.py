"""The fine-tuning script: files, resuming, two processes, bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitlab_hf import BitLabConfig, save
from bitlab_hf.demo.corpus import source_files
from tests import processes

pytestmark = pytest.mark.ci
SCRIPT = Path(__file__).parents[2] / "scripts" / "finetune.py"
MODEL = str(files("bitlab_hf.demo") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for index, file in zip(range(4), source_files("heldout"), strict=False):
        (folder / f"{index}.txt").write_text(file.text)
    (folder / "3.txt").rename(folder / "3.jsonl")
    (folder / "3.jsonl").write_text(json.dumps({"title": "3", "text": file.text}) + "\n")
    return folder


def run(*arguments: object, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    given = [SCRIPT, *map(str, arguments)]
    return processes.launch(*launcher, *given, timeout=300) if launcher else processes.run(*given)


def options(text: Path, output: Path, steps: int, **more: Any) -> list[object]:
    values = {"model": MODEL, "data": text, "output": output, "max-steps": steps, "save-steps": 2,
              "block": 64, "batch": 2, "quant-warmup": 0.5, **more}  # fmt: skip
    return [item for name, value in values.items() for item in (f"--{name}", value)] + ["--cpu"]


def result(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "finetune.json").read_text())
    return found


def test_trains_resumes_and_deploys(text: Path, tmp_path: Path) -> None:
    scheme = ("--group-size", 64)
    done = run(*options(text, tmp_path, 4), *scheme)
    assert done.returncode == 0, done.stderr
    told = " ".join(done.stderr.split())
    assert "scales of the weights: per group of 64 (7-bit" in told
    assert (
        "calibrated on 128 examples (more if they hold less than 20 tokens an input), learns"
        in told
    )
    assert "rates 0.0002, scales 0.0004, norms and biases 0.0014" in told
    assert "by theirs, warmed up over 0.5 of the run; 2 examples a step" in told
    optimizer = torch.load(tmp_path / "checkpoints" / "checkpoint-4" / "optimizer.pt")
    assert {one["betas"] for one in optimizer["param_groups"]} == {(0.9, 0.95)}
    first = result(tmp_path)
    assert first["resumed_from"] is None
    assert first["perplexity_trained"] < first["perplexity_ternarized_untrained"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.hf_quantizer.quantization_config.group_size == 64
    AutoTokenizer.from_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "| recipe | default, warmed up over 0.5 of the run |" in card
    done = run(*options(text, tmp_path, 6, **{"learning-rate": 1e-6}), *scheme)
    assert done.returncode == 1
    assert "was begun with, learning_rate 0.0002, got learning_rate 1e-06" in done.stderr
    done = run(*options(text, tmp_path, 6), *scheme)
    assert done.returncode == 0, done.stderr
    assert result(tmp_path)["resumed_from"] == "checkpoint-4"
    assert result(tmp_path)["steps"] == 6


@pytest.mark.parametrize(
    "launcher",
    [
        ("accelerate", "launch", "--cpu", "--num_processes", "1"),
        ("torchrun", "--standalone", "--nproc-per-node", "2"),
    ],
    ids=["accelerate", "two processes"],
)
def test_launchers(text: Path, tmp_path: Path, launcher: tuple[str, ...]) -> None:
    program = str(Path(sys.executable).with_name(launcher[0]))
    done = run(*options(text, tmp_path, 2), launcher=(program, *launcher[1:]))
    assert done.returncode == 0, done.stderr
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_taught_teacher_in_two_processes(text: Path, tmp_path: Path) -> None:
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    launcher = (torchrun, "--standalone", "--nproc-per-node", "2")
    done = run(*options(text, tmp_path, 2), "--teach", launcher=launcher)
    assert done.returncode == 0, done.stderr
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoints" / "teacher" / "model")
    before = AutoModelForCausalLM.from_pretrained(MODEL).lm_head.weight
    assert 0 < (teacher.lm_head.weight - before).abs().max() < 1e-2
    assert "| recipe | teach, warmed up" in (tmp_path / "README.md").read_text()


def test_files_that_are_read(tmp_path: Path) -> None:
    """Of a folder, in the order of their names: texts, and the texts of JSON lines."""
    sys.path.insert(0, str(SCRIPT.parent))
    from finetune import read_blocks

    class Letters:
        eos_token_id = None

        def __call__(self, texts: list[str], **_options: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[*map(ord, one)] for one in texts]}

    (tmp_path / "a.txt").write_text("abcde")
    (tmp_path / "b.jsonl").write_text('{"text": "fgh"}\n{"text": "ij"}\n')
    (tmp_path / "c.md").write_text("xyz")
    found = read_blocks(Letters(), [str(tmp_path)], None, 2)
    assert sorted(map(tuple, found.tolist())) == [
        (97, 98), (99, 100), (101, 102), (103, 104), (105, 106)
    ]  # fmt: skip


def test_bad_input(text: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("  ")
    (tmp_path / "raw.jsonl").write_text('{"words": "no text"}\n')
    for data, message in (
        ([tmp_path / "empty.txt"], "--data must hold text"),
        ([tmp_path / "raw.jsonl"], "raw.jsonl, line 1 must be an object with a text"),
        ([text, "--block", 10**7], "Pass a smaller --block or more text"),
        ([tmp_path / "a.txt", tmp_path / "b.txt"], "--data must name existing files"),
        ([text, "--block", 0], "--block must be at least 2 tokens, got 0"),
        ([text, "--block", 1], "--block must be at least 2 tokens, got 1"),
    ):
        done = run("--model", MODEL, "--output", tmp_path / "out", "--data", *data)
        assert done.returncode != 0
        assert message in done.stderr


def test_lora(text: Path, tmp_path: Path) -> None:
    config = BitLabConfig(mode="infer")
    model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config)
    save(model, tmp_path / "base", tokenizer=AutoTokenizer.from_pretrained(MODEL))
    script = Path(__file__).parents[2] / "scripts" / "finetune_lora.py"
    command = [script, "--model", tmp_path / "base", "--data", *text.glob("*.txt"),
               "--output", tmp_path / "out", "--block", 32, "--batch", 2, "--max-steps", 12,
               "--rank", 4, "--cpu"]  # fmt: skip
    done = processes.run(*map(str, command))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["reloaded_bit_for_bit"]
    assert result["last_loss"] < result["first_loss"]
    assert "drift" in done.stdout
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    assert merged.hf_quantizer is not None
