"""Deployed models in processes that never import BitLab, and what the entry point costs."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitlab_autoload
from bitlab_hf import BitLabConfig, save
from tests.bitlab_autoload.uses import PROMPT
from tests.processes import Elsewhere

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "bitlab_hf/demo/model")
TABLE = "transformers.quantizers.auto"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("autoload") / "deployed"
    model = AutoModelForCausalLM.from_pretrained(
        DEMO, quantization_config=BitLabConfig(mode="infer")
    )
    save(model, folder, tokenizer=AutoTokenizer.from_pretrained(DEMO))
    return folder


def use(name: str, deployed: Path, scratch: Path) -> Any:
    done = run("-m", "tests.bitlab_autoload.uses", name, str(deployed), DEMO, str(scratch))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.ci
def test_causal_and_assisted_decoding(deployed: Path, tmp_path: Path) -> None:
    found = use("causal", deployed, tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(deployed)
    encoded = AutoTokenizer.from_pretrained(deployed)(PROMPT, return_tensors="pt")
    assert (found["packed"], found["float"]) == (42, 1)
    assert found["logits"] == model(**encoded).logits.double().sum().item()
    tokens = model.generate(**encoded, max_new_tokens=16, do_sample=False)
    assert found["tokens"] == tokens.tolist()
    assert found["assisted"] == found["tokens"]


@pytest.mark.ci
def test_pipeline(deployed: Path, tmp_path: Path) -> None:
    found = use("pipe", deployed, tmp_path)
    assert found["packed"] == 42
    assert found["text"].startswith(PROMPT)
    assert len(found["text"]) > len(PROMPT)


@pytest.mark.ci
def test_base_model_and_new_head(deployed: Path, tmp_path: Path) -> None:
    found = use("heads", deployed, tmp_path)
    assert found["base"] == {"packed": 42, "float": 0}
    assert found["classifier"] == {"packed": 42, "float": 1}
    assert "nn.modules.linear.Linear" in found["head"].replace("torch.", "")
    assert found["gradient"] > 0
    assert found["hidden"][-1] == 256


@pytest.mark.ci
def test_peft(deployed: Path, tmp_path: Path) -> None:
    found = use("peft", deployed, tmp_path)
    assert found["packed"] == 42
    assert found["equal"]
    assert found["adapter_counts"]


FIRST_IMPORTS = [
    "import torch, transformers",
    "import transformers, torch",
    "import transformers.quantizers.auto",
    "import transformers.modeling_utils",
    "from transformers.models.llama.modeling_llama import LlamaForCausalLM",
    "import transformers.quantizers.auto, bitlab_hf",
]


@pytest.mark.ci
@pytest.mark.parametrize("first", FIRST_IMPORTS)
def test_import_orders(first: str) -> None:
    """Whatever comes first, transformers reads a configuration, and gets BitLab's classes."""
    script = f"""{first}
import logging, sys
from transformers import AutoModelForCausalLM
import transformers.modeling_utils
from transformers.quantizers.auto import AutoHfQuantizer, AUTO_QUANTIZATION_CONFIG_MAPPING
assert AutoHfQuantizer.supports_quant_method({{"quant_method": "bitlab"}})
assert {"bitlab_hf" in first} == ("bitlab_hf" in sys.modules)
quantizer = AutoHfQuantizer.from_config({{"quant_method": "bitlab"}}, pre_quantized=False)
assert type(quantizer).__module__ == "bitlab_hf.quantizer"
assert AUTO_QUANTIZATION_CONFIG_MAPPING["bitlab"].__name__ == "BitLabConfig"
assert not any(type(finder).__module__ == "bitlab_autoload" for finder in sys.meta_path)
"""
    done = run("-c", script)
    assert done.returncode == 0, done.stderr
    assert "bitlab" not in done.stderr


def test_without_bitlab_a_load_fails(deployed: Path, stock: Elsewhere) -> None:
    script = (
        f"from transformers import AutoModelForCausalLM as A\nA.from_pretrained({str(deployed)!r})"
    )
    done = stock.run("-c", script)
    assert done.returncode != 0
    assert "size mismatch" in done.stderr.lower() or "mismatched" in done.stderr.lower()
    assert "Unknown quantization type, got bitlab" in done.stderr
    # Where the message leads: the card says what to install.
    assert "pip install ." in (deployed / "README.md").read_text()
    assert "ModuleNotFoundError" in stock.run("-c", "import bitlab_hf").stderr


def test_import_torch_loads_nothing_else() -> None:
    script = "import sys, torch; print('\\n'.join(sys.modules))"
    on, off = (
        set(run("-c", script, TORCH_DEVICE_BACKEND_AUTOLOAD=value).stdout.split()) for value in "10"
    )
    ours = {name for name in on - off if not name.startswith(("importlib", "email", "zipfile"))}
    assert "bitlab_autoload" in ours
    assert not ours & {"bitcore", "bitlayers", "bitlab_hf", "transformers", "numpy", "rich"}


def test_it_is_installed() -> None:
    entries = importlib.metadata.entry_points(group="torch.backends", name="bitlab")
    assert [entry.value for entry in entries] == ["bitlab_autoload:install"]


class _Broken:
    """A table that cannot be written, and a finder that cannot find."""

    def setdefault(self, key: str, value: object) -> None:
        raise RuntimeError("no")

    def find_spec(self, *arguments: object) -> None:
        raise RuntimeError("no")


def test_nothing_escapes(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    table = ModuleType(TABLE)
    vars(table)["AUTO_QUANTIZATION_CONFIG_MAPPING"] = _Broken()
    monkeypatch.setitem(sys.modules, TABLE, table)
    with caplog.at_level(logging.WARNING, "bitlab"):
        bitlab_autoload.install()
        assert "import bitlab_hf before loading" in caplog.text
        caplog.clear()
        finder = bitlab_autoload.Finder()
        monkeypatch.setattr(sys, "meta_path", [finder, _Broken()])
        assert finder.find_spec(TABLE) is None
        assert "import bitlab_hf before loading" in caplog.text
        caplog.clear()
        # After the module was executed, too.
        executed: list[ModuleType] = []

        class Loader:
            def exec_module(self, module: ModuleType) -> None:
                executed.append(module)

        loader = Loader()
        spec = SimpleNamespace(loader=loader)
        monkeypatch.setattr(sys, "meta_path", [finder, SimpleNamespace(find_spec=lambda *a: spec)])
        assert finder.find_spec(TABLE) is spec
        loader.exec_module(table)
        assert executed == [table]
        assert "import bitlab_hf before loading" in caplog.text
    assert finder.find_spec("transformers.trainer") is None


def test_broken_bitlab_is_loud_only_where_it_is_needed(deployed: Path) -> None:
    """torch and transformers import; a load of a BitLab checkpoint says why it cannot."""
    script = f"""import sys; sys.modules["bitlab_hf.model.deploy"] = None
from transformers import AutoModelForCausalLM as A
A.from_pretrained({DEMO!r})
print("float models load")
A.from_pretrained({str(deployed)!r})"""
    done = run("-c", script)
    assert "float models load" in done.stdout
    assert "import of bitlab_hf.model.deploy halted" in done.stderr
    assert done.returncode != 0
