"""Mixtures read back from GGUF files, expert by expert, and those that are refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitcore.errors import CheckpointError
from bitlab_hf import BitLabConfig, deploy, export_gguf, import_gguf, load_gguf, replace_linear
from bitlab_hf.interop import gguf_import
from bitlab_hf.interop.gguf_file import read_gguf
from bitlab_hf.model.experts import expert_modules
from tests.bitlab_hf.interop.test_gguf import DEMO
from tests.bitlab_hf.interop.test_gguf_architectures import latent, logits, same_experts
from tests.bitlab_hf.interop.test_gguf_import import rewritten

QWEN, OLMOE = "Qwen3MoeForCausalLM", "OlmoeForCausalLM"
UP, DOWN = "blk.0.ffn_up_exps.weight", "blk.0.ffn_down_exps.weight"
HALVES = {"gate": "blk.0.ffn_gate_exps.weight", "up": UP}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


def build(name: str, rounded: torch.dtype | None = None, **scheme: Any) -> Any:
    """A deployed mixture of one layer, its experts' float scales rounded as a file rounds them."""
    model = latent(name, num_hidden_layers=1)
    replace_linear(model, BitLabConfig(**scheme))
    deploy(model)
    if rounded is not None:
        for module in [model, *model.modules()]:
            for key, buffer in module._buffers.items():
                if key.endswith("qweight_scale"):
                    module._buffers[key] = buffer.to(rounded).float()
    return model


@pytest.mark.parametrize(
    ("name", "qtype", "scheme"),
    [
        (OLMOE, "TQ2_0", {"weight_granularity": "per_channel"}),
        (QWEN, "TQ1_0", {"weight_granularity": "per_tensor"}),
        (QWEN, "Q2_0", {"weight_granularity": "per_group", "group_size": 64}),
        ("MixtralForCausalLM", "Q2_0", {"weight_granularity": "per_group", "group_size": 128}),
        ("GraniteMoeForCausalLM", "BF16", {"weight_granularity": "per_group", "group_size": 64}),
    ],
)
def test_schemes(
    name: str, qtype: str, scheme: dict[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    """Rounded scales come back bit for bit, in a folder that every part of BitLab reads."""
    dtype = torch.bfloat16 if qtype == "BF16" else torch.float16
    if "group_size" in scheme:
        scheme = {**scheme, "group_scale_dtype": "float32"}
    model = build(name, dtype, **scheme)
    assert export_gguf(model, tmp_path / "model.gguf", qtype, tokenizer=tokenizer) == 0
    import_gguf(tmp_path / "model.gguf", tmp_path / "again", activation_dtype="int8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    same_experts(model, again)
    assert torch.equal(logits(again), logits(model))
    config = json.loads((tmp_path / "again/config.json").read_text())["quantization_config"]
    assert (config["experts"], config["format_version"], config["overrides"]) == ("ternary", 3, {})
    assert "experts" in (tmp_path / "again/README.md").read_text()


def test_two_levels(tokenizer: Any, tmp_path: Path) -> None:
    model = build(QWEN, weight_granularity="per_group", group_size=64)
    export_gguf(model, tmp_path / "model.gguf", tokenizer=tokenizer)
    options: dict[str, Any] = {"group_scale_dtype": "uint8", "activation_dtype": "int8"}
    assert 0 < import_gguf(tmp_path / "model.gguf", tmp_path / "again", **options) < 2**-10
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    ours, theirs = expert_modules(model)[0].module, expert_modules(again)[0].module
    for leaf in ours.stacks:
        held, other = ours.packed_stack(leaf), theirs.packed_stack(leaf)
        assert torch.equal(held["qweight"], other["qweight"])
        assert torch.equal(held["qweight_multiplier"], other["qweight_multiplier"])
        torch.testing.assert_close(
            held["qweight_scale"], other["qweight_scale"], rtol=2**-11 + 2**-20, atol=0
        )


def test_rows_without_a_code(tokenizer: Any, tmp_path: Path) -> None:
    """A scale of the matrix is one of its empty rows too; an expert may be all zeros."""
    model = build(QWEN, torch.float16)
    module = expert_modules(model)[0].module
    for leaf in module.stacks:
        packed = module.packed_stack(leaf)["qweight"]
        # The code 0 in each of the four lanes.
        packed[0, 3], packed[2] = 0b01010101, 0b01010101
    export_gguf(model, tmp_path / "model.gguf", tokenizer=tokenizer)
    again = expert_modules(load_gguf(tmp_path / "model.gguf"))[0].module
    for leaf in module.stacks:
        held, other = module.packed_stack(leaf), again.packed_stack(leaf)
        assert torch.equal(held["qweight"], other["qweight"])
        alive = [0, 1, 3, 4, 5]
        assert torch.equal(held["qweight_scale"][alive], other["qweight_scale"][alive])


def test_one_matrix_at_a_time(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(OLMOE)
    export_gguf(model, tmp_path / "model.gguf", tokenizer=tokenizer)
    read = gguf_import._Matrix.__getitem__
    sizes: list[int] = []

    def counted(self: Any, rows: slice) -> Tensor:
        values = read(self, rows)
        sizes.append(values.numel())
        return values

    monkeypatch.setattr(gguf_import._Matrix, "__getitem__", counted)
    import_gguf(tmp_path / "model.gguf", tmp_path / "again")
    # The embedding has more values than one expert's matrix, [768, 256].
    assert max(sizes) == 2048 * 256


def test_what_other_files_leave_out(tokenizer: Any, tmp_path: Path) -> None:
    """A shared expert's gate is a vector in llama.cpp's own files; sizes can be the tensors'."""
    model = build("Qwen2MoeForCausalLM", torch.float16)
    good, other = tmp_path / "good.gguf", tmp_path / "other.gguf"
    export_gguf(model, good, tokenizer=tokenizer)
    content = good.read_bytes()
    for name in (b"expert_feed_forward_length", b"expert_shared_feed_forward_length"):
        content = content.replace(b"qwen2moe." + name, b"qwen2moe." + name.replace(b"e", b"_"))
    good.write_bytes(content)
    gate = "blk.0.ffn_gate_inp_shexp.weight"
    vector = model.model.layers[0].mlp.shared_expert_gate.weight.detach()[0].numpy()
    rewritten(good, other, {gate: vector}, gate)
    assert read_gguf(other).tensors[gate].shape == (256,)
    same_experts(model, load_gguf(other))
    assert torch.equal(logits(load_gguf(other)), logits(model))


@pytest.mark.parametrize("half", ["gate", "up"])
def test_a_code_that_no_expert_has(half: str, tokenizer: Any, tmp_path: Path) -> None:
    model = build(OLMOE, weight_granularity="per_group", group_size=64)
    export_gguf(model, tmp_path / "model.gguf", tokenizer=tokenizer)
    item = read_gguf(tmp_path / "model.gguf").tensors[HALVES[half]]
    at = item.data[2].ctypes.data - item.data.base.ctypes.data  # type: ignore[union-attr]
    content = bytearray((tmp_path / "model.gguf").read_bytes())
    content[at + 2] |= 3
    (tmp_path / "model.gguf").write_bytes(content)
    said = rf"layers\.0\.mlp\.experts\.gate_up_proj of expert 2 \({half}\) must have finite scales"
    with pytest.raises(CheckpointError, match=said):
        import_gguf(tmp_path / "model.gguf", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_floats_that_are_not_all_ternary(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They stay float, as linear layers do, and the first such matrix is named."""
    model = build(OLMOE)
    file = tmp_path / "model.gguf"
    export_gguf(model, file, "BF16", tokenizer=tokenizer)
    reader = gguf.GGUFReader(file, "r+")
    data = next(item.data for item in reader.tensors if item.name == DOWN)
    data[3].view(np.uint16).reshape(-1)[5] = 0x3E99
    reader.data.flush()
    with caplog.at_level(logging.WARNING, "bitlab"):
        import_gguf(file, tmp_path / "again")
    said = "experts of 1 layers stay float: model.layers.0.mlp.experts.down_proj of expert 3 must"
    assert said in caplog.text
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert not expert_modules(again)
    found = again.model.layers[0].mlp.experts
    module = expert_modules(model)[0].module
    expected = {leaf: module.dequantized(leaf).bfloat16().float() for leaf in module.stacks}
    expected["down_proj"][3].view(-1)[5] = torch.tensor(0x3E99, dtype=torch.int16).view(
        torch.bfloat16
    )
    for leaf, values in expected.items():
        assert torch.equal(getattr(found, leaf).float(), values)


@pytest.mark.parametrize(
    ("changes", "drop", "message"),
    [
        ({}, UP, "blk.0.ffn_up_exps.weight must be in the file, got none"),
        ({}, "blk.0.ffn_gate_inp.weight", "ffn_gate_inp.weight must be in the file"),
        ({"olmoe.expert_count": 5}, "", r"must be of shape \[5, .*\], got \[4, "),
        ({"olmoe.expert_count": 0}, "", "expert_count must be a positive integer, got 0"),
        ({"olmoe.expert_used_count": 5}, "", "at most the number of experts, 4, got 5"),
        (
            {DOWN: np.zeros((4, 256, 512), np.float32)}, DOWN,
            r"ffn_down_exps.weight must be of shape \[4, 256, 768\], got \[4, 256, 512\]",
        ),
        (
            {"blk.0.ffn_up.0.weight": np.zeros((768, 256), np.float32)}, "",
            "got 'blk.0.ffn_up.0.weight'",
        ),
    ],
)  # fmt: skip
def test_refused(
    changes: dict[str, Any], drop: str, message: str, tokenizer: Any, tmp_path: Path
) -> None:
    good, bad = tmp_path / "good.gguf", tmp_path / "bad.gguf"
    export_gguf(build(OLMOE), good, "BF16", tokenizer=tokenizer)
    rewritten(good, bad, changes, drop)
    with pytest.raises(CheckpointError, match=message):
        import_gguf(bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()
