"""The entry point where vLLM is another than the plugin knows: nothing else of vLLM's suffers."""

from __future__ import annotations

import logging
import sys
from types import ModuleType
from typing import Any

import pytest

import bitlab_vllm


def test_an_unknown_vllm_is_told_and_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registered: list[str] = []
    name = "vllm.model_executor.layers.quantization"
    for end in range(1, 5):
        part = ".".join(name.split(".")[:end])
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    module: Any = sys.modules[name]
    module.QUANTIZATION_METHODS = ["fp8"]
    module.register_quantization_config = registered.append
    monkeypatch.delitem(sys.modules, "bitlab_vllm.config", raising=False)
    with caplog.at_level(logging.ERROR, logger="bitlab"):
        bitlab_vllm.register()
    assert registered == []
    assert f"must have the interfaces of version {bitlab_vllm.VLLM_VERSION}" in caplog.text
    module.QUANTIZATION_METHODS.append("bitlab")
    caplog.clear()
    bitlab_vllm.register()
    assert not caplog.text
