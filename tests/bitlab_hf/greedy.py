"""What plain ``generate`` says, where no token is a matter of the last bits of a sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def greedy_tokens(model: Any, ids: Tensor, margin: float, **options: Any) -> list[int]:
    """Returns the tokens behind a prompt, each of which is ahead of all others.

    Other programs, and other batches, add up in another order. A test that compares their tokens
    with these asks by which margin a token must win, in logits; a prompt that has a closer one is
    the wrong prompt to ask.
    """
    wanted = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **{**options, **wanted})
    best = [logits.float().topk(2).values[0] for logits in found.logits]
    closest = min(float(first - second) for first, second in best)
    assert closest >= margin, f"a token wins by {closest}: take another prompt"
    tokens: list[int] = found.sequences[0, ids.shape[1] :].tolist()
    return tokens
