"""transformers' configuration of a GGUF file, from its metadata."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    BitNetConfig,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteMoeConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from bitcore.errors import CheckpointError
from bitlab_hf.interop.gguf_architectures import (
    BY_NAME,
    GEMMA_PERIOD,
    MIXED,
    SMOLLM_PERIOD,
    attention_scalar,
    layer_types,
    rotating_layers,
)

_KINDS: dict[str, tuple[Any, str]] = {
    "llama": (LlamaConfig, "LlamaForCausalLM"),
    "qwen2": (Qwen2Config, "Qwen2ForCausalLM"),
    "qwen3": (Qwen3Config, "Qwen3ForCausalLM"),
    "bitnet": (BitNetConfig, "BitNetForCausalLM"),
    "gemma3": (Gemma3TextConfig, "Gemma3ForCausalLM"),
    "phi3": (Phi3Config, "Phi3ForCausalLM"),
    "granite": (GraniteConfig, "GraniteForCausalLM"),
    "smollm3": (SmolLM3Config, "SmolLM3ForCausalLM"),
}
# The same of files with experts.
_MIXTURES: dict[str, tuple[Any, str]] = {
    "llama": (MixtralConfig, "MixtralForCausalLM"),
    "qwen2moe": (Qwen2MoeConfig, "Qwen2MoeForCausalLM"),
    "qwen3moe": (Qwen3MoeConfig, "Qwen3MoeForCausalLM"),
    "olmoe": (OlmoeConfig, "OlmoeForCausalLM"),
    "granitemoe": (GraniteMoeConfig, "GraniteMoeForCausalLM"),
}
_GRANITE = ("granite", "granitemoe")
# What at most some architectures compute, and the value with which the others are right without it.
_COMPUTED_BY: dict[str, tuple[float, tuple[str, ...]]] = {
    "attention.sliding_window": (0, ("gemma3",)),
    "expert_count": (0, (*_MIXTURES,)),
    "final_logit_softcapping": (0.0, ("gemma3",)),
    "attn_logit_softcapping": (0.0, ()),
    "attention.scale": (0.0, _GRANITE),
    "embedding_scale": (1.0, _GRANITE),
    "residual_scale": (1.0, _GRANITE),
    "logit_scale": (1.0, _GRANITE),
    "rope.scale_linear": (1.0, ()),
    "rope.scaling.attn_factor": (1.0, ()),
}
_LARGEST = 2**31 - 1


def read_config(
    fields: dict[str, Any], shapes: dict[str, tuple[int, ...]], factors: Tensor | None
) -> PreTrainedConfig:
    """Returns the configuration of the model in a GGUF file.

    Args:
        fields: The file's fields.
        shapes: Shape of each tensor, rows first.
        factors: The tensor ``rope_freqs.weight``, float32 [head_dim / 2], if there is one.

    Raises:
        CheckpointError: The architecture is unknown, a field is missing or damaged, or the model
            computes something that is not supported.
    """
    architecture = fields.get("general.architecture")
    known = sorted({*_KINDS, *_MIXTURES})
    if not isinstance(architecture, str) or architecture not in known:
        raise CheckpointError(
            f"load_gguf: general.architecture must be one of {known}, "
            f"got {architecture!r:.80}\nRun the file with llama.cpp."
        )

    def number(name: str, default: int | None = None) -> int:
        value = fields.get(f"{architecture}.{name}", default)
        if type(value) is not int or not 0 < value <= _LARGEST:
            raise CheckpointError(
                f"load_gguf: {architecture}.{name} must be a positive integer, got {value!r:.80}"
            )
        return value

    def real(name: str, default: float | None = None) -> float:
        value = fields.get(f"{architecture}.{name}", default)
        if not isinstance(value, float) or not (math.isfinite(value) and value > 0):
            raise CheckpointError(
                f"load_gguf: {architecture}.{name} must be a positive number, got {value!r:.80}"
            )
        # The shortest number that rounds to the float32: 1e-05, not 9.99999974e-06.
        return float(str(np.float32(value)))

    embedding = shapes.get("token_embd.weight", ())
    if len(embedding) != 2:
        raise CheckpointError("load_gguf: token_embd.weight must be a matrix, got none")
    heads, hidden = number("attention.head_count"), number("embedding_length")
    head_dim = number("attention.key_length", max(1, hidden // heads))
    if head_dim % 2:
        raise CheckpointError(f"load_gguf: a head's size must be even, got {head_dim}")
    blocks = number("block_count")
    mixture = architecture not in _KINDS or fields.get(f"{architecture}.expert_count", 0) != 0
    rotated = number("rope.dimension_count", head_dim)
    without = {
        name: value
        for name, (value, architectures) in _COMPUTED_BY.items()
        if architecture not in architectures
    }
    for name, required in {
        "attention.value_length": head_dim,
        "rope.dimension_count": rotated if architecture == "phi3" else head_dim,
        "attention.sliding_window_pattern": GEMMA_PERIOD,
        **without,
    }.items():
        value = fields.get(f"{architecture}.{name}", required)
        if value != required:
            raise CheckpointError(
                f"load_gguf: {architecture}.{name} must be {required}, got {value!r:.80}\n"
                "Run the file with llama.cpp."
            )
    if blocks > len(shapes):
        raise CheckpointError(
            f"load_gguf: {architecture}.block_count must fit the {len(shapes)} tensors, "
            f"got {blocks}"
        )
    rope = _rope(fields, architecture, real("rope.freq_base", 10000.0))
    if factors is not None:
        rope = _llama3(factors, rope, head_dim)
    kind, name = (_MIXTURES if mixture else _KINDS)[architecture]
    experts = _experts(architecture, number, shapes) if mixture else {}
    special = {
        f"{token}_token_id": _token(fields, token, embedding[0])
        for token in ("bos", "eos", "pad")
        if f"tokenizer.ggml.{token}_token_id" in fields
    }
    config: PreTrainedConfig = kind(
        vocab_size=embedding[0],
        hidden_size=hidden,
        intermediate_size=number("feed_forward_length"),
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=number("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=number("context_length"),
        rms_norm_eps=real("attention.layer_norm_rms_epsilon"),
        tie_word_embeddings="output.weight" not in shapes,
        attention_bias="blk.0.attn_q.bias" in shapes,
        mlp_bias="blk.0.ffn_up.bias" in shapes,
        **_own(fields, architecture, number, real, rope, rotated / head_dim),
        **experts,
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **special},
    )
    config.architectures = [name]
    return config


def _own(
    fields: dict[str, Any],
    architecture: str,
    number: Any,
    real: Any,
    rope: dict[str, Any],
    partial: float,
) -> dict[str, Any]:
    """Returns the fields that not every architecture has, or has under this name.

    Args:
        fields: The file's.
        architecture: llama.cpp's name.
        number: Gives a positive integer of the file.
        real: Gives a positive number of the file.
        rope: Parameters of the rotary embedding.
        partial: The share of a head's rows that is rotated.
    """
    activation = BY_NAME[architecture].activation
    own: dict[str, Any] = {"rope_parameters": rope, "hidden_act": activation}
    layers = number("block_count")
    if architecture == "phi3":
        own["rope_parameters"] = {**rope, "partial_rotary_factor": partial}
        original = number("rope.scaling.original_context_length", number("context_length"))
        own["original_max_position_embeddings"] = original
    if architecture in _GRANITE:
        own.update(
            attention_multiplier=real("attention.scale"),
            embedding_multiplier=real("embedding_scale"),
            residual_multiplier=real("residual_scale"),
            logits_scaling=real("logit_scale"),
        )
    if architecture == "smollm3":
        own["no_rope_layers"] = rotating_layers(layers)
        own["no_rope_layer_interval"] = SMOLLM_PERIOD
    if architecture == "gemma3":
        hidden, heads = number("embedding_length"), number("attention.head_count")
        whole = number("attention.key_length", max(1, hidden // heads))
        local = {"rope_type": "default", "rope_theta": real("rope.freq_base_swa", 10000.0)}
        own = {
            "rope_parameters": {"full_attention": rope, "sliding_attention": local},
            "hidden_activation": activation,
            "sliding_window": number("attention.sliding_window"),
            "layer_types": layer_types(layers),
            "query_pre_attn_scalar": attention_scalar(layers, hidden // heads, whole),
            "use_bidirectional_attention": False,
            "attn_logit_softcapping": None,
            # 0 is llama.cpp's word for none.
            "final_logit_softcapping": (
                real("final_logit_softcapping")
                if fields.get("gemma3.final_logit_softcapping")
                else None
            ),
        }
    return own


def _experts(architecture: str, number: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Returns the fields of a mixture.

    Args:
        architecture: llama.cpp's name.
        number: Gives a positive integer of the file.
        shapes: Shape of each tensor, rows first.
    """
    count, used = number("expert_count"), number("expert_used_count")
    if used > count:
        raise CheckpointError(
            f"load_gguf: {architecture}.expert_used_count must be at most the number of experts, "
            f"{count}, got {used}"
        )

    def size(tensor: str, axis: int) -> int:
        # Of a damaged file it is refused as any other number that is not positive.
        return (*shapes.get(f"blk.0.{tensor}.weight", ()), 0, 0, 0)[axis]

    local = architecture in ("llama", "granitemoe")
    own = {"num_local_experts" if local else "num_experts": count, "num_experts_per_tok": used}
    if architecture.startswith("qwen"):
        own["moe_intermediate_size"] = number(
            "expert_feed_forward_length", size("ffn_gate_exps", 1)
        )
    if architecture == "qwen2moe":
        own["shared_expert_intermediate_size"] = number(
            "expert_shared_feed_forward_length", size("ffn_gate_shexp", 0)
        )
    fixed = MIXED.get(architecture, {})
    # Whether there are biases, the tensors say.
    return {**{name: fixed[name] for name in fixed.keys() - {"attention_bias"}}, **own}


def _token(fields: dict[str, Any], name: str, rows: int) -> int:
    value = fields[f"tokenizer.ggml.{name}_token_id"]
    if type(value) is not int or not 0 <= value < rows:
        raise CheckpointError(
            f"load_gguf: tokenizer.ggml.{name}_token_id must be one of the {rows} tokens, "
            f"got {value!r:.80}"
        )
    return value


def _rope(fields: dict[str, Any], architecture: str, theta: float) -> dict[str, Any]:
    factor = fields.get(f"{architecture}.rope.scaling.factor")
    # llama.cpp takes a factor alone for a linear one.
    scaling = fields.get(f"{architecture}.rope.scaling.type", "linear" if factor else "none")
    if scaling == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if scaling != "linear" or not isinstance(factor, float) or not factor > 0:
        raise CheckpointError(
            f"load_gguf: {architecture}.rope.scaling.type must be 'linear' with a factor, "
            f"got {scaling!r} with {factor!r}\nRun the file with llama.cpp."
        )
    return {"rope_type": "linear", "rope_theta": theta, "factor": factor}


def _llama3(factors: Tensor, rope: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Returns Llama 3's parameters that give these factors; the file does not name them.

    With L the original length, w a wavelength and h the high frequency factor, for a low frequency
    factor of 1: 1 / factor = (1 - s) / F + s, s = (L / w - 1) / (h - 1), clamped to 0 and 1. Any
    multiple of (L, low, high) gives the same factors. Formula: transformers'
    ``_compute_llama3_parameters``.
    """
    steps = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    wavelengths = 2 * math.pi * float(rope["rope_theta"]) ** steps
    found = factors.double()
    refusal = CheckpointError(
        "load_gguf: rope_freqs.weight must hold the factors of Llama 3, got others\n"
        "Run the file with llama.cpp."
    )
    if found.shape != wavelengths.shape or not bool((found >= 1 - 1e-4).all()):
        raise refusal
    factor = round(float(found.max()), 4)
    if rope["rope_type"] != "default" or not 1 < factor < math.inf:
        raise refusal
    smooth = (1 / found - 1 / factor) / (1 - 1 / factor)
    middle = (smooth > 1e-3) & (smooth < 1 - 1e-3)
    original, high = 8192.0, 4.0
    if int(middle.sum()) >= 2:
        sides = torch.stack([1 / wavelengths[middle], -smooth[middle]], dim=1)
        solved = torch.linalg.lstsq(sides, torch.ones(len(sides), 1, dtype=torch.float64)).solution
        original, high = float(solved[0].round()), round(float(solved[1]) + 1, 3)
    share = ((original / wavelengths - 1) / (high - 1)).clamp(0, 1)
    again = 1 / ((1 - share) / factor + share)
    if original < 1 or not torch.allclose(again, found, rtol=1e-4, atol=0):
        raise refusal
    return {
        "rope_type": "llama3",
        "rope_theta": rope["rope_theta"],
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": int(original),
    }
