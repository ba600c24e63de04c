"""Pretrains the small language model that ships with BitLab, in `bitlab_hf/demo/model`.

A Llama-architecture model of about 5 million parameters learns the Python standard library's
sources (see `bitlab_hf/demo/corpus.py` for the split; held-out files are never read here except to
be scored). The run is deterministic for one machine, one thread count and one Python version.
Hidden matrices are trained with Muon, which needs fewer tokens than AdamW at this size, so the text
is passed over as few times as possible; the rest with AdamW.

    python scripts/pretrain_demo_lm.py --output bitlab_hf/demo/model

With ``--experts`` it is a small mixture of experts instead, of Qwen3-MoE's architecture and with
its own loss for an even load: a model to try what BitLab does with one, ready in minutes.

    python scripts/pretrain_demo_lm.py --output out/moe --experts 16 --steps 400 --batch 8
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

from bitlab_hf.demo.corpus import Split, source_files

VOCABULARY = 2048
BLOCK = 512
SEPARATOR = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=SEPARATOR,
        model_max_length=2 * BLOCK,
        clean_up_tokenization_spaces=False,
    )


def build_model(experts: int) -> PreTrainedModel:
    """Builds the model with random weights: a mixture of so many experts, or a dense one at 0."""
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2 * BLOCK,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "initializer_range": 0.02,
    }
    if experts:
        config: PreTrainedConfig = Qwen3MoeConfig(
            **common,
            hidden_size=128,
            head_dim=32,
            moe_intermediate_size=128,
            num_hidden_layers=4,
            num_experts=experts,
            num_experts_per_tok=min(4, experts),
            norm_topk_prob=True,
            output_router_logits=True,
        )
    else:
        config = LlamaConfig(**common, hidden_size=256, intermediate_size=768, num_hidden_layers=6)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def blocks_of(tokenizer: PreTrainedTokenizerFast, split: Split, with_tests: bool) -> torch.Tensor:
    """Returns the split's tokens as int64 [blocks, BLOCK]; files in an order shuffled once."""
    texts = [file.text for file in source_files(split, with_tests=with_tests)]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    encoded = tokenizer([texts[i] for i in order], add_special_tokens=False)["input_ids"]
    stream = torch.tensor(list(chain.from_iterable([0, *ids] for ids in encoded)))
    count = stream.numel() // BLOCK
    return stream[: count * BLOCK].view(count, BLOCK)


@torch.no_grad()
def heldout_loss(model: PreTrainedModel, blocks: torch.Tensor) -> float:
    """Returns the mean loss in nats a token over the held-out blocks, in float32, without what an
    uneven load of experts adds to it.
    """
    model.eval()
    balanced = getattr(model.config, "output_router_logits", False)
    alone = {"output_router_logits": False} if balanced else {}
    losses = [
        model(input_ids=part, labels=part, **alone).loss * len(part) for part in blocks.split(16)
    ]
    model.train()
    return float(sum(losses) / len(blocks))


def schedule(step: int, steps: int) -> float:
    """Returns the learning-rate factor: a short linear warm-up, then a cosine down to 2 %."""
    warmup = 50
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


def main() -> None:
    """Trains and saves the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, required=True, help="the folder to write the model to"
    )
    parser.add_argument(
        "--experts", type=int, default=0, help="a mixture of so many, of which a token visits 4"
    )
    parser.add_argument("--steps", type=int, default=1900)
    parser.add_argument("--batch", type=int, default=16, help="blocks of 512 tokens a step")
    parser.add_argument("--muon-lr", type=float, default=0.01)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    tokenizer = train_tokenizer(file.text for file in source_files("train"))
    train = blocks_of(tokenizer, "train", with_tests=True)
    heldout = blocks_of(tokenizer, "heldout", with_tests=False)
    model = build_model(args.experts).train()
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{parameters / 1e6:.2f} M parameters, {train.numel() / 1e6:.2f} M training tokens, "
        f"{args.steps * args.batch * BLOCK / train.numel():.2f} passes",
        flush=True,
    )

    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=0.1, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base_rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]

    generator = torch.Generator().manual_seed(1)
    order = torch.empty(0, dtype=torch.int64)
    started, running = time.monotonic(), float("nan")
    for step in range(args.steps):
        if order.numel() < args.batch:
            order = torch.cat([order, torch.randperm(len(train), generator=generator)])
        batch, order = train[order[: args.batch]], order[args.batch :]
        factor = schedule(step, args.steps)
        for optimizer, rate in zip(optimizers, base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        running = loss.item() if step == 0 else 0.97 * running + 0.03 * loss.item()
        if step % 20 == 19:
            rate = (step + 1) * args.batch * BLOCK / (time.monotonic() - started)
            print(f"step {step + 1} loss {running:.4f} tokens/s {rate:.0f}", flush=True)
        if step % 200 == 199 or step + 1 == args.steps:
            nats = heldout_loss(model, heldout)
            print(
                f"step {step + 1} held-out {nats:.4f} perplexity {math.exp(nats):.2f}", flush=True
            )

    model.to(torch.bfloat16).eval()
    if args.experts:
        model.config.output_router_logits = False
    model.generation_config.do_sample = False
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
