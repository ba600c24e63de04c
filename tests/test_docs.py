"""Runs the code of the README and of the documents; a document without it has no business here."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import typer.main
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import bitcore
import bitlab_hf.interop.hub as hub
import bitlab_hf.train
import bitlayers
from bitcore.estimators import ESTIMATORS
from bitlab_hf import BitLabConfig, save
from bitlab_hf.cli.app import app
from bitlayers import LAYER_REGISTRY
from tests.bitlab_hf.models import make_float_model, training_data

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = typer.main.get_command(app)


def blocks(name: str, language: str) -> list[str]:
    text = (ROOT / name).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def bitlab_lines(text: str) -> list[list[str]]:
    """The arguments of each ``bitlab`` command in a block of bash."""
    joined = text.replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in joined.splitlines()]
    return [line[1:] for line in lines if line[:1] == ["bitlab"]]


def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The five lines: a float model in, a packed one out."""
    from transformers import TrainingArguments

    monkeypatch.chdir(tmp_path)
    (code,) = blocks("README.md", "python")
    path = make_float_model("llama", tmp_path)
    args = TrainingArguments("run", max_steps=1, use_cpu=True, report_to="none")
    names: dict[str, Any] = {"path": path, "data": training_data(), "args": args}
    exec(compile(code, "README.md", "exec"), names)
    packed = {n: p for n, p in names["model"].named_parameters() if n.endswith("qweight")}
    assert len(packed) == 14
    assert all(p.dtype == torch.uint8 for p in packed.values())


def test_extending() -> None:
    layers, estimators = dict(LAYER_REGISTRY), dict(ESTIMATORS)
    try:
        found = blocks("docs/extending.md", "python")
        assert len(found) == 2
        for number, code in enumerate(found):
            exec(compile(code, f"docs/extending.md, block {number + 1}", "exec"), {})
    finally:
        for registry, before in ((LAYER_REGISTRY, layers), (ESTIMATORS, estimators)):
            registry.clear()
            registry.update(before)  # type: ignore[arg-type]


def test_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = make_float_model("llama", tmp_path)
    config = BitLabConfig(mode="infer")
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)
    save(model, "out/demo")
    bitlab_hf.export_bitnet(model, "folder-or-hub-name")
    for number, code in enumerate(blocks("docs/formats.md", "python")):
        exec(compile(code, f"docs/formats.md, block {number + 1}", "exec"), {})
    assert "| data | my notes |" in (tmp_path / "out/demo/README.md").read_text()
    assert (tmp_path / "for-everyone/model.safetensors").exists()


def parse(command: Any, name: str, rest: list[str], parent: Any) -> None:
    try:
        command.make_context(name, rest, parent=parent)
    except typer.BadParameter as error:
        # The file of an example need not be there.
        if "does not exist" not in str(error):
            raise


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_exist(document: Path) -> None:
    """Each `bitlab` line parses, and each script that a line starts is there."""
    for text in blocks(str(document.relative_to(ROOT)), "bash"):
        for arguments in bitlab_lines(text):
            with COMMAND.make_context("bitlab", list(arguments)) as context:
                name, command, rest = COMMAND.resolve_command(context, arguments)  # type: ignore[attr-defined]
                parse(command, name, rest, context)
        for script in re.findall(r"(?:^|\s)((?:scripts|tests|\.ci)/[\w/.-]+)", text):
            assert (ROOT / script).exists(), f"{document.name} names {script}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_options_of_scripts_exist(document: Path) -> None:
    """Each option on a line, or in a phrase of code, that runs one of our Python scripts."""
    text = document.read_text().replace("\\\n", " ")
    for name, rest in re.findall(r"scripts/((?:bench/)?\w+\.py)([^\n`#]*)", text):
        known = (ROOT / "scripts" / name).read_text()
        for option in re.findall(r"(?<=\s)--[\w-]+", rest):
            assert f'"{option}"' in known, f"{document.name}: {name} {option}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links(document: Path) -> None:
    """Each relative link and picture leads to a file, and each anchor to a heading."""
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), f"{document.name}: {target}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
            assert anchor in slugs, f"{document.name}: {target}"


@pytest.mark.ci
def test_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it in order, in one folder; only the hub is replaced by a note of the call."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "bitlab_hf/demo/model", "my-model")
    sources = sorted((ROOT / "bitlab_hf").glob("*.py"))
    Path("train.txt").write_text("\n".join(file.read_text() for file in sources[1:4]))
    Path("heldout.txt").write_text(sources[0].read_text() * 4)
    pushed: list[Any] = []
    monkeypatch.setattr(hub, "push", lambda *given, **options: pushed.append(given) or "address")
    text = (ROOT / "docs/tutorial.md").read_text()
    perplexities = {}
    for language, code in re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if language == "python":
            exec(compile(code, "docs/tutorial.md", "exec"), {})
            continue
        for arguments in bitlab_lines(code):
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, (arguments, result.output, result.exception)
            if arguments[0] == "eval":
                perplexities[arguments[1]] = float(result.stdout.split()[1].rstrip(","))
    assert pushed == [(Path("ternary"), "me/my-model-1.58bit")]
    assert perplexities["my-model"] < perplexities["ternary"] < perplexities["rounded"]
    assert "| data | train.txt |" in Path("ternary/README.md").read_text()


@pytest.mark.ci
def test_api_reference(tmp_path: Path) -> None:
    """Every exported name has a page's entry with its docstring."""
    subprocess.run(
        [sys.executable, ROOT / "scripts/build_api.py", tmp_path], check=True, cwd=tmp_path
    )
    for package in (bitcore, bitlayers, bitlab_hf, bitlab_hf.train):
        page = (tmp_path / f"{package.__name__.replace('.', '/')}.html").read_text()
        for name in package.__all__:
            assert f'id="{name}"' in page, f"{package.__name__}.{name}"
            assert getattr(package, name).__doc__, f"{package.__name__}.{name}"
