"""What plain ``generate`` says, where no token is a matter of the last bits of a sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def greedy_tokens(model: Any, ids: Tensor, margin: float, **options: Any) -> list[int]:
    """Returns the tokens behind a prompt, up to the first that is not ahead of all others.

    Other programs, and other batches, add up in another order. A test that compares their tokens
    with these says by which margin a token must win, in logits. Where one does not, by weights that
    another CPU has trained to other bits, say, what comes after it can be anything.
    """
    wanted = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **{**options, **wanted})
    best = [logits.float().topk(2).values[0] for logits in found.logits]
    close = [at for at, (first, second) in enumerate(best) if float(first - second) < margin]
    tokens: list[int] = found.sequences[0, ids.shape[1] :].tolist()
    return tokens[: min(close, default=len(tokens))]
