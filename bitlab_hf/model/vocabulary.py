"""``resize_token_embeddings`` of models whose output head or embedding is quantized."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from bitcore.errors import LifecycleError
from bitlayers.base import BitLayerBase
from bitlayers.quantized import QuantizedModule
from bitlayers.training import make_learned_scale


class FixedVocabulary:
    """Stands for ``resize_token_embeddings`` of a model whose head or embedding is packed: it
    refuses to resize.

    Args:
        embedding: The model's input embedding.
    """

    def __init__(self, embedding: Any) -> None:
        self._embedding = embedding

    def __call__(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """Returns the embedding if it has the size asked for.

        Raises:
            LifecycleError: It has another size.
        """
        size: int = self._embedding.num_embeddings
        wanted = size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
        if wanted != size:
            raise LifecycleError(
                f"resize_token_embeddings: new_num_tokens must be {size} once the head or the "
                f"embedding is packed, got {wanted}\nResize the float or latent model before "
                "deploy(), or call model.dequantize() first."
            )
        embedding: nn.Module = self._embedding
        return embedding


class TernaryVocabulary:
    """Stands for ``resize_token_embeddings`` of a latent model whose head is ternary.

    transformers puts a float linear layer in the place of a head that it resizes; here the ternary
    one stays, with its new weight.

    Args:
        model: The model; held weakly, since it will hold this.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)

    def __call__(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """Resizes the embedding and the head; returns the embedding."""
        model = self._model()
        assert model is not None
        layer: Any = model.get_output_embeddings()
        resize = type(model).resize_token_embeddings
        embedding: nn.Module = resize(model, new_num_tokens, pad_to_multiple_of, mean_resizing)
        head: Any = model.get_output_embeddings()
        if head is not layer:
            layer.weight, layer.bias = head.weight, head.bias
            model.set_output_embeddings(layer)
        layer.out_features = layer.weight.shape[0]
        layer.invalidate_cache()
        _resize_scale(layer)
        return embedding

    def __getstate__(self) -> PreTrainedModel | None:
        """For copies and pickles of the model: theirs resize themselves."""
        return self._model()

    def __setstate__(self, model: PreTrainedModel) -> None:
        self.__init__(model)  # type: ignore[misc]


@torch.no_grad()
def _resize_scale(layer: BitLayerBase) -> None:
    """Gives new rows a learned scale as their weights start it; the others keep theirs."""
    before = layer.learned_scale
    if before is None or before.shape == torch.Size(layer.estimated_shape()):
        return
    make_learned_scale(layer)
    scale = layer.learned_scale
    assert scale is not None
    rows = min(len(before), len(scale))
    scale[:rows] = before[:rows]


def input_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """Returns the model's input embedding, or None where it has none."""
    try:
        found: nn.Module | None = model.get_input_embeddings()
    except NotImplementedError:
        # transformers' way to say that a model has none.
        return None
    return found


def guard_vocabulary(model: nn.Module) -> None:
    """Lets a model with a ternary head be resized while it is latent, and refuse once its head or
    its embedding is packed; so do the models inside it.
    """
    for part in model.modules():
        if not isinstance(part, PreTrainedModel):
            continue
        attributes: Any = part
        embedding, head = input_embeddings(part), part.get_output_embeddings()
        latent = isinstance(head, BitLayerBase) and not head.is_deployed
        if isinstance(embedding, QuantizedModule) or (
            isinstance(head, QuantizedModule) and not latent
        ):
            attributes.resize_token_embeddings = FixedVocabulary(embedding)
        elif latent and part is model:
            attributes.resize_token_embeddings = TernaryVocabulary(part)
