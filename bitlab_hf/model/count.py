"""How many weights a packed model has, four of them in an element of its packed tensors, and how
many bits each takes.
"""

from __future__ import annotations

import math
import weakref

from torch import nn
from transformers import PreTrainedModel

from bitcore.errors import ArgumentError
from bitlab_hf.model.experts import expert_modules
from bitlab_hf.model.parts import packed_shapes, shares
from bitlab_hf.model.rows import stored_elsewhere
from bitlab_hf.model.tree import ternary_modules
from bitlayers.lookup import QuantizedEmbedding
from bitlayers.state import LayerState


def bits_per_weight(model: nn.Module) -> float:
    """Returns the bits that a file of the deployed model holds for each ternary weight: its code,
    and its share of the scales and multipliers.

    A ternary embedding's are among them. A layer that is latent is counted as it will be deployed,
    one that packed itself with all that it stores but a bias; a matrix that several modules share
    counts once, and one that is spread over processes as it is whole.

    Args:
        model: Any module tree with ternary layers, in any state.

    Raises:
        ArgumentError: The model has no ternary layer.
    """
    bits: dict[int, int] = {}
    weights: dict[int, int] = {}
    # By name, too: offloaded weights that are tied are Parameters of their own.
    elsewhere = stored_elsewhere(model) if isinstance(model, PreTrainedModel) else set[str]()
    for found in ternary_modules(model):
        layer = found.module
        if not elsewhere.isdisjoint(f"{name}.qweight" for name in found.names):
            continue
        if layer.packs_itself:
            own = (tensor for name, tensor in layer.state_dict().items() if name != "bias")
            key, stored = id(layer), sum(tensor.nbytes for tensor in own)
        else:
            key = id(layer.qweight if layer.is_deployed else layer.weight)
            held = packed_shapes(layer).values()
            stored = sum(dtype.itemsize * math.prod(shape) for dtype, shape in held)
        bits[key] = 8 * stored
        weights[key] = layer.out_features * layer.in_features * shares(layer)
    for one in expert_modules(model):
        held = packed_shapes(one.module).values()
        bits[id(one.module)] = 8 * sum(dtype.itemsize * math.prod(shape) for dtype, shape in held)
        here = sum(stack.weights for stack in one.module.stacks.values())
        weights[id(one.module)] = here * shares(one.module)
    if not weights:
        raise ArgumentError(
            f"bits_per_weight: model must hold ternary layers, got {type(model).__name__} without"
        )
    return sum(bits.values()) / sum(weights.values())


def uncounted_weights(model: nn.Module, exclude_embeddings: bool = False) -> int:
    """Returns how many weights a count of the elements of a model's Parameters leaves out.

    Args:
        model: Any module tree.
        exclude_embeddings: Whether the count is one without embeddings, which knows them by a
            Parameter called ``weight``: then the codes of a quantized embedding are taken off.
    """
    missing = 0
    for name, parameter in model.named_parameters():
        parent, _, leaf = name.rpartition(".")
        layer = model.get_submodule(parent) if leaf == "qweight" else None
        if isinstance(layer, QuantizedEmbedding) and exclude_embeddings:
            missing -= parameter.numel()
        elif isinstance(layer, LayerState) and layer.is_deployed:
            missing += layer.out_features * layer.in_features - parameter.numel()
    for one in expert_modules(model):
        for name, stack in one.module.stacks.items():
            if one.module.is_packed(name):
                missing += stack.weights - one.module.packed_stack(name)["qweight"].numel()
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
