"""Compares an exported compressed-tensors folder in stock transformers with the model it came from.

Needs the package compressed-tensors beside BitLab. Prints, over teacher-forced tokens of a text,
how often both name the same most likely token and the mean KL divergence in nats, then the greedy
continuation of both. A folder has weights alone: of a model with int8 activations, most of what is
printed first is what quantizing them changes, and the second comparison, with BitLab's weights as
floats, leaves that out.

    python scripts/check_compressed.py MODEL_FOLDER EXPORTED_FOLDER --text heldout.txt
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def log_probabilities(model: Any, ids: list[int], length: int) -> Tensor:
    """Returns the model's log probabilities of every token, float32 [tokens, vocabulary]."""
    blocks = [ids[start : start + length] for start in range(0, len(ids), length)]
    logits = [model(input_ids=torch.tensor([block])).logits[0] for block in blocks]
    return torch.cat(logits).float().log_softmax(-1)


def compared(expected: Tensor, found: Tensor) -> str:
    """Says how near two models are."""
    same = float((expected.argmax(-1) == found.argmax(-1)).double().mean())
    nats = float((expected.exp() * (expected - found)).sum(-1).mean())
    most = float((expected - found).abs().max())
    return f"same most likely token {same:.2%}, KL {nats:.3g} nats a token, at most {most:.3g}"


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="the model's folder")
    parser.add_argument("exported", help="the folder exported from it")
    parser.add_argument("--text", type=Path, required=True, help="a text file")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--length", type=int, default=250, help="tokens of a block")
    parser.add_argument("--prompt", default="def main():")
    parser.add_argument("--dtype", default="float32", help="of the stock model")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ours: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    stock: Any = AutoModelForCausalLM.from_pretrained(options.exported, dtype=options.dtype).eval()
    text = options.text.read_text()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][: options.tokens]
    prompt = tokenizer(options.prompt, return_tensors="pt", add_special_tokens=False)
    found = log_probabilities(stock, ids, options.length)
    print(f"stock transformers, {options.dtype}, {len(ids)} tokens")
    generated = {"stock": stock.generate(**prompt, max_new_tokens=48, do_sample=False)[0]}
    for name in ("BitLab", "BitLab's weights as floats"):
        model = ours if name == "BitLab" else ours.dequantize()
        print(f"{name}: {compared(log_probabilities(model, ids, options.length), found)}")
        generated[name] = model.generate(**prompt, max_new_tokens=48, do_sample=False)[0]
    for name, tokens in generated.items():
        print(f"{name}: {tokenizer.decode(tokens)!r}")


if __name__ == "__main__":
    main()
