"""The quality benchmark's small models: pretrained once a domain, in one pass over their text."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from quality_text import VOCABULARY, Domain
from results import write_json
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bitlab_hf import save


def build_model(hidden: int, layers: int, length: int) -> LlamaForCausalLM:
    """Builds a Llama model with random weights from torch's seed."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=length,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
            initializer_range=0.02,
        )
    )


@torch.no_grad()
def nats(model: Any, blocks: Tensor, batch: int = 8) -> float:
    """Returns the mean loss in nats a token, every block's first token left out, in eval mode."""
    model.eval()
    losses = [
        model(input_ids=part, labels=part).loss.item() * len(part) for part in blocks.split(batch)
    ]
    return float(sum(losses) / len(blocks))


def pretrain(
    domain: Domain, folder: Path, hidden: int, layers: int, tokens: int, batch: int = 8
) -> dict[str, Any]:
    """Trains a model on each block of the pretraining part once and saves it; once a folder.

    Muon for the hidden matrices, AdamW for the rest, as for the demo's model: fewer tokens are
    needed than with AdamW alone, and a small text is all there is.
    """
    record = folder / "pretrain.json"
    if record.is_file():
        found: dict[str, Any] = json.loads(record.read_text())
        return found
    torch.manual_seed(0)
    length = domain.parts["pretrain"].shape[1]
    blocks = domain.parts["pretrain"][: max(1, tokens // length)]
    model = build_model(hidden, layers, length).train()
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(1))
    steps = order.split(batch)
    started = time.process_time()
    for step, rows in enumerate(steps):
        warm = min(1.0, (step + 1) / 30)
        factor = warm * (0.02 + 0.49 * (1 + math.cos(math.pi * step / len(steps))))
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
        ids = blocks[rows]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            print(
                f"pretrain {folder.name}: step {step}/{len(steps)} loss {loss.item():.3f}",
                flush=True,
            )
    result = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "pretrain_tokens": blocks.numel(),
        "tokens": {part: rows.numel() for part, rows in domain.parts.items()},
        "cpu_seconds": time.process_time() - started,
        "validation_nats": nats(model, domain.parts["validation"]),
        "first_pretrain_blocks_nats": nats(model, blocks[: len(domain.parts["validation"])]),
    }
    save(model, folder / "model", tokenizer=domain.tokenizer)
    write_json(record, result)
    return result
