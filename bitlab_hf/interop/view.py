"""A model as `save` writes it in another format."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedModel

from bitcore.errors import ArgumentError
from bitlab_hf.model.tree import Found
from bitlayers.base import BitLayerBase


def view_of(
    op: str, model: PreTrainedModel, layers: list[Found[BitLayerBase]], scheme: dict[str, Any]
) -> Any:
    """Returns a shallow copy of a model with another scheme in its configuration.

    Neither the model nor its configuration is touched.

    Args:
        op: Who asks, for error messages.
        model: A latent or deployed model.
        layers: Those that the file holds packed. An output head among them has weights of its own
            there, also where it is latent and tied to the embedding.
        scheme: The file's ``quantization_config``.

    Raises:
        ArgumentError: The head is among them, and the model ties other modules by the same field.
    """
    view: Any = copy.copy(model)
    view.__dict__.pop("hf_quantizer", None)
    view.__dict__.pop("quantization_method", None)
    view.config = copy.deepcopy(model.config)
    view.config.quantization_config = scheme
    output = model.get_output_embeddings()
    for head in (found for found in layers if found.module is output):
        own = {f"{name}.weight" for name in head.names}
        others = sorted((model.all_tied_weights_keys or {}).keys() - own)
        if others:
            raise ArgumentError(
                f"{op}: {head.names[0]} must not be ternary in a model that ties others by "
                f"tie_word_embeddings too, got {others[0]} tied\nConvert it with head='keep'."
            )
        view.config.tie_word_embeddings = False
        view.config.get_text_config().tie_word_embeddings = False
    return view
