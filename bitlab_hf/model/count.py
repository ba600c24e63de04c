"""How many weights a packed model has: four of them lie in an element of its packed tensors."""

from __future__ import annotations

import weakref

from torch import nn
from transformers import PreTrainedModel

from bitlayers.base import BitLayerBase
from bitlayers.int8 import Int8Embedding


def uncounted_weights(model: nn.Module, exclude_embeddings: bool = False) -> int:
    """Returns how many weights a count of the elements of a model's Parameters leaves out.

    Args:
        model: Any module tree.
        exclude_embeddings: Whether the count is one without embeddings, which knows them by a
            Parameter called ``weight``: then the codes of an int8 embedding are taken off.
    """
    missing = 0
    for name, parameter in model.named_parameters():
        parent, _, leaf = name.rpartition(".")
        layer = model.get_submodule(parent) if leaf == "qweight" else None
        if isinstance(layer, BitLayerBase) and layer.is_deployed:
            missing += layer.out_features * layer.in_features - parameter.numel()
        elif isinstance(layer, Int8Embedding) and exclude_embeddings:
            missing -= parameter.numel()
    return missing


class WeightCount:
    """Stands for ``num_parameters`` of a model with packed layers.

    Args:
        model: The model; held weakly, since it will hold this.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)

    def __call__(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Returns how many weights the model has, each packed one counted; packed ones never
        train.
        """
        model = self._model()
        assert model is not None
        # The class's own: the instance's attribute is this object.
        held: int = type(model).num_parameters(model, only_trainable, exclude_embeddings)
        return held if only_trainable else held + uncounted_weights(model, exclude_embeddings)

    def __getstate__(self) -> PreTrainedModel | None:
        """For copies and pickles of the model: theirs count themselves."""
        return self._model()

    def __setstate__(self, model: PreTrainedModel) -> None:
        self.__init__(model)  # type: ignore[misc]
