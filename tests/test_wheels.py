"""The wheels of scripts/build_wheels.sh: what is in them, and each of them where it is to run.

``BITLAB_WHEELS`` may name a folder that the script has filled already.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bitlab_hf import BitLabConfig, save
from tests.bitlab_hf.models import logits_of, make_float_model, token_ids
from tests.test_repository import assert_no_trace

pytestmark = pytest.mark.ci

ROOT = Path(__file__).parents[1]
LIBRARY = "bitcore/lib/libbitkernels_cpu.so"


def run(*command: str | Path, **changes: str) -> str:
    """Runs a command in this environment with changes; returns its standard output."""
    done = subprocess.run(
        command,
        cwd=ROOT.parent,
        env={**os.environ, **changes},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheels by platform: x86_64, aarch64, any."""
    folder = Path(os.environ.get("BITLAB_WHEELS") or tmp_path_factory.mktemp("wheels"))
    if not list(folder.glob("*.whl")):
        run(ROOT / "scripts/build_wheels.sh", folder, PYTHON=sys.executable, BITLAB_CUDA="OFF")
    found = {re.split(r"[-.]|_(?=x86)", path.stem)[-1]: path for path in folder.glob("*.whl")}
    return {name.removeprefix("manylinux_2_17_"): path for name, path in found.items()}


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if name[-1] != "/"}


@dataclass(frozen=True)
class Installed:
    """An environment that BitLab came into from a wheel, and from nowhere else."""

    folder: Path

    def run(self, *command: str) -> str:
        """Runs a program of the environment; its own folder is all that PATH has."""
        binaries = self.folder / "bin"
        assert not any(shutil.which(name, path=str(binaries)) for name in ("cc", "c++", "g++"))
        return run(binaries / command[0], *command[1:], PATH=str(binaries), PYTHONPATH="")

    def python(self, code: str) -> str:
        return self.run("python", "-W", "error::RuntimeWarning", "-c", code)


def install(wheel: Path, folder: Path) -> Installed:
    """Installs a wheel; torch and transformers are read from this environment's folder."""
    venv.create(folder, with_pip=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    # A path in a .pth file is searched last, and .pth files behind it are not read: so no BitLab.
    site.joinpath("others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(folder / "bin/pip", "install", "-q", "--no-deps", "--no-index", wheel)
    installed = Installed(folder)
    where = installed.python("import bitcore; print(bitcore.__file__)")
    assert Path(where.strip()).is_relative_to(site)
    return installed


@pytest.mark.parametrize("platform", ["x86_64", "aarch64", "any"])
def test_contents(wheels: dict[str, Path], platform: str) -> None:
    """One wheel for every Python 3, with all that it needs at run time and no trace of us."""
    wheel = wheels[platform]
    assert re.match(r"bitlab_hf-[\d.]+-py3-none-", wheel.name)
    files = contents(wheel)
    for name, content in files.items():
        assert_no_trace(name, content)
    for name in (
        "bitcore/py.typed",
        "bitlayers/py.typed",
        "bitlab_hf/py.typed",
        "bitlab_autoload/py.typed",
        "bitlab_autoload/__init__.py",
        "bitlab_vllm/py.typed",
        "bitlab_vllm/config.py",
        "bitlab_hf/demo/model/model.safetensors",
        "bitlab_hf/demo/model/tokenizer.json",
    ):
        assert name in files
    libraries = {name for name in files if ".so" in name}
    assert libraries == (set() if platform == "any" else {LIBRARY})
    assert not any(name.startswith(("tests/", "scripts/", "csrc/", "docs/")) for name in files)
    (info,) = {name.split("/")[0] for name in files if ".dist-info/" in name}
    assert files[f"{info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    entries = files[f"{info}/entry_points.txt"].decode()
    assert re.search(r"\[torch\.backends\]\nbitlab ?= ?bitlab_autoload:install", entries)
    assert re.search(r"\[vllm\.general_plugins\]\nbitlab ?= ?bitlab_vllm:register", entries)
    assert re.search(r"\[console_scripts\]\nbitlab ?= ?bitlab_autoload\.command:main", entries)
    assert "License-Expression: Apache-2.0" in files[f"{info}/METADATA"].decode()


@pytest.mark.parametrize("platform", ["x86_64", "aarch64"])
def test_tag_is_the_lowest_that_holds(wheels: dict[str, Path], platform: str) -> None:
    """The symbols' own word on it: none is younger than glibc 2.17, which the tag names."""
    assert f"manylinux_2_17_{platform}" in wheels[platform].name
    text = contents(wheels[platform])[LIBRARY]
    versions = {tuple(map(int, v.split(b"."))) for v in re.findall(rb"GLIBC_(\d+(?:\.\d+)+)", text)}
    assert versions
    assert max(versions) <= (2, 17)
    assert b"libgomp.so.1" in text


def test_the_tree_gives_the_wheel_of_the_source_distribution(
    wheels: dict[str, Path], tmp_path: Path
) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    run(*build, BITLAB_NATIVE="OFF")
    (wheel,) = tmp_path.glob("*.whl")
    assert contents(wheel) == contents(wheels["any"])


def test_the_aarch64_library_under_emulation(wheels: dict[str, Path], tmp_path: Path) -> None:
    library = tmp_path / "libbitkernels_cpu.so"
    library.write_bytes(contents(wheels["aarch64"])[LIBRARY])
    program = tmp_path / "selftest"
    run(
        "aarch64-linux-gnu-g++", "-std=c++17", "-O2", "-ffp-contract=off", "-fopenmp",
        f"-I{ROOT}/csrc/include", ROOT / "tests/native/selftest.cpp", "-o", program,
        f"-L{tmp_path}", "-lbitkernels_cpu", f"-Wl,-rpath,{tmp_path}",
    )  # fmt: skip
    emulator = ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", "-cpu", "max")
    said = run(*emulator, program, "--quick", "neon_i8mm", "neon_dotprod", "portable")
    for isa in ("neon_i8mm", "neon_dotprod", "portable"):
        assert re.search(rf"^{isa}: .*\b0 failures$", said, re.MULTILINE), said


def test_pure_python(wheels: dict[str, Path], tmp_path: Path) -> None:
    """Packs, saves, loads and generates in plain torch, with the native library's numbers."""
    source = make_float_model("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=BitLabConfig(mode="infer")
    )
    torch.save(logits_of(model), tmp_path / "logits.pt")
    save(model, tmp_path / "native")
    tokens = model.generate(token_ids(), max_new_tokens=8, do_sample=False).tolist()
    installed = install(wheels["any"], tmp_path / "pure")
    found = json.loads(
        installed.python(f"""
import json, torch
from transformers import AutoModelForCausalLM
from bitlab_hf import BitLabConfig, deploy, save
model = AutoModelForCausalLM.from_pretrained({str(source)!r}, quantization_config=BitLabConfig())
deploy(model)
save(model, {str(tmp_path / "pure-saved")!r})
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "pure-saved")!r})
ids = torch.tensor({token_ids().tolist()!r})
expected = torch.load({str(tmp_path / "logits.pt")!r}, weights_only=True)
with torch.no_grad():
    error = (model(ids).logits - expected).abs().max().item()
tokens = model.generate(ids, max_new_tokens=8, do_sample=False).tolist()
print(json.dumps([error, tokens]))
""")
    )
    # Every ternary layer gives the same bits; attention and norms are torch's, here and there.
    assert found == [0.0, tokens]
    native, pure = (
        load_file(tmp_path / name / "model.safetensors") for name in ("native", "pure-saved")
    )
    assert native.keys() == pure.keys()
    assert all(torch.equal(native[name], pure[name]) for name in native)
    backends = {
        backend["name"]: backend
        for backend in json.loads(installed.run("bitlab", "info", "--json"))["backends"]
        if backend["device"] == "cpu"
    }
    assert backends["reference"]["chosen"]
    assert not backends["cpu"]["available"]
    assert "libbitkernels_cpu is not installed" in backends["cpu"]["reason"]


def test_the_demo_from_the_wheel_without_a_compiler(
    wheels: dict[str, Path], tmp_path: Path
) -> None:
    installed = install(wheels["x86_64"], tmp_path / "environment")
    info = json.loads(installed.run("bitlab", "info", "--json"))
    assert any(b["name"] == "cpu" and b["chosen"] for b in info["backends"])
    output = str(tmp_path / "demo")
    said = installed.run("bitlab", "demo", "--quick", "--tokens", "6000", "--output", output)
    assert "bit-identical" in said
