"""Token blocks of the demo's text, and perplexity over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitlab_hf.demo.corpus import SourceFile


@dataclass(frozen=True)
class Blocks:
    """Text as token blocks.

    Attributes:
        ids: int64 [blocks, length].
        bytes_per_token: UTF-8 bytes of text a token, over all of the text.
    """

    ids: Tensor
    bytes_per_token: float

    def first(self, tokens: int) -> Blocks:
        """Returns the leading blocks that hold about this many tokens, one at least."""
        return Blocks(self.ids[: max(1, tokens // self.ids.shape[1])], self.bytes_per_token)


def make_blocks(tokenizer: Any, files: Iterable[SourceFile], length: int) -> Blocks:
    """Concatenates files, a separator before each, and cuts them into blocks; a rest is dropped."""
    texts = [file.text for file in files]
    encoded = [
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts
    ]
    separator = tokenizer.bos_token_id
    if separator is None:
        separator = tokenizer.eos_token_id
    prefix = [] if separator is None else [separator]
    stream = [token for ids in encoded for token in (*prefix, *ids)]
    count = len(stream) // length
    if count == 0:
        raise ValueError(f"the text must hold at least {length} tokens, got {len(stream)}")
    size = sum(len(text.encode()) for text in texts)
    return Blocks(torch.tensor(stream[: count * length]).view(count, length), size / len(stream))


@dataclass(frozen=True)
class Perplexity:
    """Loss over held-out text.

    Attributes:
        nats: Mean loss a token.
        bits_per_byte: The same in bits a byte of text, comparable among tokenizers.
    """

    nats: float
    bits_per_byte: float

    @property
    def value(self) -> float:
        """The perplexity: ``exp(nats)``, infinity where that is too large for a float."""
        return math.inf if self.nats > 709 else math.exp(self.nats)


@torch.no_grad()
def measure_perplexity(
    model: Any, blocks: Blocks, batch: int = 8, advance: Callable[[int], None] | None = None
) -> Perplexity:
    """Scores every token of every block but the first, in eval mode.

    Args:
        model: A causal language model; its mode is put back afterwards.
        blocks: The text.
        batch: Blocks at a time.
        advance: Called with the number of blocks done.
    """
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for ids in torch.split(blocks.ids, batch):
        ids = ids.to(model.device)
        logits = model(input_ids=ids).logits[:, :-1].float()
        targets = ids[:, 1:]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="sum"
        )
        total, count = total + loss.item(), count + targets.numel()
        if advance is not None:
            advance(len(ids))
    model.train(training)
    nats = total / count
    return Perplexity(nats, nats / math.log(2) / blocks.bytes_per_token)
