"""Peak memory of the three loads, each in its own process.

Anonymous memory is measured: pages of the memory-mapped file are the kernel's to drop. The bounds
are for a model of 385 MiB in bf16.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from bitlab_hf import BitLabConfig, save
from tests import processes

pytestmark = [pytest.mark.slow, pytest.mark.ci]
MIB = 2**20
CODE = """
import ctypes, json, sys, threading, time
import torch
from transformers import AutoModelForCausalLM
import bitlab_hf
from bitlab_hf import BitLabConfig

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

path, fields = sys.argv[1], json.loads(sys.argv[2])
# Blocks of 64 KiB and more are mapped: what is freed goes back at once, and counts no more.
assert ctypes.CDLL(None).mallopt(-3, 65536)
# What the first use of each library costs is not the load's.
torch.ops.bitlab.pack_weight(torch.randn(64, 64), "per_tensor", 0)
AutoModelForCausalLM.from_pretrained(path + "-small", quantization_config=BitLabConfig(**fields))
before, peak, done = anonymous(), 0, False
def sample():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)
sampler = threading.Thread(target=sample)
sampler.start()
model = AutoModelForCausalLM.from_pretrained(path, quantization_config=BitLabConfig(**fields))
done = True
sampler.join()
print(json.dumps({"peak": max(peak, anonymous()) - before, "after": anonymous() - before}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("memory")
    for suffix, layers in (("", 14), ("-small", 1)):
        config = LlamaConfig(
            vocab_size=8000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers,
            num_attention_heads=16, num_key_value_heads=16, tie_word_embeddings=True,
        )  # fmt: skip
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        model = model.to_empty(device="cpu").to(torch.bfloat16)
        model.tie_weights()
        for parameter in model.parameters():
            parameter.data.uniform_(-0.05, 0.05)
        model.save_pretrained(base / f"float{suffix}")
        packed = LlamaForCausalLM.from_pretrained(
            base / f"float{suffix}", quantization_config=BitLabConfig(mode="infer")
        )
        save(packed, base / f"packed{suffix}")
        packed = LlamaForCausalLM.from_pretrained(
            base / f"float{suffix}", quantization_config=BitLabConfig(mode="infer", head="int8")
        )
        save(packed, base / f"int8{suffix}")
    return base


def measure(path: Path, **fields: Any) -> dict[str, int]:
    """Loads in three processes; the least counts, since an allocator's whims only ever add."""
    found = [measure_once(path, **fields) for _ in range(3)]
    return {name: min(result[name] for result in found) for name in found[0]}


def measure_once(path: Path, **fields: Any) -> dict[str, int]:
    done = processes.run("-c", CODE, path, json.dumps(fields))
    assert done.returncode == 0, done.stderr
    result: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_size_of_the_model(folder: Path) -> None:
    size = (folder / "float" / "model.safetensors").stat().st_size
    assert 350 * MIB < size <= 385 * MIB


def test_latent_in_the_files_dtype_stays_mapped(folder: Path) -> None:
    assert measure(folder / "float", latent_dtype="keep")["peak"] <= 2 * MIB


def test_latent_in_float32_costs_its_float32_weights(folder: Path) -> None:
    weights = 14 * (4 * 1024 * 1024 + 3 * 1024 * 2816) * 4
    assert measure(folder / "float")["peak"] <= weights + 32 * MIB


def test_packed_at_load(folder: Path) -> None:
    found = measure(folder / "float", mode="infer")
    assert found["peak"] <= 91 * MIB
    assert found["after"] <= 63 * MIB


@pytest.mark.parametrize("verify", [True, False])
def test_packed_stays_mapped(folder: Path, verify: bool) -> None:
    assert measure(folder / "packed", verify=verify)["peak"] <= 3 * MIB


def test_the_int8_head_quantized_at_load(folder: Path) -> None:
    """8000 rows of 1024: 8 MiB that stay, and blocks of 4 MiB while they are made."""
    found = measure(folder / "float", mode="infer", head="int8")
    assert found["peak"] <= 91 * MIB
    assert found["after"] <= (63 + 8) * MIB


@pytest.mark.parametrize("verify", [True, False])
def test_the_int8_head_stays_mapped(folder: Path, verify: bool) -> None:
    assert measure(folder / "int8", verify=verify)["peak"] <= 3 * MIB


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of 48 experts in bf16, of 3 MiB each, as a hub file holds them."""
    base = tmp_path_factory.mktemp("experts")
    for suffix, count in (("", 48), ("-small", 2)):
        config = Qwen3MoeConfig(
            vocab_size=512, hidden_size=1024, moe_intermediate_size=512, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=4, head_dim=64, num_experts=count,
            num_experts_per_tok=2, tie_word_embeddings=True,
        )  # fmt: skip
        model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(base / f"float{suffix}")
    return base


def test_experts_are_packed_one_by_one(experts: Path) -> None:
    """All of them would be 144 MiB in float, and were there twice while they were put together."""
    with safe_open(experts / "float" / "model.safetensors", "pt") as file:
        assert "model.layers.0.mlp.experts.47.up_proj.weight" in file.keys()  # noqa: SIM118
    found = measure(experts / "float", mode="infer")
    packed = 18 * MIB + 4 * MIB
    assert found["peak"] <= packed + 1.1 * 3 * MIB + 16 * MIB
    assert found["after"] <= packed + 4 * MIB


@pytest.mark.parametrize("verify", [True, False])
def test_packed_experts_stay_mapped(experts: Path, verify: bool) -> None:
    for suffix in ("", "-small"):
        packed = Qwen3MoeForCausalLM.from_pretrained(
            experts / f"float{suffix}", quantization_config=BitLabConfig(mode="infer")
        )
        save(packed, experts / f"packed{suffix}")
    assert measure(experts / "packed", verify=verify)["peak"] <= 3 * MIB
