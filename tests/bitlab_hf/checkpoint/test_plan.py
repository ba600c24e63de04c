"""Files whose names, ties and layers are not those of a plain model: one plan, one load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from bitcore.errors import CheckpointError
from bitlab_hf import BitLabConfig, deploy, quantized_layers, save
from bitlab_hf.checkpoint.headers import NAMES_KEY
from bitlayers import register_layer
from bitlayers.registry import LAYER_REGISTRY
from tests.bitlab_hf.models import logits_of, make_float_model, rewrite
from tests.bitlayers.test_own_packing import OwnCodes

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip

SCALES = [{}, {"weight_granularity": "per_group", "group_size": 64}]


def names(model: nn.Module) -> list[str]:
    return [found.names[0] for found in quantized_layers(model)]


def whole_life(auto: Any, source: Path, folder: Path, scales: dict[str, Any]) -> Any:
    """Every way from a float folder to a packed model gives the same bits; returns one."""
    ids = torch.arange(3, 19).view(2, 8)

    def output(model: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(input_ids=ids)[0]
        return found

    latent = auto.from_pretrained(source, quantization_config=BitLabConfig(**scales)).eval()
    expected, layers = output(latent), names(latent)
    save(latent, folder / "latent")
    save(deploy(latent), folder / "packed")
    latent.save_pretrained(folder / "plain")
    for path, scheme in (
        (folder / "packed", None),
        (folder / "plain", None),
        (source, BitLabConfig(mode="infer", **scales)),
        (folder / "latent", BitLabConfig(mode="infer")),
    ):
        options = {} if scheme is None else {"quantization_config": scheme}
        model, info = auto.from_pretrained(path, output_loading_info=True, **options)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert names(model) == layers
        assert torch.equal(output(model), expected)
        again = auto.from_pretrained(folder / "latent").eval()
        assert torch.allclose(output(again), expected, atol=1e-6)
    return model


@pytest.mark.parametrize("scales", SCALES, ids=["tensor", "groups"])
@pytest.mark.parametrize("kind", ["NomicBertConfig", "JinaEmbeddingsV3Config"])
def test_files_that_fuse_what_the_model_splits(
    kind: str, scales: dict[str, Any], tmp_path: Path
) -> None:
    config = getattr(transformers, kind)(**SIZES)
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "float")
    fused = load_file(tmp_path / "float" / "model.safetensors")
    assert any("qkv" in key.lower() for key in fused)
    whole_life(AutoModelForMaskedLM, tmp_path / "float", tmp_path, scales)
    with safe_open(tmp_path / "packed" / "model.safetensors", framework="pt") as handle:
        assert handle.metadata()[NAMES_KEY] == "model"
        assert not any("qkv" in key.lower() for key in handle.keys())  # noqa: SIM118


@pytest.mark.parametrize("scales", SCALES, ids=["tensor", "groups"])
def test_linears_tied_to_each_other(scales: dict[str, Any], tmp_path: Path) -> None:
    """Zamba's shared block is one for several layers; an embedding has no part in it."""
    config = transformers.ZambaConfig(
        **{**SIZES, "num_hidden_layers": 6}, attn_layer_period=2, attn_layer_offset=1,
        mamba_d_state=8, mamba_dt_rank=4, n_mamba_heads=2, use_mamba_kernels=False,
        num_key_value_heads=4,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "float")
    model = whole_life(AutoModelForCausalLM, tmp_path / "float", tmp_path, scales)
    by_weight: dict[int, list[str]] = {}
    for found in quantized_layers(model):
        by_weight.setdefault(found.module.qweight.data_ptr(), []).append(found.names[0])
    shared = [group for group in by_weight.values() if len(group) > 1]
    assert shared
    assert all(len({name.rpartition(".")[2] for name in group}) == 1 for group in shared)
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    leaves = list(quantized_layers(model)[0].module.packed_tensors())
    assert len(leaves) == (3 if scales else 2)
    for group in shared:
        for leaf in leaves:
            assert sum(f"{name}.{leaf}" in stored for name in group) == 1
            held = [getattr(model.get_submodule(name), leaf) for name in group]
            assert len({tensor.data_ptr() for tensor in held}) == 1
    # A file that holds each of them is loaded as it says.
    first, second = shared[0][:2]
    holder = first if f"{first}.qweight" in stored else second
    other = second if holder == first else first

    def add(tensors: dict[str, Tensor]) -> None:
        for leaf in leaves:
            factor = 2 if leaf == "qweight_scale" else 1
            tensors[f"{other}.{leaf}"] = tensors[f"{holder}.{leaf}"] * factor

    rewrite(tmp_path / "packed", add)
    apart = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    scales = [apart.get_submodule(name).qweight_scale for name in (holder, other)]
    assert torch.equal(2 * scales[0], scales[1])


def test_a_file_of_an_earlier_bitlab_has_the_names_of_float_files(tmp_path: Path) -> None:
    """Without the header's field names are changed as transformers changes them."""
    source = make_float_model("bert", tmp_path)
    latent = AutoModelForMaskedLM.from_pretrained(source, quantization_config=BitLabConfig())
    model = deploy(latent.eval())
    save(model, tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    with safe_open(file, framework="pt") as handle:
        metadata = dict(handle.metadata())
    del metadata[NAMES_KEY]
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): t for name, t in tensors.items()}
    assert old.keys() != tensors.keys()
    save_file(old, file, metadata)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits_of(again), logits_of(model))


def test_no_packed_tensor_stays_unclaimed(tmp_path: Path) -> None:
    source = make_float_model("llama", tmp_path)
    scheme = BitLabConfig(mode="infer")
    save(AutoModelForCausalLM.from_pretrained(source, quantization_config=scheme), tmp_path / "p")

    def rename(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.0.mlp.up_proj"
        for leaf in ("qweight", "qweight_scale"):
            tensors[f"{name}.weight.{leaf}"] = tensors[f"{name}.{leaf}"].clone()

    rewrite(tmp_path / "p", rename)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight\.qweight must belong to a layer"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "p")


def test_the_base_model_of_a_file_with_a_ternary_head(tmp_path: Path) -> None:
    source = make_float_model("llama", tmp_path)
    scheme = BitLabConfig(mode="infer", head="ternary")
    save(AutoModelForCausalLM.from_pretrained(source, quantization_config=scheme), tmp_path / "p")
    base = AutoModel.from_pretrained(tmp_path / "p")
    assert len(names(base)) == 14


def test_a_file_does_not_decide_whether_it_is_verified(tmp_path: Path) -> None:
    source = make_float_model("llama", tmp_path)
    scheme = BitLabConfig(mode="infer")
    save(AutoModelForCausalLM.from_pretrained(source, quantization_config=scheme), tmp_path / "p")
    rewrite(tmp_path / "p", lambda t: t["model.layers.0.mlp.up_proj.qweight"].fill_(255))
    config = json.loads((tmp_path / "p" / "config.json").read_text())
    config["quantization_config"]["verify"] = False
    (tmp_path / "p" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="invalid code 3"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "p")
    AutoModelForCausalLM.from_pretrained(
        tmp_path / "p", quantization_config=BitLabConfig(verify=False)
    )


def test_a_head_tied_in_the_decoder(tmp_path: Path) -> None:
    part = {
        "vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    }  # fmt: skip
    config = transformers.T5GemmaConfig(encoder=part, decoder=part, vocab_size=97)
    auto = transformers.AutoModelForSeq2SeqLM
    auto.from_config(config).save_pretrained(tmp_path / "float")
    scheme = BitLabConfig(head="int8")
    latent = auto.from_pretrained(tmp_path / "float", quantization_config=scheme).eval()
    model = deploy(latent)
    ids = torch.arange(3, 11).view(2, 4)
    expected = model(input_ids=ids, decoder_input_ids=ids).logits
    save(model, tmp_path / "packed")
    again = auto.from_pretrained(tmp_path / "packed")
    assert torch.equal(again(input_ids=ids, decoder_input_ids=ids).logits, expected)


def test_a_layer_that_packed_itself_is_saved_and_reloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LAYER_REGISTRY, "OwnBytes", register_layer("OwnBytes")(OwnCodes))
    source = make_float_model("qwen2", tmp_path)
    scheme = BitLabConfig(layer="OwnBytes")
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=scheme).eval()
    expected = logits_of(model)
    deploy(model)
    assert torch.equal(logits_of(model), expected)
    save(model, tmp_path / "packed")
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    assert "model.layers.0.mlp.up_proj.signs" in stored
    assert not any(name.endswith("qweight") for name in stored)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert len(names(again)) == 14
    assert all(found.module.packs_itself for found in quantized_layers(again))
    assert torch.equal(logits_of(again), expected)
    save(again, tmp_path / "twice")
    twice = AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    assert torch.equal(logits_of(twice), expected)
    packed = BitLabConfig(layer="OwnBytes", mode="infer")
    loaded = AutoModelForCausalLM.from_pretrained(source, quantization_config=packed)
    assert torch.equal(logits_of(loaded), expected)
