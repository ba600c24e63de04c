"""verify_exactly: guessed tokens have the bits that they have one by one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bitcore.errors import ArgumentError, LifecycleError
from bitlab_hf import BitLabConfig, deploy, replace_linear, verify_exactly
from bitlab_hf.model.verifying import _Alone, _current, attend_each_alone
from tests.bitlab_vllm.models import CASES, make_deployed, token_ids

NEW = 24
OPTIONS: dict[str, Any] = {
    "max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
    "output_logits": True, "return_dict_in_generate": True,
}  # fmt: skip
# Gemma's window is 64. A router; float layers beside ternary ones; weights alone; a ternary head.
MODELS = ["mistral-groups", "gemma3", "qwen3-moe"]
MORE = ["ternary-tied", "llama-channel", "qwen2-weights", "int8-layers"]


def prompts() -> list[Tensor]:
    """What the models have learned, said twice; a window that guesses leave, and one that the
    prompt has left; what has no guess.
    """
    learned = token_ids(3, 4, 24)
    again = token_ids(5, 40).repeat(4)
    return [learned[0].repeat(2), learned[1].repeat(3)[:62], again[:130], learned[1][:5]]


def generate(model: Any, prompt: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Returns the new tokens, and the logits of each."""
    given = {"attention_mask": torch.ones_like(prompt)[None], **OPTIONS, **options}
    found = model.generate(prompt[None], **given)
    return found.sequences[0, len(prompt) :], torch.cat(list(found.logits))[:NEW]


@pytest.mark.parametrize(
    "name", [*MODELS, *(pytest.param(one, marks=pytest.mark.ci) for one in MORE)]
)
def test_guesses_change_no_bit(name: str, tmp_path: Path) -> None:
    model = make_deployed(CASES[name], tmp_path)
    # A float head takes all guesses at once, which rounds otherwise.
    if type(model.lm_head) is torch.nn.Linear:
        model.lm_head.forward = _Alone(model.lm_head.forward)
    plain = [generate(model, one) for one in prompts()]
    verify_exactly(model)
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    model.register_forward_pre_hook(count)
    for prompt, (tokens, logits) in zip(prompts(), plain, strict=True):
        found = generate(model, prompt, prompt_lookup_num_tokens=4)
        assert torch.equal(found[0], tokens)
        assert torch.equal(found[1], logits)
    assert passes < len(plain) * NEW
    # And without guesses nothing is another.
    assert torch.equal(generate(model, prompts()[0])[1], plain[0][1])


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return make_deployed(CASES["mistral-groups"], tmp_path)


def test_another_model_guesses(model: Any) -> None:
    prompt = prompts()[1]
    plain = generate(model, prompt)
    assistant = copy.deepcopy(model)
    verify_exactly(model)
    found = generate(model, prompt, assistant_model=assistant)
    assert torch.equal(found[0], plain[0])
    assert torch.equal(found[1], plain[1])


@pytest.mark.parametrize("hidden", [slice(0, 7), slice(9, 12)])
def test_masked_tokens_are_not_seen(model: Any, hidden: slice) -> None:
    """Padding, and a gap: the bits may be others, what is hidden has no say."""
    prompt = prompts()[0]
    mask = torch.ones_like(prompt)[None]
    mask[:, hidden] = 0
    tokens, logits = generate(model, prompt, attention_mask=mask)
    verify_exactly(model)
    for noise in (0, 1):
        prompt[hidden] = prompt[hidden] % 200 + 3 + noise
        found = generate(model, prompt, attention_mask=mask, prompt_lookup_num_tokens=4)
        assert torch.equal(found[0], tokens)
        assert torch.allclose(found[1], logits, atol=0.05)


def test_copies_and_a_second_call(model: Any) -> None:
    prompt = prompts()[0]
    plain = generate(model, prompt)
    verify_exactly(model)
    hooks = len(model._forward_hooks)
    verify_exactly(model)
    assert len(model._forward_hooks) == hooks
    copied = copy.deepcopy(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.qweight.zero_()
    found = generate(copied, prompt, prompt_lookup_num_tokens=4)
    assert torch.equal(found[1], plain[1])


def test_what_it_cannot_do(model: Any) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    latent = LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    ).eval()
    replace_linear(latent, BitLabConfig())
    with pytest.raises(LifecycleError, match="verify_exactly: the model must be deployed"):
        verify_exactly(latent)
    deploy(latent)
    latent.set_attn_implementation("eager")
    with pytest.raises(ArgumentError, match="must be 'sdpa', got 'eager'"):
        verify_exactly(latent)


OTHERWISE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "not causal": ({"is_causal": False}, {}),
    "not said to be causal": ({}, {}),
    "not causal by argument": ({"is_causal": True}, {"is_causal": False}),
    "biases of positions": ({"is_causal": True}, {"position_bias": torch.randn(1, 2, 5, 5)}),
    "a mask of floats": ({"is_causal": True}, {"attention_mask": torch.randn(1, 2, 5, 5)}),
    "a mask for each head": (
        {"is_causal": True}, {"attention_mask": torch.ones(1, 2, 5, 5, dtype=torch.bool).tril()},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_attends_otherwise_attends_at_once(name: str) -> None:
    """Encoders, biases, masks of other kinds: guesses are no special queries there."""
    attributes, asked = OTHERWISE[name]
    attention = torch.nn.Module()
    for key, value in attributes.items():
        setattr(attention, key, value)
    tensors = torch.randn(3, 1, 2, 5, 16).unbind(0)
    asked = {"attention_mask": None, **asked}
    _current.begin(3)
    try:
        found, _ = attend_each_alone(attention, *tensors, **asked)
    finally:
        _current.begin(1)
    assert torch.equal(found, sdpa_attention_forward(attention, *tensors, **asked)[0])


SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MIXTURE: dict[str, Any] = {
    "num_experts_per_tok": 2, "moe_intermediate_size": 64, "num_experts": 4, "num_dense_layers": 1,
    "layer_types": ["full_attention"] * 2,
}  # fmt: skip
# Norms whose weight has two dimensions, routers that are given more than tokens, short windows.
UNUSUAL: dict[str, tuple[str, dict[str, Any]]] = {
    "norms of heads": ("cohere", {"use_qk_norm": True}),
    "a router with a bias": ("lfm2_moe", MIXTURE),
    "a router without one": ("lfm2_moe", {**MIXTURE, "use_expert_bias": False}),
    "another such router": ("minimax_m2", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "a router that views": (
        "deepseek_v3",
        {
            "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 32,
            "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "n_group": 1,
            "topk_group": 1, "n_routed_experts": 4, "num_experts_per_tok": 2,
            "first_k_dense_replace": 1, "moe_intermediate_size": 64,
        },
    ),
    "a window": ("mistral", {"sliding_window": 8}),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_models(name: str) -> None:
    kind, sizes = UNUSUAL[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **sizes})
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    replace_linear(model, BitLabConfig())
    deploy(model)
    ids = torch.randint(3, 96, (3, 7), generator=torch.Generator().manual_seed(1)).repeat(1, 2)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.no_grad():
        plain = model(ids, attention_mask=mask).logits
        several = model(ids, attention_mask=mask, logits_to_keep=4).logits
        kept = model(ids[:1], logits_to_keep=4).logits
    expected = generate(model, ids[0], max_new_tokens=12)
    verify_exactly(model)
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        # Without guesses not a bit is another, and with some the model is the same.
        assert torch.equal(model(ids, attention_mask=mask).logits, plain)
        assert torch.equal(model(ids, attention_mask=mask, logits_to_keep=4).logits, several)
        assert torch.allclose(model(ids[:1], logits_to_keep=4).logits, kept, atol=0.05)
    found = generate(model, ids[0], max_new_tokens=12, prompt_lookup_num_tokens=3)
    size = min(len(found[1]), len(expected[1]))
    assert torch.allclose(found[1][:size], expected[1][:size], atol=0.05)


def test_a_static_cache_and_models_of_one_configuration(model: Any) -> None:
    prompt = prompts()[0][None]
    twin = copy.deepcopy(model)
    twin.config = model.config
    verify_exactly(model)
    verify_exactly(twin)
    found = generate(twin, prompt[0], prompt_lookup_num_tokens=4)
    assert torch.equal(found[1], generate(model, prompt[0])[1])
    with torch.no_grad():
        plain = model(prompt).logits[:, -4:]
        cache = StaticCache(config=model.config, max_cache_len=64)
        kept = model(prompt, past_key_values=cache, logits_to_keep=4).logits
    assert torch.allclose(kept, plain, atol=0.05)
    assert not _current.seen


def test_torch_compile_still_takes_all_of_it(model: Any) -> None:
    verify_exactly(model)
    compiled = torch.compile(model.__call__, fullgraph=True, backend="eager")
    prompt = prompts()[0][None]
    with torch.no_grad():
        assert torch.allclose(compiled(prompt).logits, model(prompt).logits, atol=0.05)
