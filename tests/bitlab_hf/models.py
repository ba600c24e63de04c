"""Tiny models of four architectures, and what the tests do to them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    GemmaConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
)

VOCABULARY = 97
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**_SIZES, num_key_value_heads=2, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**_SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "gemma": GemmaConfig(**_SIZES, num_key_value_heads=1, head_dim=16),
    "bert": BertConfig(**_SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
}


def auto_class(name: str) -> Any:
    return AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM


def make_float_model(
    name: str, folder: Path, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """Saves a random float model; its biases are not zero, so that a lost one shows."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    config.update(changes)
    model = auto_class(name).from_config(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.1)
    path = folder / f"float-{name}-{dtype}"
    model.to(dtype).save_pretrained(path)
    return path


def token_ids() -> Tensor:
    return torch.randint(0, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(7))


def logits_of(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=token_ids()).logits
    return logits


def training_data(count: int = 32) -> list[dict[str, Tensor]]:
    ids = torch.randint(0, VOCABULARY, (count, 24), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": row} for row in ids]


def rewrite(
    folder: Path, change: Callable[[dict[str, Tensor]], Any], keep_metadata: bool = True
) -> None:
    """Writes a checkpoint's file anew after a change of its tensors."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    with safe_open(file, framework="pt") as handle:
        metadata = handle.metadata() if keep_metadata else {"format": "pt"}
    change(tensors)
    save_file(tensors, file, metadata)


def counts_of(folder: Path) -> str:
    """Returns what a deployed model's card says of its sizes."""
    return (folder / "README.md").read_text().split("## What is in it")[1].split("<!--")[0]


def taught(path: Path) -> Path:
    """Trains a float model to know `training_data`, and saves it in its place."""
    model = AutoModelForCausalLM.from_pretrained(path).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.stack([row["input_ids"] for row in training_data()])
    for _ in range(40):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(path)
    return path
