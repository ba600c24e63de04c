"""Tiny float checkpoints of which every matrix is exactly ternary, the embedding too."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, BartConfig

from bitlab_hf import convert_ternary
from tests.bitlab_hf.interop.test_ternary import ternary
from tests.bitlab_hf.models import CONFIGS, auto_class

EMBEDDING = "model.embed_tokens"
# By what the scales belong to: what `ternary` makes of it, and the configuration's words for it.
KINDS = {"per_tensor": "per tensor", "per_channel": "per channel", "64": "per group of 64"}
_BART = BartConfig(
    vocab_size=97, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, scale_embedding=True,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    forced_eos_token_id=2, decoder_start_token_id=2,
)  # fmt: skip


def make_source(
    name: str,
    folder: Path,
    kind: str = "64",
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Path:
    """Saves a float model with an embedding [97, 128] (BART's is [97, 64])."""
    torch.manual_seed(0)
    if name == "bart":
        model = AutoModelForSeq2SeqLM.from_config(copy.deepcopy(_BART))
    else:
        config = copy.deepcopy(CONFIGS[name])
        config.update({"hidden_size": 128, **changes})
        model = auto_class(name).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                scheme = kind if parameter.shape[1] % 64 == 0 else "per_tensor"
                parameter.copy_(ternary(tuple(parameter.shape), scheme, torch.bfloat16))
    path = folder / f"ternary-{name}"
    model.to(dtype).save_pretrained(path)
    return path


def make_packed(name: str, folder: Path, kind: str = "64", **changes: Any) -> Path:
    """Converts such a model."""
    source = make_source(name, folder, kind, **changes)
    convert_ternary(source, folder / "packed")
    return folder / "packed"
