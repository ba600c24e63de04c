"""Experts in a GGUF file: each matrix, its type, its scales, and what is said of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from bitcore import unpack_ternary
from bitcore.errors import ArgumentError
from bitcore.quantize import dequantize, group_scale
from bitlab_hf import BitLabConfig, deploy, export_bitnet, export_gguf, replace_linear
from bitlab_hf.interop import q2_0
from bitlab_hf.interop.gguf_file import GgufTensor, read_gguf
from bitlab_hf.interop.matrices import matrices_of
from bitlab_hf.model.experts import expert_modules
from tests.bitlab_hf.interop.test_gguf import DEMO
from tests.bitlab_hf.interop.test_gguf_architectures import ARCHITECTURES, MIXTURES, latent

LEAVES = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
GROUPS = {"weight_granularity": "per_group", "group_size": 64}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


def values(item: GgufTensor) -> Tensor:
    """float32 [E, N, K] of a tensor of experts."""
    if item.kind == "Q2_0":
        rows = np.array(item.data).reshape(item.shape[0] * item.shape[1], -1)
        return q2_0.decode(rows).view(item.shape)
    kind = gguf.GGMLQuantizationType[item.kind]
    made = gguf.quants.dequantize(np.array(item.data), kind)
    return torch.from_numpy(np.array(made, dtype=np.float32)).view(item.shape)


def apart(module: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Gate, up and down of all experts, as the file's type rounds their scales."""
    both, down = (
        torch.stack([rounded(module, name, expert, dtype) for expert in range(stack.experts)])
        for name, stack in module.stacks.items()
    )
    half = both.shape[1] // 2
    return {"gate_proj": both[:, :half], "up_proj": both[:, half:], "down_proj": down}


def rounded(module: Any, name: str, expert: int, dtype: torch.dtype) -> Tensor:
    qweight, scale, *multiplier = module.packed(name, expert)
    scale = group_scale(scale, multiplier[0]) if multiplier else scale
    codes = unpack_ternary(qweight, module.stacks[name].out_features)
    return dequantize(codes, scale.to(dtype).float(), torch.float32)


@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize(
    ("qtype", "scheme"),
    [("TQ2_0", {}), ("Q2_0", GROUPS), ("BF16", {"weight_granularity": "per_channel"})],
)
@pytest.mark.parametrize("name", MIXTURES)
def test_codes_and_scales(
    name: str, qtype: str, scheme: dict[str, Any], deployed: bool, tokenizer: Any, tmp_path: Path
) -> None:
    model = replace_linear(latent(name, num_hidden_layers=2), BitLabConfig(**scheme))
    if deployed:
        deploy(model)
    export_gguf(model, tmp_path / "model.gguf", qtype, tokenizer=tokenizer)
    file = read_gguf(tmp_path / "model.gguf")
    dtype = torch.bfloat16 if qtype == "BF16" else torch.float16
    modules = expert_modules(model)
    assert len(modules) == 2
    for block, found in enumerate(modules):
        for leaf, expected in apart(found.module, dtype).items():
            item = file.tensors[f"blk.{block}.{LEAVES[leaf]}.weight"]
            assert (item.kind, item.shape) == (qtype, tuple(expected.shape))
            assert torch.equal(values(item), expected)
        router = file.tensors[f"blk.{block}.ffn_gate_inp.weight"]
        assert (router.kind, router.shape[0]) == ("F32", found.module.num_experts)
    architecture, config = ARCHITECTURES[name].name, model.config
    assert file.fields[f"{architecture}.expert_count"] == modules[0].module.num_experts
    assert file.fields[f"{architecture}.expert_used_count"] == config.num_experts_per_tok
    if "Qwen" in name:
        assert file.fields[f"{architecture}.expert_feed_forward_length"] == 256
    if name == "Qwen2MoeForCausalLM":
        assert file.fields["qwen2moe.expert_shared_feed_forward_length"] == 512
        assert file.tensors["blk.1.ffn_gate_inp_shexp.weight"].kind == "F32"
        assert file.tensors["blk.1.ffn_down_shexp.weight"].kind == qtype


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_that_stay_float(name: str, tokenizer: Any, tmp_path: Path) -> None:
    model = latent(name, num_hidden_layers=1).to(torch.bfloat16)
    replace_linear(model, BitLabConfig(experts="keep"))
    assert not expert_modules(model)
    export_gguf(model, tmp_path / "model.gguf", tokenizer=tokenizer)
    file = read_gguf(tmp_path / "model.gguf")
    experts = next(one for key, one in model.named_modules() if key.endswith(".experts"))
    gate, up = experts.gate_up_proj.float().chunk(2, dim=1)
    for leaf, expected in (("gate", gate), ("up", up), ("down", experts.down_proj.float())):
        item = file.tensors[f"blk.0.ffn_{leaf}_exps.weight"]
        assert item.kind == "BF16"
        assert torch.equal(values(item), expected)


def test_an_expert_that_no_type_holds(tokenizer: Any, tmp_path: Path) -> None:
    model = latent("Qwen3MoeForCausalLM", num_hidden_layers=1, moe_intermediate_size=96)
    replace_linear(model)
    with pytest.raises(ArgumentError, match=r"experts\.down_proj must have a multiple of 64"):
        export_gguf(model, tmp_path / "model.gguf", tokenizer=tokenizer)
    model = deploy(replace_linear(latent("MixtralForCausalLM", num_hidden_layers=1)))
    scale = expert_modules(model)[0].module.gate_up_proj_qweight_scale
    # A row of the up projection of the last expert.
    scale[-1, -1] = 1e5
    with pytest.raises(ArgumentError, match=r"experts\.up_proj must have scales from"):
        export_gguf(model, tmp_path / "model.gguf", tokenizer=tokenizer)
    assert not list(tmp_path.iterdir())


def test_a_format_without_experts(tmp_path: Path) -> None:
    model = deploy(replace_linear(latent("MixtralForCausalLM", num_hidden_layers=1)))
    with pytest.raises(ArgumentError, match=r"layers\.0\.mlp\.experts must be a BitLinear"):
        export_bitnet(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_shapes() -> None:
    model = replace_linear(latent("Qwen2MoeForCausalLM", num_hidden_layers=1))
    held = {one.name.partition("layers.0.")[2]: one.shape for one in matrices_of(model)}
    assert held["mlp.experts.gate_proj"] == held["mlp.experts.up_proj"] == (6, 256, 256)
    assert held["mlp.experts.down_proj"] == (6, 256, 256)
    assert held["mlp.shared_expert.down_proj"] == (256, 512)
