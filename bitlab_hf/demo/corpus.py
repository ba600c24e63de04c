"""The demo's text: the Python standard library's own sources, which every machine with Python has,
or articles in a folder.

Whether a file is held out is decided by a hash of its path relative to the library, so the split is
the same on every machine and in every script, and no held-out file is ever trained on. Left out of
both sides: what is generated or repeats itself (a held-out code page is known from its neighbours),
what names the machine, and everything installed later.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bitcore.errors import ArgumentError

Split = Literal["train", "heldout"]

# One file in HELDOUT_MODULUS is held out.
HELDOUT_MODULUS = 20
_TEST_DIRECTORIES = {"test", "tests", "idle_test"}
_LEFT_OUT_DIRECTORIES = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",
    "pydoc_data",
    "lib-dynload",
}
_LEFT_OUT_PREFIXES = ("_sysconfigdata", "config-", "sitecustomize")


@dataclass(frozen=True)
class SourceFile:
    """One source file: its path relative to the library, with forward slashes, and its text."""

    path: str
    text: str


def split_of(path: str) -> Split:
    """Says on which side of the split a relative path (forward slashes) falls."""
    digest = hashlib.sha256(path.encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") % HELDOUT_MODULUS == 0 else "train"


def source_files(
    split: Split, *, with_tests: bool = False, root: Path | None = None
) -> Iterator[SourceFile]:
    """Yields the library's source files of one side, in the order of their paths.

    Args:
        split: ``"train"`` or ``"heldout"``.
        with_tests: Also the library's test suite, which Debian's Python does not install;
            evaluation leaves it out so that its figures mean the same everywhere.
        root: The library's folder; default: this interpreter's.
    """
    base = root if root is not None else Path(sysconfig.get_path("stdlib"))
    for file in sorted(base.rglob("*.py")):
        parts = file.relative_to(base).parts
        if _LEFT_OUT_DIRECTORIES.intersection(parts) or any(
            part.startswith(_LEFT_OUT_PREFIXES) for part in parts
        ):
            continue
        if not with_tests and _TEST_DIRECTORIES.intersection(parts):
            continue
        path = "/".join(parts)
        if split_of(path) != split:
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield SourceFile(path, text)


def read_articles(folder: Path, part: str) -> list[SourceFile]:
    """Returns the texts of ``PART.jsonl`` in a folder, in its order.

    Args:
        folder: As ``scripts/real_models.py`` writes it.
        part: ``"fit"`` or ``"test"``.

    Raises:
        ArgumentError: The file is missing, or a line of it is no object with a text.
    """
    file = folder / f"{part}.jsonl"
    if not file.is_file():
        raise ArgumentError(
            f"demo: --text must be a folder with fit.jsonl and test.jsonl, got {folder} without "
            f"{file.name}\nscripts/real_models.py makes one."
        )
    return parse_articles("demo", file, file.read_text(encoding="utf-8"))


def parse_articles(op: str, file: Path, content: str) -> list[SourceFile]:
    """Returns the texts of a file of JSON lines, objects with a ``text``, in its order.

    Args:
        op: Whose option the file is, for error messages.
        file: Where the content is from.
        content: Of the file.

    Raises:
        ArgumentError: A line is no object with a text.
    """
    articles = []
    # Not splitlines: a text may hold other characters that end lines.
    for number, line in enumerate(content.removesuffix("\n").split("\n"), 1):
        try:
            held = json.loads(line)
            articles.append(SourceFile(str(held.get("title", number)), str(held["text"])))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArgumentError(
                f"{op}: {file}, line {number} must be an object with a text, got {error!r}"
            ) from error
    return articles
