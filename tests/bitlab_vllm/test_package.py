"""The wheel for vLLM's environment, where pip has nothing to object to."""

from __future__ import annotations

import json
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.bitlab_vllm.conftest import ROOT, variables

LOOK = """
import importlib.metadata as metadata, importlib.util, json
held = metadata.distribution("bitlab-vllm")
modules = "bitcore", "bitlab_vllm", "bitlayers", "bitlab_hf"
print(json.dumps({
    "version": held.version,
    "requires": held.requires,
    "plugins": [one.value for one in metadata.entry_points(group="vllm.general_plugins")],
    "modules": [name for name in modules if importlib.util.find_spec(name)],
}))
"""


def read(file: str) -> dict[str, object]:
    project: dict[str, object] = tomllib.loads((ROOT / file).read_text())["project"]
    return project


def test_it_is_the_other_wheel_s_in_part() -> None:
    whole, part = read("pyproject.toml"), read("packages/vllm/pyproject.toml")
    for name in ("version", "requires-python", "license"):
        assert part[name] == whole[name], name
    assert set(part["dependencies"]) < set(whole["dependencies"])  # type: ignore[call-overload]


@pytest.mark.ci
def test_in_vllm_s_environment(vllm_environment: Path) -> None:
    python = vllm_environment / "bin/python"
    run = {"capture_output": True, "text": True, "check": False, "env": variables()}
    looked = subprocess.run([python, "-P", "-c", LOOK], **run)  # type: ignore[call-overload]
    assert looked.returncode == 0, looked.stderr
    found = json.loads(looked.stdout)
    assert found["version"] == read("packages/vllm/pyproject.toml")["version"]
    assert not [one for one in found["requires"] if "transformers" in one]
    assert "bitlab_vllm:register" in found["plugins"]
    assert found["modules"] == ["bitcore", "bitlab_vllm"]
    checked = subprocess.run([python, "-m", "pip", "check"], **run)  # type: ignore[call-overload]
    assert "bitlab" not in checked.stdout + checked.stderr
