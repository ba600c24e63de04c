"""Tiny mixtures of experts that differ in how they keep their experts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from tests.bitlab_hf.models import VOCABULARY

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_experts_per_tok": 2,
}  # fmt: skip
MOE: dict[str, Any] = {
    # One expert's matrices a file's tensor, in files of two of these under other names.
    "qwen3_moe": Qwen3MoeConfig(**_SIZES, head_dim=16, moe_intermediate_size=64, num_experts=5),
    "mixtral": MixtralConfig(**_SIZES, num_local_experts=4),
    "olmoe": OlmoeConfig(**_SIZES, num_experts=4),
    # A shared expert, with a gate that is a linear layer.
    "qwen2_moe": Qwen2MoeConfig(
        **_SIZES, moe_intermediate_size=64, num_experts=4, shared_expert_intermediate_size=64
    ),
    # The file's tensors hold all experts.
    "granitemoe": GraniteMoeConfig(**_SIZES, num_local_experts=4),
    # Transposed, gate and up in turn, with biases.
    "gpt_oss": GptOssConfig(**_SIZES, head_dim=16, num_local_experts=4),
    # One dense layer, and shared experts.
    "deepseek_v3": DeepseekV3Config(
        **{**_SIZES, "num_key_value_heads": 4}, moe_intermediate_size=64, n_routed_experts=4,
        n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
    ),
}  # fmt: skip


def make_moe(name: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Saves a random float mixture of experts; its biases are not zero, so that a lost one
    shows.
    """
    torch.manual_seed(0)
    config = copy.deepcopy(MOE[name])
    config.update(changes)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.1)
    path = folder / f"float-{name}-{dtype}"
    model.to(dtype).save_pretrained(path)
    return path


def load(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **options)
