"""PEFT on ternary models: training, reloading, refusals, merging with the drift measured."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer

from bitcore.errors import ArgumentTypeError, LifecycleError, NonFiniteError
from bitcore.quantize import dequantize, two_levels, weight_scale
from bitlab_hf import BitLabConfig, merge_and_requantize, save
from bitlab_hf.model.tree import quantized_layers
from bitlab_hf.peft.merge import _requantize
from bitlayers import RMSNormBitLinear
from tests.bitlab_hf.models import logits_of, make_float_model, token_ids
from tests.bitlab_hf.test_trainer import assert_equal_states, make_trainer, state_of


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_float_model("llama", tmp_path_factory.mktemp("float"))


def load(path: Path, **fields: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=BitLabConfig(**fields))


def adapter(**fields: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **fields}
    )


def shaken(base: Any, size: float, **fields: Any) -> Any:
    """A model with an adapter whose delta is not zero."""
    torch.manual_seed(1)
    model = get_peft_model(base, adapter(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=size)
    return model.eval()


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_lora_trains_and_reloads_bit_exact(source: Path, tmp_path: Path, mode: str) -> None:
    save(load(source, mode=mode), tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = state_of(base)
    model = get_peft_model(base, adapter())
    trainer = make_trainer(model, tmp_path / "run", max_steps=4)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "adapter")
    expected = logits_of(model.eval())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert not torch.equal(logits_of(again), expected)
    reloaded = PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert torch.equal(logits_of(reloaded), expected)
    # The base is what it was.
    assert_equal_states(before, state_of(model.unload()))
    automatic = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits_of(automatic), expected)


def test_add_adapter_of_transformers(source: Path, tmp_path: Path) -> None:
    model = load(source, mode="infer")
    model.add_adapter(adapter())
    Trainer.train(make_trainer(model, tmp_path / "run", max_steps=2))
    expected = logits_of(model.eval())
    model.save_pretrained(tmp_path / "adapter")
    again = load(source, mode="infer")
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits_of(again.eval()), expected)
    with pytest.raises(ArgumentTypeError, match="must be a PEFT model"):
        merge_and_requantize(model)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "orthogonal"])
def test_what_works_on_a_float_weight_is_refused_when_deployed(source: Path, start: str) -> None:
    model = load(source, mode="infer")
    before = state_of(model)
    with pytest.raises(LifecycleError, match=r"init_lora_weights .* deployed layer .*q_proj"):
        get_peft_model(model, adapter(init_lora_weights=start, target_modules=["q_proj"]))
    assert_equal_states(before, state_of(model))


def test_dora_needs_a_latent_layer(source: Path) -> None:
    with pytest.raises(LifecycleError, match="use_dora must be False"):
        get_peft_model(load(source, mode="infer"), adapter(use_dora=True))
    latent = load(source)
    before = logits_of(latent)
    torch.testing.assert_close(
        logits_of(get_peft_model(latent, adapter(use_dora=True)).eval()), before
    )


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_rewritten_latent_weight_is_refused(source: Path, start: str) -> None:
    with pytest.raises(LifecycleError, match="latent layer"):
        get_peft_model(load(source), adapter(init_lora_weights=start))


def test_merging_by_peft_is_refused_when_deployed(source: Path) -> None:
    model = shaken(load(source, mode="infer"), 0.1)
    expected = logits_of(model)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(LifecycleError, match="bitlab_hf.merge_and_requantize"):
            merge()
    assert torch.equal(logits_of(model), expected)


SCALES = [
    {},
    {"weight_granularity": "per_channel"},
    {"weight_granularity": "per_group", "group_size": 64},
    {"weight_granularity": "per_group", "group_size": 64, "group_scale_dtype": "float32"},
]
SCALE_NAMES = ["tensor", "channel", "group", "group float32"]


@pytest.mark.parametrize("fields", SCALES, ids=SCALE_NAMES)
@pytest.mark.parametrize("mode", ["infer", "train"])
def test_merge_and_requantize(
    source: Path, tmp_path: Path, mode: str, fields: dict[str, Any], capsys: Any
) -> None:
    model = shaken(load(source, mode=mode, **fields), 0.5)
    weights = {
        found.names[0]: found.module.dequantized_weight()
        for found in quantized_layers(model.base_model.model)
    }
    deltas = {
        name: module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "base_layer")
    }
    expected = logits_of(model)
    result = merge_and_requantize(model, batches=[{"input_ids": token_ids()}])
    merged = {found.names[0]: found.module for found in quantized_layers(result.model)}
    assert len(merged) == len(result.drift) == len(weights) == 14
    errors = norms = 0.0
    for name, layer in merged.items():
        target = (
            weights[name.replace("_proj", "_proj.base_layer")] + deltas[f"base_model.model.{name}"]
        )
        error = float((layer.dequantized_weight() - target).norm())
        assert error / float(target.norm()) == pytest.approx(result.drift[name], rel=1e-4)
        errors, norms = errors + error**2, norms + float(target.norm()) ** 2
    assert result.overall == pytest.approx((errors / norms) ** 0.5, rel=1e-4)
    got = logits_of(result.model)
    relative = float((got - expected).norm() / expected.norm())
    assert result.output == pytest.approx(relative, rel=1e-3)
    assert "overall drift" in capsys.readouterr().out
    assert not any("lora" in name for name, _ in result.model.named_modules())
    save(result.model, tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(again), got)


@pytest.mark.parametrize("fields", SCALES, ids=SCALE_NAMES)
def test_no_delta_changes_nothing_and_fitting_beats_keeping(
    source: Path, fields: dict[str, Any]
) -> None:
    base = load(source, mode="infer", **fields)
    before = state_of(base)
    result = merge_and_requantize(get_peft_model(base, adapter()), verbose=False)
    assert result.overall == 0.0
    assert_equal_states(before, state_of(result.model))
    drifts = [
        merge_and_requantize(
            shaken(load(source, mode="infer", **fields), 0.001), scale=scale, verbose=False
        )
        for scale in ("keep", "fit")
    ]
    assert drifts[1].overall < drifts[0].overall
    # A small delta flips no code: with the old scales all of it is lost.
    assert set(drifts[0].kept.values()) == {0.0}


def test_fitted_scales_never_raise_the_error() -> None:
    target = torch.randn(6, 128)
    for scale in (torch.ones(1), torch.ones(6), torch.ones(6, 2)):
        errors = []
        for fit in (False, True):
            codes, new = _requantize(target, scale, fit=fit)
            full = new.repeat_interleave(64, 1) if new.dim() == 2 else new.view(-1, 1)
            errors.append(float((codes * full - target).norm()))
        assert errors[1] < errors[0]


def test_fitted_scales_in_two_levels_never_raise_the_error() -> None:
    for size in (1.0, 1e-3):
        target = torch.randn(6, 256) * torch.rand(6, 4).pow(4).repeat_interleave(64, 1) * size
        held = two_levels(weight_scale(target, "per_group", 64))
        for scale, multiplier in (
            held,
            (held[0] * 3, held[1]),
            # Groups that had nothing may get something.
            (held[0], held[1] * torch.tensor([0, 1, 1, 0], dtype=torch.uint8)),
        ):
            errors = []
            for fit in (False, True):
                codes, *new = _requantize(target, scale, multiplier, fit=fit)
                values = dequantize(codes, new[0], torch.float32, new[1])
                errors.append(float((values - target).norm()))
                assert (new[0].shape, new[1].shape) == ((6,), (6, 4))
                assert new[1].dtype == torch.uint8
                assert int(new[1].max()) <= 127
                if not fit:
                    assert torch.equal(new[0], scale)
                    assert torch.equal(new[1], multiplier)
            assert errors[1] < errors[0]


@pytest.mark.parametrize("deployed", [False, True])
def test_a_layer_with_a_norm_of_its_own_is_not_merged(deployed: bool) -> None:
    """Its weight reads the normed input, the adapter the input itself."""
    model = nn.Sequential(OrderedDict(proj=RMSNormBitLinear(64, 64, bias=False))).eval()
    if deployed:
        model.proj.deploy()
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["proj"]))
    x = torch.randn(2, 64)
    before = peft_model(x)
    own = "proj must be a layer without a norm of its own"
    for way in (peft_model.merge_and_unload, peft_model.merge_adapter):
        with pytest.raises(LifecycleError, match="got a deployed layer" if deployed else own):
            way()
    with pytest.raises(LifecycleError, match=own):
        merge_and_requantize(peft_model)
    assert torch.equal(peft_model(x), before)


def test_adapters_on_float_layers_merge_exactly(source: Path) -> None:
    model = shaken(load(source, mode="infer"), 0.1, target_modules=["q_proj", "lm_head"])
    wrapper: Any = model.base_model.model.lm_head
    expected: Tensor = wrapper.base_layer.weight + wrapper.get_delta_weight("default")
    result = merge_and_requantize(model, verbose=False)
    assert torch.equal(result.model.lm_head.weight, expected)
    assert len(result.drift) == 2


def test_a_refused_merge_changes_nothing(source: Path) -> None:
    model = shaken(load(source, mode="infer"), 0.1)
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.down_proj.lora_B["default"].weight[0, 0] = (
            torch.nan
        )
    before = state_of(model)
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.down_proj must be finite"):
        merge_and_requantize(model)
    for name, tensor in state_of(model).items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), name
    dora = shaken(load(source), 0.1, use_dora=True)
    with pytest.raises(LifecycleError, match="a variant such as DoRA"):
        merge_and_requantize(dora)
