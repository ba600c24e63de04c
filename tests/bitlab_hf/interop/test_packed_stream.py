"""Packed layers written part by part, their scales as floats or in two levels, and proven after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitcore.errors import ArgumentError
from bitcore.quantize import group_scale
from bitlab_hf import convert_ternary
from bitlab_hf.interop.packed_stream import (
    packed_entries,
    relative_change,
    same_values,
    write_packed,
)
from bitlab_hf.interop.stream import StreamWriter
from bitlab_hf.interop.structure import find_structure
from bitlab_hf.model.tree import quantized_layers
from tests.bitlab_hf.interop.test_ternary import build, ternary


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("shape", [(1, 128), (5, 192), (33, 11008), (2050, 576)])
def test_written_and_proven(shape: tuple[int, int], dtype: str, tmp_path: Path) -> None:
    """Blocks of rows, odd sizes; the proof sees one code, scale or multiplier that is another."""
    torch.manual_seed(0)
    weight = ternary(shape, "64", torch.float32)
    structure = find_structure(weight).kept_as(dtype)
    entries = packed_entries("x.weight", shape, structure)
    file = tmp_path / "x.safetensors"
    with StreamWriter(file, entries, {}) as out:
        change = write_packed(out, "x.weight", weight, structure)
    held = load_file(file)
    assert set(held) == {entry.name for entry in entries}
    assert (change == 0) == (dtype == "float32")
    if dtype == "uint8":
        scale = weight.abs().view(shape[0], -1, 64).amax(-1)
        stored = group_scale(held["x.qweight_scale"], held["x.qweight_multiplier"])
        used = scale > 0
        assert change == relative_change(scale, stored, used) < 0.06 / 0.01 / 127
        assert held["x.qweight_multiplier"].amax(1).eq(127).all()
    with safe_open(file, "pt") as written:
        assert same_values(written, "x.weight", weight, structure)
    for name, tensor in held.items():
        other = tensor.clone()
        last = other.view(-1)[-1:]
        last.copy_(last * 2 if tensor.is_floating_point() else last ^ 1)
        save_file({**held, name: other}, file)
        with safe_open(file, "pt") as written:
            assert not same_values(written, "x.weight", weight, structure), name


def test_relative_change() -> None:
    before, after = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 2.5, 3.0])
    assert relative_change(before, after) == 0.25
    assert relative_change(before, after, torch.tensor([True, False, False])) == 0
    assert relative_change(before, after, torch.zeros(3, dtype=torch.bool)) == 0


def test_scales_of_groups_in_two_levels(tmp_path: Path) -> None:
    source = build(tmp_path / "source", "64")
    with torch.no_grad():
        tensors = load_file(source / "model.safetensors")
        # Groups without any code count for no change, however small their scale.
        tensors["model.layers.0.mlp.down_proj.weight"][::3, :64] = 0
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
    exact = convert_ternary(source, tmp_path / "exact")
    assert exact.scale_change == 0
    report = convert_ternary(source, tmp_path / "out", group_scale_dtype="uint8")
    floats: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    packed: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    originals, worst, grouped = dict(floats.named_modules()), 0.0, 0
    for found in quantized_layers(packed):
        layer, weight = found.module, originals[found.names[0]].weight.detach()
        values = layer.dequantized_weight()
        assert torch.equal(values.sign(), weight.sign())
        if layer.quant_config.group_size is None:
            assert torch.equal(values, weight)
            continue
        grouped += 1
        assert layer.quant_config.group_scale_dtype == "uint8"
        assert layer.qweight_multiplier.dtype == torch.uint8
        used = weight != 0
        change = (values[used].double() / weight[used].double() - 1).abs()
        worst = max(worst, float(change.max()))
        # Scales of a row lie between 0.01 and 0.06: half a step of the smallest.
        assert worst <= 0.06 / 0.01 / 127 / 2
    assert grouped == 2
    assert report.scale_change == pytest.approx(worst, rel=1e-6)
    assert report.bytes_after < exact.bytes_after
    assert report.packed == exact.packed
    for folder, dtype in (("out", "uint8"), ("exact", "float32")):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["quantization_config"]["group_scale_dtype"] == dtype
    with pytest.raises(ArgumentError, match="group_scale_dtype must be one of .*, got 'int8'"):
        convert_ternary(source, tmp_path / "other", group_scale_dtype="int8")
    assert not (tmp_path / "other").exists()
