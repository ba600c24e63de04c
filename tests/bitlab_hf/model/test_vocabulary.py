"""Heads resized after conversion."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitcore.errors import LifecycleError
from bitlab_hf import BitLabConfig, deploy, replace_linear, save
from bitlayers import BitLinear
from tests.bitlab_hf.models import VOCABULARY, logits_of, make_float_model

MORE = VOCABULARY + 7


def latent(name: str, folder: Path, **options: Any) -> Any:
    source = make_float_model(name, folder)
    config = BitLabConfig(head="ternary", **options)
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=config).eval()


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("copied", [False, True])
def test_a_ternary_head_stays_ternary(name: str, copied: bool, tmp_path: Path) -> None:
    model = latent(name, tmp_path)
    scheme = model.lm_head.quant_config
    model = copy.deepcopy(model) if copied else model
    before = logits_of(model)
    model.resize_token_embeddings(MORE, mean_resizing=False)
    assert isinstance(model.lm_head, BitLinear)
    assert model.lm_head.quant_config == scheme
    assert model.lm_head.out_features == MORE
    expected = logits_of(model)
    assert expected.shape[-1] == MORE
    assert expected.shape[:-1] == before.shape[:-1]
    assert torch.allclose(logits_of(model.train()), expected, atol=1e-5)
    deploy(model.eval())
    assert torch.equal(logits_of(model), expected)
    save(model, tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits_of(again), expected)


@pytest.mark.parametrize("way", ["deployed", "reloaded"])
def test_a_packed_head_is_not_resized(way: str, tmp_path: Path) -> None:
    model = deploy(latent("llama", tmp_path))
    if way == "reloaded":
        save(model, tmp_path / "packed")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    expected = logits_of(model)
    with pytest.raises(LifecycleError, match="resize_token_embeddings"):
        model.resize_token_embeddings(MORE)
    assert model.resize_token_embeddings(VOCABULARY) is model.get_input_embeddings()
    assert torch.equal(logits_of(model), expected)
    floats = model.dequantize()
    floats.resize_token_embeddings(MORE)
    assert logits_of(floats).shape[-1] == MORE


def test_a_float_head_is_resized_as_ever(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_float_model("llama", tmp_path))
    replace_linear(model)
    deploy(model)
    before = logits_of(model)
    model.resize_token_embeddings(MORE, mean_resizing=False)
    assert torch.equal(logits_of(model)[..., :VOCABULARY], before)


@pytest.mark.parametrize("rows", [MORE, VOCABULARY - 5])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_learned_scales_of_groups_follow_the_rows(rows: int, dtype: str, tmp_path: Path) -> None:
    model = latent(
        "llama",
        tmp_path,
        weight_quantizer="lsq",
        weight_granularity="per_group",
        group_size=64,
        group_scale_dtype=dtype,
    )
    with torch.no_grad():
        model.lm_head.learned_scale.mul_(1.5)
    before = model.lm_head.learned_scale.detach().clone()
    assert before.shape == (VOCABULARY, 1)
    model.resize_token_embeddings(rows, mean_resizing=False)
    after, kept = model.lm_head.learned_scale, min(rows, VOCABULARY)
    assert after.shape == (rows, 1)
    assert torch.equal(after[:kept], before[:kept])
    weight = model.lm_head.weight.detach()
    torch.testing.assert_close(after[kept:], 2 * weight[kept:].abs().mean(1, keepdim=True))
    ids = torch.arange(8).view(1, 8)
    expected = model(input_ids=ids).logits
    save(deploy(model), tmp_path / "packed")
    assert torch.equal(model(input_ids=ids).logits, expected)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(again(input_ids=ids).logits, expected)
