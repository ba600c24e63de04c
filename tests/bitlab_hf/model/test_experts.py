"""Which experts become ternary, what a model of them counts, what other tools make of it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Llama4ForCausalLM, Llama4TextConfig
from transformers.models.llama4 import modeling_llama4

from bitcore.errors import ArgumentError, ConfigError, LifecycleError
from bitlab_hf import (
    BitLabConfig,
    deploy,
    export_bitnet,
    export_gguf,
    quantized_layers,
    replace_linear,
    save,
)
from bitlab_hf.checkpoint.card import model_card
from bitlab_hf.cli.statistics import examine
from bitlab_hf.fit.calibrate import calibrate
from bitlab_hf.model.count import bits_per_weight
from bitlab_hf.model.experts import expert_modules, find_experts, projections
from bitlab_hf.model.groups import group_fields
from bitlab_hf.train.run_facts import run_facts
from bitlayers.experts import BitExperts
from bitlayers.training import set_quant_strength
from tests.bitlab_hf.experts import MOE, load, make_moe
from tests.bitlab_hf.models import logits_of, token_ids, training_data

GROUPS: dict[str, Any] = {"weight_granularity": "per_group", "group_size": 64}


def latent(name: str, folder: Path, **fields: Any) -> Any:
    return load(make_moe(name, folder), quantization_config=BitLabConfig(**fields))


@pytest.mark.parametrize("name", MOE)
def test_a_model_in_memory(name: str, tmp_path: Path) -> None:
    source = make_moe(name, tmp_path)
    model = replace_linear(load(source))
    wanted = load(source, quantization_config=BitLabConfig())
    assert torch.equal(logits_of(model), logits_of(wanted))
    assert [one.names for one in expert_modules(model)] == [
        one.names for one in expert_modules(wanted)
    ]
    deploy(model)
    before = logits_of(model)
    save(model, tmp_path / "packed")
    assert torch.equal(logits_of(load(tmp_path / "packed")), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_that_share_their_weights_share_them_still(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """Latent, deployed, and twice in the file, which has no way to say so."""
    model = load(make_moe("qwen3_moe", tmp_path, dtype), dtype=dtype)
    first, second = (layer.mlp.experts for layer in model.model.layers)
    for name in projections(first):
        setattr(second, name, getattr(first, name))
    replace_linear(model)
    for name in first.stacks:
        assert getattr(first, name).dtype == torch.float32
        assert getattr(second, name) is getattr(first, name)
    deploy(model)
    for name in first.stacks:
        held = [one._parameters[f"{name}_qweight"] for one in (first, second)]
        assert held[0] is held[1]
    save(model, tmp_path / "packed")
    assert torch.equal(logits_of(load(tmp_path / "packed")), logits_of(model))


def test_the_head_and_routers_stay_float(tmp_path: Path) -> None:
    model = latent("qwen2_moe", tmp_path)
    converted = {name for layer in quantized_layers(model) for name in layer.names}
    assert "model.layers.0.mlp.shared_expert.up_proj" in converted
    assert not [name for name in converted if name.endswith(("gate", "lm_head"))]
    block = model.model.layers[0].mlp
    assert type(block.shared_expert_gate) is nn.Linear
    assert type(block.gate).__name__ == "Qwen2MoeTopKRouter"
    assert type(block).__name__ == "Qwen2MoeSparseMoeBlock"


def test_nothing_is_changed_by_an_error(tmp_path: Path) -> None:
    model = load(make_moe("qwen3_moe", tmp_path, moe_intermediate_size=96))
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ConfigError, match="experts.down_proj: in_features must be a multiple"):
        replace_linear(model, BitLabConfig(**GROUPS))
    assert [type(module) for module in model.modules()] == kinds


def test_experts_alone(tmp_path: Path) -> None:
    """A model whose linear layers are all left alone has what makes a load elsewhere fail, too."""
    source = make_moe("mixtral", tmp_path)
    config = BitLabConfig(modules_to_not_convert=[".*self_attn"])
    model = load(source, quantization_config=config)
    assert not quantized_layers(model)
    assert len(expert_modules(model)) == 2
    save(deploy(model), tmp_path / "packed")
    assert torch.equal(logits_of(load(tmp_path / "packed")), logits_of(model))
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "`model.layers.0.mlp.experts.gate_up_proj`" in card
    found = examine(tmp_path / "packed", lambda size: None)
    assert found.parts["ternary experts"].tensors == 4


def test_a_class_that_is_not_known_stays_float_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unknown(modeling_llama4.Llama4TextExperts):
        pass

    monkeypatch.setattr(modeling_llama4, "Llama4TextExperts", Unknown)
    config = Llama4TextConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, intermediate_size_mlp=128,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_local_experts=4, pad_token_id=0,
    )  # fmt: skip
    Llama4ForCausalLM(config).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        model = Llama4ForCausalLM.from_pretrained(tmp_path, quantization_config=BitLabConfig())
    assert not expert_modules(model)
    assert "expert tensors such as model.layers.0.feed_forward.experts.gate_up_proj" in caplog.text
    assert "% of the weights, stay float" in caplog.text
    with pytest.raises(ConfigError, match='experts="ternary" must find experts .* got none in'):
        Llama4ForCausalLM.from_pretrained(
            tmp_path, quantization_config=BitLabConfig(experts="ternary")
        )


def test_tensors_that_lie_otherwise_are_left_alone() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_experts = 3
            self.has_gate, self.has_bias, self.has_post_expert_norm = False, False, False
            self.is_transposed, self.is_concatenated = False, True
            self.up_proj = nn.Parameter(torch.zeros(3, 8, 4))
            self.down_proj = nn.Parameter(torch.zeros(3, 4, 8))

    module = Experts()
    assert projections(module) == ["up_proj", "down_proj"]
    assert [one.names for one in find_experts(nn.ModuleDict({"one": module}), [])] == [["one"]]
    module.down_proj = nn.Parameter(torch.zeros(12, 8))
    assert projections(module) == []
    assert projections(nn.Linear(2, 2)) == []


@pytest.mark.parametrize("fields", [{}, GROUPS])
def test_counts(fields: dict[str, Any], tmp_path: Path) -> None:
    source = make_moe("gpt_oss", tmp_path)
    whole = load(source)
    held = [(name.rpartition(".")[2], p) for name, p in whole.named_parameters() if p.dim() == 3]
    assert {name for name, _ in held} == {"gate_up_proj", "down_proj"}
    experts = sum(p.numel() for _, p in held)
    assert experts == 2 * 4 * 3 * 128 * 64
    model = load(source, quantization_config=BitLabConfig(**fields))
    wanted = bits_per_weight(model)
    facts = run_facts(model, _Arguments(), 1)
    linear = sum(one.module.weight.numel() for one in quantized_layers(model))
    assert facts["ternary_weights"] == linear + experts
    deploy(model)
    assert model.num_parameters() == whole.num_parameters()
    assert bits_per_weight(model) == wanted
    save(model, tmp_path / "packed")
    loaded = load(tmp_path / "packed")
    assert loaded.num_parameters() == whole.num_parameters()
    found = examine(tmp_path / "packed", lambda size: None)
    assert found.parts["ternary experts"].weights == experts
    assert found.parts["ternary layers"].weights == linear
    assert found.bits_per_weight == pytest.approx(wanted)
    assert f"{linear + experts:,} in {len(quantized_layers(model)) + 2 * 4 * 3} matrices" in (
        model_card(model, "x")
    )
    name = "model.layers.0.mlp.experts.down_proj"
    layer = next(layer for layer in found.layers if layer["name"] == name)
    assert (layer["experts"], layer["outputs"], layer["inputs"]) == (4, 64, 128)
    codes = expert_modules(model)[0].module.dequantized("down_proj").sign()
    for sign, share in layer["codes"].items():
        assert share == pytest.approx(float((codes == int(sign)).double().mean()))


class _Arguments:
    run_name = output_dir = "x"


def test_groups_look_at_experts() -> None:
    with torch.device("meta"):
        config = MOE["qwen3_moe"].__class__(
            **{**MOE["qwen3_moe"].to_dict(), "hidden_size": 128, "moe_intermediate_size": 192}
        )
        model = AutoModelForCausalLM.from_config(config)
        assert group_fields(model, BitLabConfig(modules_to_not_convert=["o_proj"])) == {
            "weight_granularity": "per_group", "group_size": 64, "overrides": {},
        }  # fmt: skip
        config.moe_intermediate_size = 100
        fields = group_fields(
            AutoModelForCausalLM.from_config(config),
            BitLabConfig(modules_to_not_convert=["o_proj"]),
        )
    assert fields["group_size"] == 128
    names = [f"model.layers.{layer}.mlp.experts.down_proj" for layer in range(2)]
    assert list(fields["overrides"]) == names
    replace_linear(model := AutoModelForCausalLM.from_config(config), BitLabConfig(
        **fields, modules_to_not_convert=["o_proj"]))  # fmt: skip
    stacks = expert_modules(model)[1].module.stacks
    assert [stack.config.weight_granularity for stack in stacks.values()] == [
        "per_group", "per_channel",
    ]  # fmt: skip


def test_calibration_in_stages(tmp_path: Path) -> None:
    model = latent("qwen3_moe", tmp_path)
    set_quant_strength(model, 0.0)
    samples = [row["input_ids"] for row in training_data(12)]
    first, second = (one.module for one in expert_modules(model))
    before = second.gate_up_proj.detach().clone()
    report = calibrate(model, samples, blocks=range(1))
    assert {layer.name.split(".")[2] for layer in report.layers} == {"0"}
    assert torch.equal(second.gate_up_proj, before)
    assert (first.quant_strength, second.quant_strength) == (1.0, 0.0)
    report = calibrate(model, samples, blocks=range(1, 2))
    assert {layer.name.split(".")[2] for layer in report.layers} == {"1"}
    assert not torch.equal(second.gate_up_proj, before)
    assert second.quant_strength == 1.0
    assert torch.equal(logits_of(model.train()), logits_of(model.eval()))


def test_other_formats_refuse(tmp_path: Path) -> None:
    model = deploy(latent("mixtral", tmp_path))
    for export in (export_bitnet, export_gguf):
        with pytest.raises((ArgumentError, ConfigError, LifecycleError)):
            export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_whatever_experts_implementation_is_asked_for(tmp_path: Path) -> None:
    source = make_moe("qwen3_moe", tmp_path)
    wanted = logits_of(load(source, quantization_config=BitLabConfig()))
    for name in ("eager", "grouped_mm", "batched_mm"):
        config = BitLabConfig()
        model = load(source, quantization_config=config, experts_implementation=name)
        assert torch.equal(logits_of(model), wanted)
        deploy(model)
        assert torch.equal(logits_of(model), wanted)


@pytest.mark.parametrize("mode", ["infer", "auto"])
def test_adapters_are_beside_experts_and_not_on_them(mode: str, tmp_path: Path) -> None:
    model = latent("qwen3_moe", tmp_path, mode=mode)
    kinds = [type(module) for module in model.modules()]
    for target in ("mlp.experts.down_proj", "model.layers.1.mlp.experts.gate_up_proj"):
        config = LoraConfig(target_modules=["q_proj"], target_parameters=[target])
        with pytest.raises(LifecycleError, match="must name float Parameters, got model.layers"):
            get_peft_model(model, config)
        assert [type(module) for module in model.modules()] == kinds
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted(input_ids=token_ids(), labels=token_ids()).loss.backward()
    moved = [p for name, p in adapted.named_parameters() if "lora_" in name]
    assert len(moved) == 4
    assert all(p.grad is not None and p.grad.any() for p in moved)


def test_generate_with_a_batch_and_a_static_cache(tmp_path: Path) -> None:
    model = latent("mixtral", tmp_path).eval()
    ids = token_ids()[:, :6]
    wanted = model.generate(ids, max_new_tokens=5, do_sample=False)
    deploy(model)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), wanted)
    static = model.generate(
        ids, max_new_tokens=5, do_sample=False, cache_implementation="static",
        disable_compile=True,
    )  # fmt: skip
    assert torch.equal(static, wanted)


def test_repr_names_what_it_holds(tmp_path: Path) -> None:
    model = latent("gpt_oss", tmp_path)
    shown = repr(expert_modules(model)[0].module)
    assert "BitGptOssExperts" in shown
    assert "gate_up_proj=4 x [256, 64] per_tensor" in shown
    assert isinstance(expert_modules(model)[0].module, BitExperts)
