"""Compares an exported GGUF file in llama.cpp with the model it came from.

Needs llama-cpp-python beside BitLab; it is no dependency, since its installation compiles for a
quarter of an hour. Prints, over teacher-forced tokens of a text, how often both name the same most
likely token and the mean KL divergence in nats, then the greedy continuation of both.

    python scripts/check_gguf.py MODEL_FOLDER MODEL.gguf --text heldout.txt
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def llama_logits(llama: Any, ids: list[int]) -> torch.Tensor:
    """Logits of llama.cpp for every token, float32 [tokens, vocabulary]."""
    llama.reset()
    llama.eval(ids)
    return torch.tensor(llama.scores[: len(ids)], dtype=torch.float32)


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="the model's folder")
    parser.add_argument("file", help="the GGUF file exported from it")
    parser.add_argument("--text", type=Path, required=True, help="a text file")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--length", type=int, default=250, help="tokens of a block")
    parser.add_argument("--prompt", default="def main():")
    options = parser.parse_args()
    from llama_cpp import Llama

    llama = Llama(options.file, n_ctx=options.length + 64, logits_all=True, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    text = options.text.read_text()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][: options.tokens]
    theirs = llama.tokenize(text.encode(), add_bos=False, special=True)[: options.tokens]
    print(f"tokens: {len(ids)}, the same in both tokenizers: {ids == theirs}")
    same, divergence = 0, 0.0
    for start in range(0, len(ids), options.length):
        block = ids[start : start + options.length]
        with torch.no_grad():
            ours = model(input_ids=torch.tensor([block])).logits[0].float().log_softmax(-1)
        other = llama_logits(llama, block).log_softmax(-1)
        same += int((ours.argmax(-1) == other.argmax(-1)).sum())
        divergence += float((ours.exp() * (ours - other)).sum())
    print(f"same most likely token: {same / len(ids):.2%}")
    print(f"mean KL divergence: {divergence / len(ids):.5f} nats a token")
    encoded = tokenizer(options.prompt, return_tensors="pt", add_special_tokens=False)
    output = model.generate(**encoded, max_new_tokens=48, do_sample=False)[0]
    print(f"BitLab:    {tokenizer.decode(output)!r}")
    llama.reset()
    tokens = encoded["input_ids"][0].tolist()
    for token in llama.generate(list(tokens), temp=0.0, repeat_penalty=1.0):
        tokens.append(token)
        if len(tokens) >= len(output) or token == tokenizer.eos_token_id:
            break
    print(f"llama.cpp: {tokenizer.decode(tokens)!r}")


if __name__ == "__main__":
    main()
