"""The demo's parts, and one short run of all of it through the command line."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitlab_hf.demo.run
from bitcore.errors import MissingExtraError
from bitlab_hf.demo.corpus import HELDOUT_MODULUS, source_files, split_of
from bitlab_hf.demo.terminal import printable
from bitlab_hf.demo.text import Blocks, make_blocks, measure_perplexity
from tests import processes

MODEL = Path(str(files("bitlab_hf.demo") / "model"))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return processes.run(processes.BITLAB, *arguments)


def test_split_is_by_path_and_disjoint() -> None:
    sides: dict[str, set[str]] = {
        side: {file.path for file in source_files(side, with_tests=True)}  # type: ignore[arg-type]
        for side in ("train", "heldout")
    }
    assert not sides["train"] & sides["heldout"]
    assert len(sides["heldout"]) >= 10
    for side, paths in sides.items():
        assert all(split_of(path) == side for path in paths)
    # Fixed for ever: another split would score what the shipped model was trained on.
    assert HELDOUT_MODULUS == 20
    assert split_of("operator.py") == "heldout"
    assert split_of("os.py") == "train"
    found = sides["train"] | sides["heldout"]
    assert not any(
        part in path for path in found for part in ("site-packages", "_sysconfigdata", "encodings/")
    )


def test_perplexity_of_a_uniform_model_is_the_vocabulary() -> None:
    class Uniform(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids: torch.Tensor) -> Any:
            class Output:
                logits = torch.zeros(*input_ids.shape, 50)

            return Output

    blocks = Blocks(torch.randint(0, 50, (5, 12)), bytes_per_token=2.0)
    result = measure_perplexity(Uniform(), blocks, batch=2)
    assert result.value == pytest.approx(50, rel=1e-6)
    assert result.bits_per_byte == pytest.approx(math.log2(50) / 2, rel=1e-6)


def test_what_a_terminal_is_given() -> None:
    kept = "plain text, \u00e9, \u4e16\u754c, \U0001f600\u200d\n\t[bold]"
    assert printable(kept) == kept
    assert printable("\x1b[2J\r\x07\x9b\u202e\ud800") == r"\x1b[2J\r\x07\x9b\u202e\ud800"


def test_blocks_hold_the_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    held_out = list(source_files("heldout"))
    blocks = make_blocks(tokenizer, held_out, 64)
    text = tokenizer.decode(blocks.ids.flatten().tolist())
    joined = "".join(tokenizer.bos_token + file.text for file in held_out)
    assert joined.startswith(text)
    size = sum(len(file.text.encode()) for file in held_out)
    assert blocks.bytes_per_token == pytest.approx(size / blocks.ids.numel(), rel=1e-3)
    with pytest.raises(ValueError, match="at least 64 tokens"):
        make_blocks(tokenizer, [], 64)


def test_the_shipped_model() -> None:
    assert sum(f.stat().st_size for f in MODEL.iterdir()) <= 12_000_000
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    assert model.dtype == torch.bfloat16
    assert 4e6 < sum(p.numel() for p in model.parameters()) < 6e6
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    blocks = make_blocks(tokenizer, source_files("heldout"), 512).first(20_000)
    assert measure_perplexity(model.float(), blocks).value < 20


@pytest.mark.ci
def test_short_run_through_the_command_line(tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = run("demo", "--tokens", "6000", "--quick", "--output", str(output), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert json.loads((output / "report.json").read_text()) == report
    assert report["logits_identical"] is True
    # Six thousand tokens already undo much of the damage of rounding.
    assert report["ternary"]["nats"] < report["rounded"]["nats"]
    assert report["original"]["nats"] < report["ternary"]["nats"]
    assert report["ternary_bytes"] == (output / "model.safetensors").stat().st_size
    assert report["ternary_bytes"] < 0.3 * report["original_bytes"]
    for name in ("original_probe", "ternary_probe"):
        assert report[name]["tokens_per_second"] > 0
        assert report[name]["resident_bytes"] > 0
        assert len(report[name]["texts"]) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    # As `bitlab train` would: a block a step, where blocks are few.
    state = json.loads((output / "run" / "trainer_state.json").read_text())
    assert (state["train_batch_size"], state["max_steps"]) == (1, 6000 // 512)
    assert "bit-identical" in done.stderr
    assert "Scales of the weights: per group of 128 (7-bit" in " ".join(done.stderr.split())


def write_articles(folder: Path) -> Path:
    """Makes a text as scripts/real_models.py does, of what the shipped model knows."""
    folder.mkdir()
    for part, side in (("fit", "train"), ("test", "heldout")):
        articles = list(source_files(side))[:12]  # type: ignore[arg-type]
        lines = [json.dumps({"title": one.path, "text": one.text}) for one in articles]
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.ci
def test_a_model_and_a_text_of_ones_own_killed_and_resumed(tmp_path: Path) -> None:
    text, output = write_articles(tmp_path / "text"), tmp_path / "out"
    command = ["demo", "--quick", "--json", "--tokens", "6000", "--resume"]
    command += ["--model", str(MODEL), "--text", str(text), "--output", str(output)]
    process = processes.start(processes.BITLAB, *command)
    calibration = output / "run" / "calibration"
    while process.is_alive() and len(list(calibration.glob("*.safetensors"))) < 9:
        time.sleep(0.02)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it ended before it could be killed"
    kept = {file: file.stat().st_mtime_ns for file in calibration.glob("*.safetensors")}
    assert kept
    done = run(*command)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["finetuned"] is None
    assert report["original"]["nats"] < report["ternary"]["nats"] < report["rounded"]["nats"]
    begun = [json.loads(line)["text"] for line in (text / "test.jsonl").read_text().splitlines()]
    assert report["prompts"] == [" ".join(one.split()[:12]) for one in begun[:3]]
    assert len(report["ternary_probe"]["texts"]) == 3
    assert not calibration.exists()
    assert not list((output / "run").glob("checkpoint-*"))


def test_text_that_is_not_there(tmp_path: Path) -> None:
    text = write_articles(tmp_path / "text")
    (text / "test.jsonl").write_text("{}\n")
    done = run("demo", "--model", str(MODEL), "--text", str(text))
    assert done.returncode == 1
    assert "test.jsonl, line 1 must be an object with a text" in " ".join(done.stderr.split())
    (text / "test.jsonl").unlink()
    done = run("demo", "--model", str(MODEL), "--text", str(text))
    assert done.returncode == 1
    assert "--text must be a folder with fit.jsonl and test.jsonl" in " ".join(done.stderr.split())


def test_usage() -> None:
    assert run("demo", "--tokens", "0").returncode == 2


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtraError, match=r"pip install \"\.\[train\]\""):
        bitlab_hf.demo.run._require_accelerate()
