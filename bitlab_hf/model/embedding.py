"""A ternary embedding: found, put into a skeleton, given back in floats.

It is deployed only: a file holds it packed because its values were ternary already. A head that is
tied to it is a `BitLinear`, found and swapped as any linear layer is; the two hold one ``qweight``
and one scale, as packed layers that are tied to each other do (`bitlab_hf.model.marks`).
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from bitcore.errors import ConfigError
from bitlab_hf.config import BitLabConfig
from bitlab_hf.model.rows import (
    Rows,
    check_supported,
    embedding_factor,
    find_rows,
    float_embedding,
)
from bitlab_hf.model.tree import Found, aliases_of, find_modules, set_module, take_hooks
from bitlab_hf.model.vocabulary import guard_vocabulary, input_embeddings
from bitlayers.embedding import TernaryEmbedding

_STORED = 'embedding="ternary"', "config.json and the tensors do not belong together."


def find_embedding(model: PreTrainedModel) -> Rows | None:
    """Returns the input embedding of a skeleton with what is tied to it; None where it has none.

    Raises:
        ConfigError: One of them has no ternary form.
    """
    embedding = input_embeddings(model)
    if not isinstance(embedding, nn.Embedding):
        return None
    rows = find_rows(model, embedding, *_STORED)
    check_supported(model, rows, *_STORED)
    return rows


def packable_embedding(model: PreTrainedModel) -> Rows | None:
    """Returns the input embedding of a float skeleton with what is tied to it; None where there is
    none, or no ternary form of all of them.
    """
    try:
        return find_embedding(model)
    except ConfigError:
        return None


def swap_embeddings(model: PreTrainedModel, rows: Rows, config: BitLabConfig) -> None:
    """Puts ternary embeddings in the place of those among some modules, for a loader to fill.

    Args:
        model: The skeleton.
        rows: The input embedding with what is tied to it.
        config: How they are quantized.
    """
    for found in rows.members:
        module, name = found.module, found.names[0]
        if not isinstance(module, nn.Embedding):
            continue
        scaled = () if type(module) is nn.Embedding else embedding_factor(module) or ()
        scheme = config.layer_config(*aliases_of(model, name))
        skeleton = TernaryEmbedding.skeleton(module, scheme, *scaled)
        # transformers would fill the weight of an embedding that it takes for a new one.
        skeleton._is_hf_initialized = True
        take_hooks(module, skeleton)
        found.module = skeleton
        for alias in found.names:
            set_module(model, alias, skeleton)
    guard_vocabulary(model)


def ternary_embeddings(model: nn.Module) -> list[Found[TernaryEmbedding]]:
    """Returns the ternary embeddings of a model, each once."""
    return find_modules(model, TernaryEmbedding)


def restore_embeddings(
    model: nn.Module, dtype: torch.dtype | None, weights: dict[int, nn.Parameter]
) -> None:
    """Puts float embeddings back for ternary ones, with codes times scale.

    Args:
        model: The model.
        dtype: Of the weights, or None for float32.
        weights: What was made of each ``qweight`` so far, by its id: what shares one shares it.
    """
    for found in ternary_embeddings(model):
        module = found.module
        key = id(module.qweight)
        if key not in weights:
            weights[key] = nn.Parameter(module.dequantized_weight(dtype))
        restored = float_embedding(module, weights[key])
        take_hooks(module, restored)
        for name in found.names:
            set_module(model, name, restored)
