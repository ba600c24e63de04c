"""Attention of one token in a compiled step, in two ways."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

EXACT, FUSED = "bitlab_decoding_exact", "bitlab_decoding_fused"
# What transformers' attention functions may be asked for, and this one does not do.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cache")


def attend_as_eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Attends as transformers' sdpa does, to the first tokens of a static cache: the bits are those
    that it has with a dynamic one.

    Args:
        module: The attention module.
        query: [B, heads, 1, D].
        key: [B, key heads, L, D].
        value: [B, key heads, L, D'].
        attention_mask: [B, 1, 1, tokens]; says nothing but how many there are.
        kwargs: Those of transformers' attention functions.

    Returns:
        [B, 1, heads, D'] of query's dtype, and no weights.
    """
    tokens = attention_mask.shape[-1]
    found: tuple[Tensor, Any] = sdpa_attention_forward(
        module, query, key[:, :, :tokens], value[:, :, :tokens], None, **kwargs
    )
    return found


def attend_fused(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The same in operations that inductor fuses: torch's kernel sets up two matrix products for
    each head, and on some CPUs multiplies 16-bit values slowly.

    Args:
        module: As above.
        query: As above.
        key: As above.
        value: As above.
        attention_mask: bool [B, 1, 1, up to L]; what is beyond its end is not read.
        dropout: Must be 0.
        scaling: Of the scores; default D^-0.5.
        kwargs: As above; they may change nothing.

    Returns:
        As above.

    Numerics:
        Scores and sums in float32; weights are rounded to query's dtype before they meet the
        values, as in torch's kernel, but sums have another order.

    Raises:
        NotImplementedError: An argument asks for more.
    """
    asked = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if asked or dropout or query.shape[2] != 1 or attention_mask.dtype is not torch.bool:
        raise NotImplementedError(f"attention with {asked or 'another mask, length or dropout'}")
    batch, heads, _, width = query.shape
    groups, length = key.shape[1], attention_mask.shape[-1]
    scaling = width**-0.5 if scaling is None else scaling
    key, value = key[:, :, :length].unsqueeze(2), value[:, :, :length].unsqueeze(2)
    queries = (query.float() * scaling).view(batch, groups, heads // groups, 1, width)
    scores = (queries * key.float()).sum(-1)
    scores = torch.where(attention_mask.view(batch, 1, 1, length), scores, float("-inf"))
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    summed = (weights.to(query.dtype).float().unsqueeze(-1) * value.float()).sum(-2)
    output = (summed / weights.sum(-1, keepdim=True)).to(query.dtype)
    return output.view(batch, 1, heads, -1), None
