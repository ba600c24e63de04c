"""Small deployed models of several architectures and schemes, with transformers' own answers.

    python -m tests.bitlab_vllm.models FOLDER

Each is trained for a moment first, so that its next token is not a matter of the last bit.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from bitcore.quantize import dequantize, ternarize, weight_scale
from bitlab_hf import BitLabConfig, convert_ternary, save

VOCABULARY = 250
TOKENS = 16
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64}
GROUPS = {"weight_granularity": "per_group", "group_size": 64}
NORMS = {"sub_norm": ["o_proj", "down_proj"]}

EXPERTS = {"moe_intermediate_size": 128, "num_experts_per_tok": 3}


@dataclass(frozen=True)
class Case:
    """A model's configuration, its dtype, and the fields of BitLabConfig.

    With a granularity in `found`, the float model is made of ternary values of it, embedding and
    tied head too, and converted.
    """

    config: type[PreTrainedConfig]
    sizes: dict[str, Any] = field(default_factory=dict)
    scheme: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    found: str = ""


CASES = {
    # 506 inputs are no multiple of four, nor of 64; two ranks hold 253 of them each.
    "llama-tensor": Case(LlamaConfig, {"intermediate_size": 506}),
    "llama-bfloat16": Case(LlamaConfig, {"intermediate_size": 506}, dtype=torch.bfloat16),
    "llama-channel": Case(
        LlamaConfig,
        {"intermediate_size": 506, "num_key_value_heads": 1},
        {
            "weight_granularity": "per_channel",
            "modules_to_not_convert": ["model.layers.0.mlp.gate_proj", "model.layers.1.self_attn"],
        },
    ),
    "mistral-groups": Case(MistralConfig, {"head_dim": 32}, {**GROUPS, "head": "int8"}),
    "llama-floats": Case(LlamaConfig, {}, {**GROUPS, "group_scale_dtype": "float32"}),
    "qwen2-tied": Case(Qwen2Config, {"tie_word_embeddings": True}, {"head": "int8"}),
    "qwen3-mixed": Case(
        # Two processes share one head of keys, and cut groups of 128 in the middle.
        Qwen3Config,
        {"head_dim": 32, "num_key_value_heads": 1, "intermediate_size": 640},
        {
            "head": "ternary",
            "sub_norm": ["o_proj"],
            "int8_layers": [
                "model.layers.1.mlp",
                "model.layers.0.self_attn.v_proj",
                "model.layers.1.self_attn.o_proj",
            ],
            "overrides": {
                "*.v_proj": GROUPS,
                "*.up_proj": {"activation_dtype": "float32"},
                "*.down_proj": {"weight_granularity": "per_group", "group_size": 128},
            },
        },
    ),
    "gemma3": Case(
        Gemma3TextConfig, {**GEMMA, "tie_word_embeddings": True}, {**GROUPS, "head": "int8"}
    ),
    "phi3": Case(
        Phi3Config,
        {},
        {
            "weight_granularity": "per_channel",
            "head": "int8",
            "int8_layers": ["model.layers.0.mlp", "model.layers.1.self_attn"],
        },
    ),
    "phi3-groups": Case(Phi3Config, {}, GROUPS),
    "bitnet": Case(LlamaConfig, {}, {**NORMS, "weight_granularity": "per_channel"}),
    "bitnet-all": Case(LlamaConfig, {}, {"sub_norm": ["*_proj"], "weight_quantizer": "absmax"}),
    # Two ranks have three experts each, and two: a token's are on both.
    "qwen3-moe": Case(
        Qwen3MoeConfig,
        {**EXPERTS, "head_dim": 32, "num_experts": 6, "norm_topk_prob": True},
        {**GROUPS, "head": "int8", "overrides": {"*.gate_up_proj": {"group_size": 128}}},
    ),
    "mixtral": Case(
        MixtralConfig,
        {"intermediate_size": 132, "num_local_experts": 5},
        {"weight_granularity": "per_channel", "head": "int8"},
    ),
    "mixtral-float": Case(
        MixtralConfig,
        {"intermediate_size": 128, "num_local_experts": 5},
        {"weight_granularity": "per_channel", "experts": "keep"},
    ),
    "olmoe": Case(OlmoeConfig, {"num_experts": 5, "num_experts_per_tok": 2}),
    "qwen2-moe": Case(
        # A shared expert beside the others, and a layer without any.
        Qwen2MoeConfig,
        {
            **EXPERTS,
            "num_experts": 5,
            "shared_expert_intermediate_size": 128,
            "mlp_only_layers": [0],
        },
        {**GROUPS, "group_scale_dtype": "float32"},
    ),
    "experts-weights": Case(
        Qwen3MoeConfig,
        {**EXPERTS, "head_dim": 32, "num_experts": 6, "norm_topk_prob": True},
        {"activation_dtype": "float32"},
    ),
    "experts-float": Case(
        Qwen3MoeConfig, {**EXPERTS, "head_dim": 32, "num_experts": 6}, {"experts": "keep"}
    ),
    "qwen2-weights": Case(Qwen2Config, {}, {**GROUPS, "activation_dtype": "float32"}),
    "int8-layers": Case(
        # Under a tied head that stays float.
        LlamaConfig,
        {"intermediate_size": 506, "tie_word_embeddings": True},
        {"int8_layers": ["model.layers.0.mlp", "model.layers.1.self_attn.k_proj"]},
        torch.bfloat16,
    ),
    "ternary-embedding": Case(
        LlamaConfig, {}, {"activation_dtype": "int8"}, torch.bfloat16, found="per_channel"
    ),
    "ternary-tied": Case(
        Gemma3TextConfig,
        {**GEMMA, "tie_word_embeddings": True},
        {"activation_dtype": "int8"},
        found="per_group",
    ),
}


def token_ids(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def make_deployed(case: Case, folder: Path) -> Any:
    """Trains a float model for a moment, ternarizes and saves it; returns it as loaded anew."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(case.config(**{**SIZES, **case.sizes}))
    ids = token_ids(3, 4, 24)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    if case.found:
        convert(case, model, folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=case.dtype)
    model.to(case.dtype).save_pretrained(folder / "float")
    config = BitLabConfig(mode="infer", **case.scheme)
    model = AutoModelForCausalLM.from_pretrained(
        folder / "float", quantization_config=config, dtype=case.dtype
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("rms_norm.weight"):
                parameter.uniform_(0.5, 1.5)
    save(model, folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=case.dtype)


@torch.no_grad()
def convert(case: Case, model: Any, folder: Path) -> None:
    """Writes a model whose values become ternary, and changes its scheme afterwards."""
    tied = model.config.tie_word_embeddings
    for name, parameter in model.to(case.dtype).named_parameters():
        if parameter.dim() == 2 and (tied or name != "lm_head.weight"):
            scale = weight_scale(parameter, case.found, 64).to(case.dtype).float()
            parameter.copy_(dequantize(ternarize(parameter, scale), scale, case.dtype))
    source = folder.with_name(f"{folder.name}-float")
    model.save_pretrained(source)
    convert_ternary(source, folder, group_scale_dtype="uint8")
    written = json.loads((folder / "config.json").read_text())
    assert written["quantization_config"]["embedding"] == "ternary"
    written["quantization_config"] |= case.scheme
    (folder / "config.json").write_text(json.dumps(written))


def answers(model: Any) -> dict[str, Any]:
    """Prompts, the greedy tokens after them, the log-probability of each token but the first of
    prompt and answer, and by how much each greedy token is ahead of the next best.
    """
    ids = token_ids(3, 4, 24)
    prompts = [ids[0, :9], ids[1, :5], ids[2, :17], token_ids(9, 33)]
    greedy, found, leads = [], [], []
    for prompt in prompts:
        given = {"attention_mask": torch.ones_like(prompt[None]), "eos_token_id": None}
        whole = model.generate(
            prompt[None], max_new_tokens=TOKENS, do_sample=False, pad_token_id=0, **given
        )[0]
        with torch.no_grad():
            logs = model(input_ids=whole[None]).logits[0].float().log_softmax(-1)
        greedy.append(whole[len(prompt) :].tolist())
        found.append([float(logs[at - 1, whole[at]]) for at in range(1, len(whole))])
        first, second = logs[len(prompt) - 1 : -1].topk(2).values.T
        leads.append((first - second).tolist())
    asked = [one.tolist() for one in prompts]
    return {"prompts": asked, "greedy": greedy, "logprobs": found, "leads": leads}


def make_all(folder: Path, names: list[str]) -> None:
    """Makes cases in folders of their names, each with its ``answers.json``."""
    for name in names:
        model = make_deployed(CASES[name], folder / name)
        model.generation_config.eos_token_id = None
        (folder / name / "answers.json").write_text(json.dumps(answers(model)))


if __name__ == "__main__":
    make_all(Path(sys.argv[1]), sys.argv[2:] or list(CASES))
