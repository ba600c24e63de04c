"""Tokenizers of SentencePiece's kind: there and back, and llama.cpp's own tokens in CI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from bitcore.errors import ArgumentError
from bitlab_hf import export_gguf
from bitlab_hf.demo.corpus import source_files
from bitlab_hf.interop.gguf_file import read_gguf
from bitlab_hf.interop.gguf_tokenizer import rebuild_tokenizer
from tests.bitlab_hf.interop.test_gguf import build

SPACE = "\u2581"
TEXTS = [
    "def main(argument):\n    return argument + 1\n", "  two  spaces ", "naïve Größe 日本語 🙂",
    "a", "", "the same the same", "\t\ttabs", f"a {SPACE} itself", "x<turn>y",
]  # fmt: skip


def trained(prefix: bool, drop: int = 0) -> Any:
    """A tokenizer as transformers makes it of a SentencePiece model: all pairs of every token."""
    text = "".join(file.text for file in list(source_files("train"))[:40]).replace(" ", SPACE)
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    raw.train_from_iterator([text], trainers.BpeTrainer(vocab_size=1200, show_progress=False))
    pieces = [token for token, _ in sorted(raw.get_vocab().items(), key=lambda item: item[1])]
    first = ["<unk>", "<s>", "</s>", "<turn>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: index for index, token in enumerate([*first, *pieces])}
    merges = [
        (piece[:at], piece[at:])
        for piece in pieces
        for at in range(1, len(piece))
        if piece[:at] in vocabulary and piece[at:] in vocabulary
    ]
    backend = Tokenizer(
        models.BPE(
            vocabulary, merges[: len(merges) - drop],
            unk_token="<unk>", fuse_unk=True, byte_fallback=True,
        )
    )  # fmt: skip
    start = [normalizers.Prepend(SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*start, normalizers.Replace(" ", SPACE)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in first[:3]])
    backend.add_tokens([AddedToken("<turn>", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


@pytest.mark.parametrize("prefix", [True, False])
def test_there_and_back(prefix: bool, tmp_path: Path) -> None:
    tokenizer = trained(prefix)
    export_gguf(build("llama"), tmp_path / "model.gguf", tokenizer=tokenizer)
    fields = read_gguf(tmp_path / "model.gguf").fields
    assert fields["tokenizer.ggml.model"] == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"] is prefix
    assert "tokenizer.ggml.merges" not in fields
    # Unknown, control, control, user-defined, bytes, normal; what fills the embedding is unused.
    assert fields["tokenizer.ggml.token_type"][:5] == [2, 3, 3, 4, 6]
    assert fields["tokenizer.ggml.token_type"][260] == 1
    assert fields["tokenizer.ggml.token_type"][-1] == 5
    again = rebuild_tokenizer(fields)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert again(text)["input_ids"] == ids
        assert again.decode(ids) == tokenizer.decode(ids)
    held = next(iter(source_files("heldout"))).text[:5000]
    assert again(held)["input_ids"] == tokenizer(held)["input_ids"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "normalizer must be SentencePiece's"),
        ({"normalizer": None}, "normalizer must be SentencePiece's, got None"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer must be SentencePiece's"),
    ],
)
def test_other_ways_of_splitting(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    content = {**json.loads(trained(True).backend_tokenizer.to_str()), **change}
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    with pytest.raises(ArgumentError, match=message):
        export_gguf(build("llama"), tmp_path / "model.gguf", tokenizer=other)
    assert not list(tmp_path.iterdir())


def test_pairs_that_scores_cannot_say(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="with byte_fallback must hold the pair"):
        export_gguf(build("llama"), tmp_path / "model.gguf", tokenizer=trained(True, drop=1))
    content = json.loads(trained(True).backend_tokenizer.to_str())
    merges = content["model"]["merges"]
    apart = next(at for at, pair in enumerate(merges) if "".join(pair) == "".join(merges[at - 1]))
    merges.append(merges.pop(apart))
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    with pytest.raises(ArgumentError, match="must stand together in the merges"):
        export_gguf(build("llama"), tmp_path / "model.gguf", tokenizer=other)
    assert not list(tmp_path.iterdir())


@pytest.mark.ci
@pytest.mark.parametrize("prefix", [True, False])
def test_llama_cpp(prefix: bool, tmp_path: Path) -> None:
    """The tokens of llama.cpp are those of transformers."""
    from llama_cpp import Llama

    tokenizer = trained(prefix)
    export_gguf(build("llama"), tmp_path / "model.gguf", tokenizer=tokenizer)
    llama = Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    held = next(iter(source_files("heldout"))).text[:20_000]
    for text in [*TEXTS, held]:
        found = llama.tokenize(text.encode(), add_bos=False, special=True)
        assert found == tokenizer(text)["input_ids"], text
