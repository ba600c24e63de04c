"""A rotated model computes what it did, from weights in another basis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from bitcore.errors import ArgumentError, ArgumentTypeError, LifecycleError
from bitlab_hf import BitLabConfig, save
from bitlab_hf.fit.rotate import KINDS, rotate

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
CONFIGS: dict[str, PreTrainedConfig] = {
    "granite": GraniteConfig(
        **SIZES, attention_bias=True, mlp_bias=True, residual_multiplier=0.5, logits_scaling=4.0,
        embedding_multiplier=2.0,
    ),
    "llama": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, head_dim=12, tie_word_embeddings=False),
    "phi3": Phi3Config(**SIZES),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "smollm3": SmolLM3Config(**SIZES),
}  # fmt: skip
IDS = torch.randint(1, 96, (8, 20), generator=torch.Generator().manual_seed(0))


def make(config: PreTrainedConfig) -> Any:
    """A model none of whose vectors is trivial."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.25, 2.0)
    return model


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_logits_from_other_weights(kind: str, tmp_path: Path) -> None:
    model = make(CONFIGS[kind])
    before, weights = logits_of(model), {k: v.clone() for k, v in model.state_dict().items()}
    difference = rotate(model)
    after = logits_of(model)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert difference < 1e-4
    same = [k for k, v in model.state_dict().items() if torch.equal(v, weights[k])]
    left = ("q_norm", "k_norm", "q_proj.bias", "k_proj.bias", "gate_proj.bias", "up_proj.bias")
    assert all(any(name in key for name in left) for key in same)
    norms = [n for n in weights if "layernorm" in n or n == "model.norm.weight"]
    assert len(norms) == 7
    for name in norms:
        size = weights[name].square().mean().sqrt()
        torch.testing.assert_close(model.state_dict()[name], size.expand(40))
    # Neither what is saved nor what is loaded ties the head again.
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not loaded.config.tie_word_embeddings
    assert torch.equal(logits_of(loaded), after)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_it_is_of_the_seed_and_reproducible() -> None:
    found = []
    for seed in (0, 0, 1):
        model = make(CONFIGS["llama"])
        rotate(model, seed=seed)
        found.append(model.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2], atol=1e-3)


def test_outliers_are_spread() -> None:
    model = make(CONFIGS["llama"])
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_()
        model.model.embed_tokens.weight[:, 5] += 20.0

    def worst() -> float:
        rows = model.model.embed_tokens.weight.detach()
        return float((rows.abs().amax(1) / rows.square().mean(1).sqrt()).median())

    assert worst() > 5
    rotate(model)
    assert worst() < 3


def test_latent_layers_of_the_result_are_made_ternary(tmp_path: Path) -> None:
    model = make(CONFIGS["qwen2"])
    rotate(model)
    save_at = tmp_path / "rotated"
    model.save_pretrained(save_at)
    packed = AutoModelForCausalLM.from_pretrained(
        save_at, quantization_config=BitLabConfig(mode="infer")
    )
    save(packed, tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits_of(again), logits_of(packed))


def test_sixteen_bits() -> None:
    model = make(CONFIGS["llama"]).to(torch.bfloat16)
    assert 0 < rotate(model) < 0.1
    assert model.model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16


def test_what_cannot_be_rotated_is_as_it_was(tmp_path: Path) -> None:
    model = make(CONFIGS["llama"])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.model.layers[1].mlp.extra = nn.Linear(4, 4)
    with pytest.raises(ArgumentError, match=r"no weights but their norms .* got mlp.extra.weight"):
        rotate(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if k in before)
    other = make(GemmaConfig(**SIZES, head_dim=8))
    with pytest.raises(ArgumentError, match="of a kind among .* got GemmaForCausalLM"):
        rotate(other)
    with pytest.raises(ArgumentTypeError, match="PreTrainedModel, got Linear"):
        rotate(nn.Linear(2, 2))  # type: ignore[arg-type]
    make(CONFIGS["qwen3"]).save_pretrained(tmp_path)
    latent = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitLabConfig())
    packed = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitLabConfig(mode="infer")
    )
    for quantized in (latent, packed):
        with pytest.raises(LifecycleError, match="must be in full precision"):
            rotate(quantized)


def test_a_model_that_computes_something_else_is_noticed() -> None:
    model = make(CONFIGS["llama"])
    # Reads the stream without a norm, which nothing says.
    model.model.layers[1].register_forward_hook(lambda m, a, y: y + a[0][..., :1])
    with pytest.raises(ArgumentError, match="must compute what it did, got logits that differ by"):
        rotate(model)
