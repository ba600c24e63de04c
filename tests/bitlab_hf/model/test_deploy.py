"""Deploying and undoing it, where somebody has changed the model in between."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import prune
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from bitcore.errors import ArgumentError, CheckpointError, LifecycleError
from bitlab_hf import BitLabConfig, deploy, quantized_layers, replace_linear, save
from bitlayers import BitLinear
from tests.bitlab_hf.models import VOCABULARY, logits_of, make_float_model

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


def latent(folder: Path, name: str = "llama", **options: Any) -> Any:
    source = make_float_model(name, folder)
    config = BitLabConfig(**options)
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=config).eval()


def reloaded(model: Any, folder: Path) -> Any:
    save(model, folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def test_a_ternary_head_of_replace_linear(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_float_model("llama", tmp_path)).eval()
    replace_linear(model, BitLabConfig(head="ternary"))
    expected = logits_of(model)
    deploy(model)
    again = reloaded(model, tmp_path / "packed")
    assert isinstance(again.lm_head, BitLinear)
    assert torch.equal(logits_of(again), expected)


@pytest.mark.parametrize("deployed", [True, False])
def test_a_head_that_somebody_put_in(deployed: bool, tmp_path: Path) -> None:
    model = latent(tmp_path, head="ternary")
    model.set_output_embeddings(nn.Linear(64, VOCABULARY, bias=False))
    expected = logits_of(model)
    if deployed:
        deploy(model)
    again = reloaded(model, tmp_path / "saved").eval()
    assert type(again.lm_head) is nn.Linear
    assert torch.equal(logits_of(again), expected)


@pytest.mark.parametrize("way", ["deployed", "reloaded"])
def test_a_base_model_is_saved_alone(way: str, tmp_path: Path) -> None:
    """Also of an architecture whose float files fuse what the model splits."""
    AutoModelForMaskedLM.from_config(transformers.NomicBertConfig(**SIZES)).save_pretrained(
        tmp_path / "float"
    )
    scheme = BitLabConfig()
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "float", quantization_config=scheme)
    deploy(model.eval())
    if way == "reloaded":
        save(model, tmp_path / "packed")
        model = AutoModelForMaskedLM.from_pretrained(tmp_path / "packed")
    ids = torch.arange(3, 11).view(2, 4)
    expected = model.base_model(input_ids=ids)[0]
    save(model.base_model, tmp_path / "base")
    again = AutoModel.from_pretrained(tmp_path / "base")
    assert torch.equal(again(input_ids=ids)[0], expected)
    floats = model.dequantize()
    save(floats.base_model, tmp_path / "floats")
    assert AutoModel.from_pretrained(tmp_path / "floats")(input_ids=ids)[0].shape == expected.shape


def test_hooks_of_heads_and_embeddings_survive(tmp_path: Path) -> None:
    model = latent(tmp_path, "qwen2", head="int8")
    calls: list[str] = []
    model.lm_head.register_forward_hook(lambda *_: calls.append("head"))
    model.model.embed_tokens.register_forward_hook(lambda *_: calls.append("embedding"))
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append("layer"))
    for change in (deploy, lambda deployed: deployed.dequantize()):
        model = change(model)
        calls.clear()
        logits_of(model)
        assert calls == ["embedding", "layer", "head"]


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_what_is_pruned_stops_deploy_before_any_commit(name: str, tmp_path: Path) -> None:
    model = latent(tmp_path, "qwen2")
    prune.l1_unstructured(model.model.layers[1].self_attn.q_proj, name, amount=0.5)
    expected = logits_of(model)
    with pytest.raises(LifecycleError, match=r"prune\.remove"):
        deploy(model)
    assert not any(found.module.is_deployed for found in quantized_layers(model))
    assert torch.equal(logits_of(model), expected)
    prune.remove(model.model.layers[1].self_attn.q_proj, name)
    assert torch.equal(logits_of(deploy(model)), expected)


def test_dequantize_after_a_save(tmp_path: Path) -> None:
    model = deploy(latent(tmp_path))
    save(model, tmp_path / "packed")
    floats = model.dequantize()
    assert floats.lm_head.weight.dtype == torch.float32
    assert not hasattr(floats.model, "hf_quantizer")
    floats.save_pretrained(tmp_path / "floats")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "floats")
    assert torch.equal(logits_of(again), logits_of(floats))


def test_dequantize_is_all_or_nothing(tmp_path: Path) -> None:
    model = deploy(latent(tmp_path, sub_norm=["down_proj"]))
    expected = logits_of(model)
    with pytest.raises(LifecycleError, match="nothing changed"):
        model.dequantize()
    assert len(quantized_layers(model)) == 14
    assert torch.equal(logits_of(model), expected)


def test_a_configuration_given_as_a_dict_says_how_to_load(tmp_path: Path) -> None:
    source = make_float_model("llama", tmp_path)
    scheme = {"quant_method": "bitlab", "mode": "infer", "weight_granularity": "per_channel"}
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=scheme)
    assert all(found.module.is_deployed for found in quantized_layers(model))


def test_floats_without_headers_are_packed_as_they_are(tmp_path: Path) -> None:
    """A float32 state dict, though the model is loaded in 16 bits."""
    source = make_float_model("llama", tmp_path)
    state = AutoModelForCausalLM.from_pretrained(source).state_dict()
    scheme = BitLabConfig(mode="infer")
    cls = transformers.LlamaForCausalLM
    config = cls.config_class.from_pretrained(source)
    model = cls.from_pretrained(
        None, config=config, state_dict=state, dtype=torch.bfloat16, quantization_config=scheme
    )
    name = "model.layers.1.mlp.up_proj"
    expected = BitLinear.from_linear(nn.Linear(64, 192, bias=False))
    expected.weight = nn.Parameter(state[f"{name}.weight"].clone())
    layer = model.get_submodule(name)
    assert torch.equal(layer.qweight, expected.eval().qweight)
    assert torch.equal(layer.qweight_scale, expected.qweight_scale)


def test_weights_tied_by_name_with_other_values_are_refused_when_packed(tmp_path: Path) -> None:
    class Tied(transformers.LlamaForCausalLM):
        _tied_weights_keys = {  # noqa: RUF012
            "model.layers.1.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight"
        }

    source = make_float_model("llama", tmp_path, tie_word_embeddings=True)
    state = AutoModelForCausalLM.from_pretrained(source).state_dict()
    config = Tied.config_class.from_pretrained(source)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight must have the values"):
        Tied.from_pretrained(
            None, config=config, state_dict=state, quantization_config=BitLabConfig(mode="infer")
        )


def test_a_state_dict_of_a_deployed_model_is_refused(tmp_path: Path) -> None:
    model = deploy(latent(tmp_path))
    with pytest.raises(ArgumentError, match="state_dict must be left out"):
        save(model, tmp_path / "packed", state_dict=model.state_dict())
    assert not (tmp_path / "packed").exists()


def test_a_model_with_a_ternary_head_is_freed_at_once(tmp_path: Path) -> None:
    model = latent(tmp_path, head="ternary")
    alive = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_learned_scale_is_resized_with_its_head(name: str, tmp_path: Path) -> None:
    model = latent(
        tmp_path, name, head="ternary", weight_quantizer="lsq", weight_granularity="per_channel",
        sub_norm=["lm_head"],
    )  # fmt: skip
    with torch.no_grad():
        model.lm_head.learned_scale.mul_(1.5)
        model.lm_head.rms_norm.weight.mul_(2)
    before = logits_of(model)
    model.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
    assert torch.equal(logits_of(model)[..., :VOCABULARY], before)
    assert not model.lm_head.training
    expected = logits_of(model)
    assert torch.equal(logits_of(deploy(model)), expected)
