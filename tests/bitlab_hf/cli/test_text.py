"""``eval``, ``generate`` and ``chat`` on the demo's model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitcore.errors import ArgumentError
from bitlab_hf import Facts
from bitlab_hf.cli.speaker import _Stream
from bitlab_hf.cli.text import _conversation
from tests.bitlab_hf.interop.stock import build

Cli = Callable[..., Any]
TEXT = "def main():\n    for item in range(10):\n        print(item)\n" * 40


@pytest.fixture
def book(tmp_path: Path) -> Path:
    file = tmp_path / "book.txt"
    file.write_text(TEXT)
    return file


def test_eval(cli: Cli, states: dict[str, Path], book: Path) -> None:
    done = cli("eval", states["float"], "--text", book, "--length", 64, "--json")
    assert done.code == 0, done.error
    found = done.json
    tokenizer = AutoTokenizer.from_pretrained(states["float"])
    ids = [tokenizer.bos_token_id, *tokenizer(TEXT, add_special_tokens=False)["input_ids"]]
    count = len(ids) // 64
    blocks = torch.tensor(ids[: 64 * count]).view(count, 64)
    model = AutoModelForCausalLM.from_pretrained(states["float"]).eval()
    with torch.no_grad():
        loss = model(input_ids=blocks, labels=blocks).loss.item()
    assert found["nats"] == pytest.approx(loss, rel=1e-2)
    assert found["tokens"] == 64 * count
    shown = cli("eval", states["deployed"], "--text", book, "--length", 64, "--tokens", 256).out
    assert "over 256 tokens in blocks of 64" in shown


def test_eval_refuses(cli: Cli, states: dict[str, Path], book: Path, tmp_path: Path) -> None:
    done = cli("eval", states["float"], "--text", book, "--length", 100_000)
    assert "Pass a smaller --length" in str(done.error)
    assert cli("eval", states["float"], "--text", tmp_path / "none.txt").code == 2
    assert cli("eval", states["float"]).code == 2
    bare = build("llama", tmp_path / "bare")
    done = cli("eval", bare, "--text", book)
    assert "must have a tokenizer, got none (Couldn't instantiate" in str(done.error)
    # The whole of what transformers says to it: a list of three ways.
    assert "(3) an equivalent slow tokenizer class" in str(done.error)
    assert ".)\nSave one into the folder" in str(done.error)


def test_text_of_another_encoding(cli: Cli, states: dict[str, Path], tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_bytes(b"a\r\n" * 20_000 + "é".encode("latin-1") + b"tait\n")
    for arguments in (("eval", states["float"]), ("train", states["float"], tmp_path / "out")):
        done = cli(*arguments, "--text", book)
        assert isinstance(done.error, ArgumentError)
        assert f"--text: {book} must be UTF-8, got the byte 0xe9 at position 60000" in str(
            done.error
        )
        assert "iconv" in str(done.error)


def test_generate(cli: Cli, states: dict[str, Path]) -> None:
    prompt = "def main():"
    done = cli("generate", states["deployed"], prompt, "--max-tokens", 12, "--json")
    assert done.code == 0, done.error
    model: Any = AutoModelForCausalLM.from_pretrained(states["deployed"])
    tokenizer = AutoTokenizer.from_pretrained(states["deployed"])
    encoded = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**encoded, max_new_tokens=12, do_sample=False)[0]
    expected = tokenizer.decode(tokens[encoded["input_ids"].shape[1] :], skip_special_tokens=True)
    assert done.json["text"] == expected
    assert done.json["tokens"] == 12
    assert done.json["tokens_per_second"] > 0
    shown = cli("generate", states["deployed"], "-", "--max-tokens", 12, text=prompt)
    assert shown.out == prompt + expected + "\n\n"
    assert "tokens/s" in shown.err
    sampled = [
        cli("generate", states["deployed"], prompt, "--temperature", 1.5, "--seed", seed,
            "--max-tokens", 12, "--json").json["text"]
        for seed in (1, 1, 2)
    ]  # fmt: skip
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.ci
@pytest.mark.parametrize("how", ["exact", "fused"])
def test_compiled(
    how: str, cli: Cli, states: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same text, compiled once; the demo's model repeats itself, and is far from a tie."""
    monkeypatch.setenv("BITLAB_CACHE", str(tmp_path / "cache"))
    command = ("generate", states["deployed"], "def main():", "--max-tokens", 12, "--json")
    plain = cli(*command).json
    assert "compile_seconds" not in plain
    for _ in range(2):
        done = cli(*command, "--compile", how)
        assert done.code == 0, done.error
        assert done.json["text"] == plain["text"]
        assert done.json["tokens"] == plain["tokens"] == 12
        assert done.json["compile_seconds"] > 0
    assert len(list((tmp_path / "cache" / "decoding").glob("*.pt2"))) == 1
    if how == "exact":
        sampling = (*command, "--temperature", 1.5, "--seed", 3)
        assert cli(*sampling, "--compile", how).json["text"] == cli(*sampling).json["text"]
    talk = cli("chat", states["deployed"], "--max-tokens", 4, "--temperature", 0, "--compile", how,
               text="import os\n")  # fmt: skip
    assert talk.code == 0, talk.err
    assert "; compiled in " in talk.err


def test_prompt_lookup(cli: Cli, states: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    command = ("generate", states["deployed"], "import os\nimport sys\nimport", "--max-tokens", 16)
    plain = cli(*command, "--json").json
    done = cli(*command, "--json", "--prompt-lookup", 3)
    assert done.code == 0, done.error
    assert done.json["text"] == plain["text"]
    assert done.json["tokens"] == plain["tokens"] == 16
    assert done.json["tokens_per_second"] > 0
    assert "may be another one" not in done.err + caplog.text
    done = cli("generate", states["float"], "import os", "--max-tokens", 2, "--prompt-lookup", 3)
    assert done.code == 0, done.error
    assert "the text may be another one than without: verify_exactly" in done.err + caplog.text


def test_speed_of_several_tokens_at_a_time(states: dict[str, Path]) -> None:
    stream = _Stream(AutoTokenizer.from_pretrained(states["deployed"]), show=False)
    for count in (5, 1, 3, 2):
        stream.put(torch.zeros(count, dtype=torch.long))
    # The prompt is none of them.
    assert stream.counts == [1, 3, 2]
    assert len(stream.times) == 3


def test_what_does_not_go_together(cli: Cli, states: dict[str, Path]) -> None:
    both = cli("generate", states["deployed"], "x", "--compile", "exact", "--prompt-lookup", 2)
    assert both.code == 2
    assert "it cannot be given with --compile" in both.err
    other = cli("chat", states["float"], "--compile", "exact", "--json", text="x\n")
    assert other.code == 1
    assert "compile_decoding: the model must be deployed" in str(other.error)


def test_chat(cli: Cli, states: dict[str, Path]) -> None:
    lines = "import os\n\n/reset\nimport sys\nimport re\n/quit\nnever read\n"
    done = cli("chat", states["deployed"], "--max-tokens", 4, "--json", "--temperature", 0,
               text=lines)  # fmt: skip
    assert done.code == 0, done.error
    decoder, replies, rest = json.JSONDecoder(), [], done.out.strip()
    while rest:
        reply, end = decoder.raw_decode(rest)
        replies.append(reply)
        rest = rest[end:].strip()
    assert len(replies) == 3
    assert all(reply["tokens"] <= 4 for reply in replies)
    shown = cli("chat", states["deployed"], "--max-tokens", 4, text="import os\n")
    assert shown.code == 0
    assert "tokens/s" in shown.err


def test_conversations() -> None:
    class Tokenizer:
        chat_template: str | None = None

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) for letter in text]}

        def apply_chat_template(self, messages: Any, **options: Any) -> dict[str, list[int]]:
            assert options["add_generation_prompt"]
            return {"input_ids": [len(messages)]}

    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tokenizer = Tokenizer()
    assert _conversation(tokenizer, messages) == [ord(letter) for letter in "a\nb\n"]
    tokenizer.chat_template = "{{ messages }}"
    assert _conversation(tokenizer, messages) == [2]


def test_empty_prompt(cli: Cli, states: dict[str, Path]) -> None:
    done = cli("generate", states["deployed"], "-", text="")
    assert done.code == 1
    assert "at least one token" in str(done.error)


def test_record(cli: Cli, states: dict[str, Path], book: Path, tmp_path: Path) -> None:
    """Figures go into the card; what training recorded comes with the latent model."""
    latent = tmp_path / "latent"
    shutil.copytree(states["latent"], latent)
    Facts(recipe="plain", data="a book").save(latent)
    model = tmp_path / "deployed"
    assert cli("deploy", latent, model).code == 0
    done = cli("eval", model, "--text", book, "--length", 64, "--tokens", 64, "--record", "--json")
    assert cli("generate", model, "def", "--max-tokens", 3, "--record").code == 0
    card = (model / "README.md").read_text()
    assert f"book.txt: 64 tokens in blocks of 64 | {done.json['perplexity']:.3f} |" in card
    assert "| recipe | plain |" in card
    assert "| data | a book |" in card
    assert f"| decoding on the CPU, {torch.get_num_threads()} threads" in card
    refused = cli("generate", "someone/a-model", "def", "--record")
    assert "--record: the model must be a folder" in str(refused.error)
