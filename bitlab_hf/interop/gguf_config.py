"""transformers' configuration of a GGUF file, from its metadata."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BitNetConfig, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from bitcore.errors import CheckpointError

_KINDS: dict[str, tuple[Any, str]] = {
    "llama": (LlamaConfig, "LlamaForCausalLM"),
    "qwen2": (Qwen2Config, "Qwen2ForCausalLM"),
    "qwen3": (Qwen3Config, "Qwen3ForCausalLM"),
    "bitnet": (BitNetConfig, "BitNetForCausalLM"),
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
    if not isinstance(architecture, str) or architecture not in _KINDS:
        raise CheckpointError(
            f"load_gguf: general.architecture must be one of {sorted(_KINDS)}, "
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
    for name, required in (
        ("attention.value_length", head_dim),
        ("rope.dimension_count", head_dim),
        ("attention.sliding_window", 0),
        ("expert_count", 0),
    ):
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
    kind, name = _KINDS[architecture]
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
        rope_parameters=rope,
        hidden_act="silu",
        tie_word_embeddings="output.weight" not in shapes,
        attention_bias="blk.0.attn_q.bias" in shapes,
        mlp_bias="blk.0.ffn_up.bias" in shapes,
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **special},
    )
    config.architectures = [name]
    return config


def _token(fields: dict[str, Any], name: str, rows: int) -> int:
    value = fields[f"tokenizer.ggml.{name}_token_id"]
    if type(value) is not int or not 0 <= value < rows:
        raise CheckpointError(
            f"load_gguf: tokenizer.ggml.{name}_token_id must be one of the {rows} tokens, "
            f"got {value!r:.80}"
        )
    return value


def _rope(fields: dict[str, Any], architecture: str, theta: float) -> dict[str, Any]:
    scaling = fields.get(f"{architecture}.rope.scaling.type", "none")
    if scaling == "none":
        return {"rope_type": "default", "rope_theta": theta}
    factor = fields.get(f"{architecture}.rope.scaling.factor")
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
