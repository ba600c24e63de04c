"""The texts of the quality benchmark, that every machine can have, as token blocks.

"python": the Python standard library's own sources, its tests left out, on the split of
`bitlab_hf/demo/corpus.py`. "prose": the English of Django's documentation (BSD licence), from its
source package at a pinned version and hash, without code samples and directives.

A file belongs to one part only, by a hash of its path: pretraining (`pretrain`), fine-tuning
(`train`), choosing (`validation`), the comparison (`test`). So fine-tuning reads tokens that
pretraining never saw, and what is reported was never trained on nor chosen on.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bitlab_hf.demo.corpus import SourceFile, source_files

sys.path.append(str(Path(__file__).parents[1]))

from pretrain_demo_lm import VOCABULARY, train_tokenizer  # noqa: F401  (quality_model's too)

DOMAINS = ("python", "prose")
PARTS = ("pretrain", "train", "validation", "test")
PROSE_PACKAGE = "Django==5.2.8"
PROSE_SHA256 = "23254866a5bb9a2cfa6004e8b809ec6246eba4b58a7589bc2772f1bcc8456c7f"
# Of a hundred files: 16 to fine-tune on, 4 to choose on, 5 (prose) to compare on.
_FIRST_TRAIN, _FIRST_VALIDATION, _FIRST_TEST = 75, 91, 95


@dataclass(frozen=True)
class Domain:
    """One text, tokenized.

    Attributes:
        tokenizer: Byte-level BPE trained on the pretraining part.
        parts: int64 [blocks, length] of each of `PARTS`.
        bytes_per_token: UTF-8 bytes a token of the test part.
    """

    tokenizer: PreTrainedTokenizerFast
    parts: dict[str, Tensor]
    bytes_per_token: float


def _share(path: str) -> int:
    digest = hashlib.sha256(f"quality/{path}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100


def python_files() -> dict[str, list[SourceFile]]:
    """The standard library; its held-out files are the test part, as for the demo."""
    found: dict[str, list[SourceFile]] = {part: [] for part in PARTS}
    for file in source_files("train"):
        share = _share(file.path) * _FIRST_TEST // 100
        part = "pretrain" if share < _FIRST_TRAIN else "train"
        found["validation" if share >= _FIRST_VALIDATION else part].append(file)
    found["test"] = list(source_files("heldout"))
    return found


def prose_files(folder: Path) -> dict[str, list[SourceFile]]:
    """Django's documentation; the package is fetched into the folder with pip, once.

    Raises:
        SystemExit: The package could not be fetched, or its hash is another.
    """
    folder.mkdir(parents=True, exist_ok=True)
    version = PROSE_PACKAGE.partition("==")[2]
    archive = folder / f"django-{version}.tar.gz"
    if not archive.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", ":all:", "--dest", str(folder), PROSE_PACKAGE]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(f"bench_quality: {PROSE_PACKAGE} could not be fetched into {folder}")
    actual = hashlib.sha256(archive.read_bytes()).hexdigest()
    if actual != PROSE_SHA256:
        raise SystemExit(f"{archive.name}: SHA-256 must be {PROSE_SHA256}, got {actual}")
    found: dict[str, list[SourceFile]] = {part: [] for part in PARTS}
    with tarfile.open(archive) as package:
        members = sorted(package.getmembers(), key=lambda member: member.name)
        for member in members:
            path = member.name.partition("/")[2]
            if not (path.startswith("docs/") and path.endswith(".txt")):
                continue
            stream = package.extractfile(member)
            text = "" if stream is None else strip_markup(stream.read().decode())
            if text.strip():
                share = _share(path)
                bounds = (_FIRST_TRAIN, _FIRST_VALIDATION, _FIRST_TEST)
                found[PARTS[sum(share >= bound for bound in bounds)]].append(SourceFile(path, text))
    return found


def strip_markup(text: str) -> str:
    """Takes code samples, directives, heading lines and inline roles out of reStructuredText.

    A directive's body goes only if it is code; notes and versions are prose and stay.
    """
    kept: list[str] = []
    dropped_indent: int | None = None
    for line in text.splitlines():
        stripped = line.strip()
        indent = len(line) - len(line.lstrip())
        if dropped_indent is not None and (not stripped or indent > dropped_indent):
            continue
        dropped_indent = None
        if re.match(
            r"\.\. (code|console|snippet|literal|image|figure|toctree|highlight)", stripped
        ):
            dropped_indent = indent
        elif (
            stripped.startswith("..")
            or re.fullmatch(r"([=\-~`'^*\"#+])\1{2,}", stripped)
            or re.match(r":[a-z-]+:( |$)", stripped)
        ):
            continue
        elif stripped.endswith("::"):
            kept.append(line.rstrip()[:-1])
            dropped_indent = indent
        else:
            kept.append(line.rstrip())
    prose = "\n".join(kept)
    prose = re.sub(r":[\w:+-]+:`~?\.?([^`<]+?)(?:\s*<[^`>]*>)?`", r"\1", prose)
    prose = re.sub(r"`([^`<]+?)\s*<[^`>]*>`_+", r"\1", prose).replace("``", "")
    return re.sub(r"\n{3,}", "\n\n", prose).strip() + "\n"


def load_domain(name: str, folder: Path, length: int, every: int = 1) -> Domain:
    """Reads, tokenizes and cuts one domain.

    Args:
        name: One of `DOMAINS`.
        folder: Where a downloaded package is kept.
        length: Tokens of a block.
        every: Reads one file of so many.
    """
    files = python_files() if name == "python" else prose_files(folder)
    files = {part: found[::every] for part, found in files.items()}
    tokenizer = train_tokenizer(file.text for file in files["pretrain"])
    parts = {}
    for part in PARTS:
        order = torch.randperm(len(files[part]), generator=torch.Generator().manual_seed(0))
        texts = [files[part][int(i)].text for i in order]
        parts[part] = _blocks(tokenizer, texts, length)
    size = sum(len(file.text.encode()) for file in files["test"])
    encoded = tokenizer([file.text for file in files["test"]], add_special_tokens=False)
    tokens = sum(len(ids) + 1 for ids in encoded["input_ids"])
    return Domain(tokenizer, parts, size / tokens)


def _blocks(tokenizer: Any, texts: list[str], length: int) -> Tensor:
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    stream = torch.tensor(list(chain.from_iterable([0, *ids] for ids in encoded)))
    count = stream.numel() // length
    return stream[: count * length].view(count, length)
