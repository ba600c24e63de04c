"""``resize_token_embeddings`` of models whose output head is quantized."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from bitcore.errors import LifecycleError
from bitlayers.base import BitLayerBase


class FixedVocabulary:
    """Stands for ``resize_token_embeddings`` of a model whose head is packed: it refuses to resize.

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
                f"resize_token_embeddings: new_num_tokens must be {size} once the head is packed, "
                f"got {wanted}\nResize the float or latent model before deploy(), or call "
                "model.dequantize() first."
            )
        embedding: nn.Module = self._embedding
        return embedding


class TernaryVocabulary:
    """Stands for ``resize_token_embeddings`` of a latent model whose head is ternary.

    transformers puts a float linear layer in the place of a head that it resizes; here that becomes
    a ternary one again.

    Args:
        model: The model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def __call__(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """Resizes the embedding and the head; returns the embedding."""
        model, before = self._model, self._model.get_output_embeddings()
        resize = type(model).resize_token_embeddings
        embedding: nn.Module = resize(model, new_num_tokens, pad_to_multiple_of, mean_resizing)
        head = model.get_output_embeddings()
        if type(head) is nn.Linear and isinstance(before, BitLayerBase):
            layer = type(before).from_linear(head, before.quant_config)
            layer.float_dtype = before.float_dtype
            model.set_output_embeddings(layer)
        elif isinstance(head, BitLayerBase):
            # Tied: its weight has grown with the embedding.
            head.out_features = head.weight.shape[0]
            head.invalidate_cache()
        return embedding


def guard_vocabulary(model: nn.Module) -> None:
    """Lets a model with a ternary head be resized while it is latent, and refuse once deployed."""
    if not isinstance(model, PreTrainedModel):
        return
    attributes: Any = model
    head = model.get_output_embeddings()
    if isinstance(head, BitLayerBase) and head.is_deployed:
        attributes.resize_token_embeddings = FixedVocabulary(model.get_input_embeddings())
    elif isinstance(head, BitLayerBase):
        attributes.resize_token_embeddings = TernaryVocabulary(model)
