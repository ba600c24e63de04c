"""What a language model is scored on: held-out articles, and two tasks that are built from them.

Nothing here needs a hub: the articles are `scripts/real_models.py`'s.
"""

from __future__ import annotations

import copy
import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# A word that ends a sentence, and may have been read before in the same text.
_LAST_WORD = re.compile(r"(?<=\s)([A-Za-z]{4,})\.(?=\s|$)")
_CHOICES = 4
# Context tokens of the tasks; what is left out is its beginning.
_CONTEXT = 192


@dataclass(frozen=True)
class Example:
    """A context and what may follow it; the first choice is the right one.

    Attributes:
        context: Token ids.
        choices: Token ids of each.
        sizes: Bytes of each, which a likelihood is divided by.
    """

    context: list[int]
    choices: list[list[int]]
    sizes: list[int]


@dataclass(frozen=True)
class Tasks:
    """Everything that a model is scored on, as its tokenizer sees it.

    Attributes:
        blocks: Held-out articles, int64 [count, length].
        bytes: Of what is predicted in them.
        words: Last words of sentences, one choice each.
        titles: Articles without their titles, and four titles of one topic.
    """

    blocks: Tensor
    bytes: int
    words: list[Example]
    titles: list[Example]


def read_articles(folder: Path, part: str) -> list[dict[str, str]]:
    """Reads the articles of a text's part: title, text, description, topic."""
    lines = (folder / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def begins(tokenizer: Any) -> list[int]:
    """Returns what the tokenizer puts before a text: its BOS token, or nothing."""
    ids: list[int] = tokenizer("a")["input_ids"]
    return ids[:1] if ids[0] == tokenizer.bos_token_id else []


def pack_blocks(
    tokenizer: Any, texts: Sequence[str], count: int | None, length: int, seed: int
) -> Tensor:
    """Returns blocks of tokens of texts one after another, int64 [count, length].

    Args:
        tokenizer: The model's.
        texts: The texts, shuffled by the seed.
        count: How many blocks; None for all that there are.
        length: Tokens of a block, a BOS before each where the tokenizer puts one.
        seed: Of the order.

    Raises:
        SystemExit: The texts hold fewer.
    """
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    first = begins(tokenizer)
    width = length - len(first)
    ids: list[int] = []
    for index in order.tolist():
        ids += tokenizer(texts[index] + "\n\n", add_special_tokens=False)["input_ids"]
        if count is not None and len(ids) >= count * width:
            break
    held = len(ids) // width
    if count is not None and held < count:
        raise SystemExit(f"quality: the text must hold {count} blocks, got {held}")
    blocks = held if count is None else count
    rows = torch.tensor(ids[: blocks * width]).view(blocks, width)
    return torch.cat([torch.tensor(first).expand(blocks, -1).long(), rows], 1)


def make_tasks(
    tokenizer: Any, folder: Path, part: str, blocks: int, examples: int, length: int = 256
) -> Tasks:
    """Builds what a model is scored on from the articles of a part; the same each time."""
    articles = read_articles(folder, part)
    packed = pack_blocks(tokenizer, [one["text"] for one in articles], blocks, length, 0)
    return Tasks(
        packed,
        sum(len(tokenizer.decode(row[1:]).encode()) for row in packed),
        list(_words(tokenizer, articles))[:examples],
        list(_titles(tokenizer, articles))[:examples],
    )


def _words(tokenizer: Any, articles: list[dict[str, str]]) -> Iterator[Example]:
    """Yields the last word of a sentence of each article, where it stands in the text before."""
    for article in articles:
        text = article["text"]
        for match in reversed(list(_LAST_WORD.finditer(text))):
            before = text[: match.start()].rstrip()
            if re.search(rf"\b{match[1]}\b", before, re.IGNORECASE):
                yield _example(tokenizer, before, [f" {match[1]}"])
                break


def _titles(tokenizer: Any, articles: list[dict[str, str]]) -> Iterator[Example]:
    """Yields articles that do not name themselves, with their title and three of their topic."""
    rng = random.Random(0)
    for article in articles:
        title = article["title"]
        text, found = re.subn(re.escape(title), "this", article["text"], flags=re.IGNORECASE)
        others = sorted(
            {one["title"] for one in articles if one["topic"] == article["topic"]} - {title}
        )
        if found and len(others) >= _CHOICES - 1:
            choices = [title, *rng.sample(others, _CHOICES - 1)]
            context = f"{text}\n\nThe title of this article is"
            yield _example(tokenizer, context, [f" {choice}" for choice in choices])


def _example(tokenizer: Any, context: str, choices: list[str]) -> Example:
    first = begins(tokenizer)
    ids = tokenizer(context, add_special_tokens=False)["input_ids"][-_CONTEXT:]
    return Example(
        first + ids,
        [tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in choices],
        [len(choice.encode()) for choice in choices],
    )


@torch.no_grad()
def score(model: Any, tasks: Tasks, original: Tensor | None = None) -> dict[str, Any]:
    """Scores a model.

    Args:
        model: A causal language model; put into eval mode.
        tasks: Of its own tokenizer.
        original: The original model's likeliest next tokens on the blocks, of `likeliest`.

    Returns:
        ``nats`` a token, ``bits_per_byte``, ``last_words`` and ``titles`` (shares that are right),
        and with an original ``agreement``, the share of next tokens that are its; the likeliest
        next tokens themselves as ``predicted``, int32 [count, length - 1].
    """
    model.eval()
    total, predicted = 0.0, []
    device = next(model.parameters()).device
    for part in tasks.blocks.to(device).split(4):
        logits = model(input_ids=part).logits[:, :-1].float()
        total += F.cross_entropy(
            logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"
        ).item()
        predicted.append(logits.argmax(-1).int().cpu())
    likeliest = torch.cat(predicted)
    result = {
        "nats": total / likeliest.numel(),
        "bits_per_byte": total / math.log(2) / tasks.bytes,
        "last_words": _share(_said(model, one) for one in tasks.words),
        "titles": _share(_chosen(model, one) == 0 for one in tasks.titles),
        "predicted": likeliest,
    }
    if original is not None:
        result["agreement"] = float((likeliest == original).double().mean())
    return result


def _share(right: Iterator[bool]) -> float:
    found = list(right)
    return sum(found) / max(1, len(found))


def _log_probabilities(model: Any, example: Example) -> list[tuple[float, bool]]:
    """Returns of each choice its log-likelihood, and whether every token of it is the likeliest."""
    device = next(model.parameters()).device
    ids = torch.tensor([example.context], device=device)
    context = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    results = []
    for choice in example.choices:
        logits = context.logits[0]
        if len(choice) > 1:
            # Each choice goes on from the same context.
            cache = copy.deepcopy(context.past_key_values)
            ids = torch.tensor([choice[:-1]], device=device)
            rest = model(input_ids=ids, past_key_values=cache)
            logits = torch.cat([logits, rest.logits[0]])
        wanted = torch.tensor(choice, device=device)
        likelihood = logits.float().log_softmax(-1).gather(1, wanted[:, None]).sum().item()
        results.append((likelihood, bool((logits.argmax(-1) == wanted).all())))
    return results


def _said(model: Any, example: Example) -> bool:
    return _log_probabilities(model, example)[0][1]


def _chosen(model: Any, example: Example) -> int:
    scored = [
        likelihood / size
        for (likelihood, _), size in zip(
            _log_probabilities(model, example), example.sizes, strict=True
        )
    ]
    return scored.index(max(scored))
