"""Experts packed one by one while they arrive: which conversions can, and that nothing changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
)

from bitlab_hf import BitLabConfig
from bitlab_hf.model.by_expert import ExpertConverter, by_expert
from tests.bitlab_hf.experts import load, make_moe

SOURCES = ["experts.*.gate_proj.weight", "experts.*.up_proj.weight"]


def test_those_that_stack_and_nothing_else_across_experts() -> None:
    merged = WeightConverter(SOURCES, "experts.gate_up_proj", [MergeModulelist(0), Concatenate(1)])
    merged.scope_prefix, merged.base_model_prefix = "text", "model"
    down = WeightConverter("experts.*.w2.weight", "experts.down_proj", [MergeModulelist(0)])
    left: list[Any] = [
        WeightRenaming("a", "b"),
        # Experts stand elsewhere, or are joined; the order of operations is another.
        WeightConverter(SOURCES, "experts.gate_up_proj", [MergeModulelist(1), Concatenate(1)]),
        WeightConverter(SOURCES, "experts.gate_up_proj", [MergeModulelist(0), Concatenate(0)]),
        WeightConverter("w", "experts.down_proj", [Transpose(1, 2)]),
        WeightConverter("qkv", ["q", "k", "v"], [Chunk(0)]),
    ]
    found = by_expert([merged, down, *left])
    assert [type(one) for one in found[:2]] == [ExpertConverter, ExpertConverter]
    assert found[2:] == left
    assert found[0].source_patterns == merged.source_patterns
    assert found[0].operations == merged.operations
    assert (found[0].scope_prefix, found[0].base_model_prefix) == ("text", "model")
    # Saved as it was loaded.
    assert found[1].reverse_transform().source_patterns == ["experts.down_proj"]


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_the_same_bits_as_all_at_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_moe(name, tmp_path, torch.bfloat16)
    counts: list[int] = []
    merge = MergeModulelist.convert

    def noted(self: MergeModulelist, tensors: Any, *args: Any, **kwargs: Any) -> Any:
        counts.extend(len(held) for held in tensors.values())
        return merge(self, tensors, *args, **kwargs)

    monkeypatch.setattr(MergeModulelist, "convert", noted)
    states = []
    for convert in (by_expert, lambda conversions: conversions):
        monkeypatch.setattr("bitlab_hf.quantizer.by_expert", convert)
        states.append(load(source, quantization_config=BitLabConfig(mode="infer")).state_dict())
        # So many matrices were in float at a time.
        assert counts
        assert (max(counts) == 1) == (convert is by_expert)
        counts.clear()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert any(key.endswith("gate_up_proj_qweight") for key in states[0])
