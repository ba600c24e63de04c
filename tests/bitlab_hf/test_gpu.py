"""Whole models on a GPU: moved, loaded there, decoded with a static cache and compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bitlab_hf import BitLabConfig, save
from bitlab_hf.fit import room
from bitlab_hf.fit.calibrate import calibrate
from tests.bitlab_hf.models import (
    auto_class,
    make_float_model,
    taught,
    token_ids,
    training_data,
)

pytestmark = pytest.mark.gpu


@pytest.fixture
def deployed(tmp_path: Path) -> Path:
    source = make_float_model("llama", tmp_path)
    config = BitLabConfig(mode="infer", head="int8")
    model = auto_class("llama").from_pretrained(source, quantization_config=config)
    save(model, tmp_path / "deployed")
    return tmp_path / "deployed"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=token_ids().to(model.device)).logits
    return found.cpu()


def test_a_deployed_model_goes_there_with_its_bytes(gpu: torch.device, deployed: Path) -> None:
    on_cpu = auto_class("llama").from_pretrained(deployed)
    expected, state = logits(on_cpu), on_cpu.state_dict()
    moved = auto_class("llama").from_pretrained(deployed).to(gpu)
    mapped = auto_class("llama").from_pretrained(deployed, device_map={"": gpu})
    for model in (moved, mapped):
        assert model.device == gpu
        held = model.state_dict()
        assert held.keys() == state.keys()
        assert all(torch.equal(held[name].cpu(), state[name]) for name in state)
        # Attention and norms are torch's, with another order of their float sums.
        torch.testing.assert_close(logits(model), expected, rtol=1e-2, atol=1e-2)


def test_generate_with_a_static_cache_and_compiled(gpu: torch.device, deployed: Path) -> None:
    model = auto_class("llama").from_pretrained(deployed, device_map={"": gpu})
    ids = torch.arange(8, device=gpu)[None]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **options)
    # transformers compiles the decoding step of a static cache on a GPU, to CUDA graphs.
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)


def test_calibration_where_the_gpu_s_memory_is_short(
    gpu: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What samples make goes to the CPU's memory, and comes back as the same bits."""
    source = taught(make_float_model("llama", tmp_path / "source"))
    states = []
    for short in (False, True):
        monkeypatch.setattr(room, "_is_short_gpu", lambda _device, short=short: short)
        model = auto_class("llama").from_pretrained(source, quantization_config=BitLabConfig())
        calibrate(model.to(gpu), [row["input_ids"] for row in training_data(12)])
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
