"""What transformers reads off a model: whether it is quantized, by whom, and what is tied."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from bitlab_hf.config import QUANT_METHOD
from bitlab_hf.model.count import WeightCount
from bitlab_hf.model.tree import Found
from bitlayers.base import BitLayerBase
from bitlayers.experts import BitExperts
from bitlayers.state import SCALES

Weighted = TypeVar("Weighted", nn.Linear, BitLayerBase, BitExperts)


def mark_quantized(model: PreTrainedModel, quantizer: HfQuantizer) -> None:
    """Makes a model with packed layers a quantized one in transformers' eyes."""
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        part: Any = module
        part.num_parameters = WeightCount(module)
        if part.config is model.config:
            # A base model is saved by itself, too.
            part.hf_quantizer = quantizer
            part.is_quantized = True
            part.quantization_method = QUANT_METHOD
            # What is saved from here on has the model's own names.
            part._weight_conversions = []


def unmark(model: PreTrainedModel) -> None:
    """Takes back what `mark_quantized` did to the parts of a model that is float again."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            fields = vars(module)
            names = ["num_parameters", "_weight_conversions"]
            if module is not model:
                names += ["hf_quantizer", "is_quantized", "quantization_method"]
            for name in names:
                fields.pop(name, None)


def mark_latent(model: PreTrainedModel) -> None:
    """Makes a latent model a float model in transformers' eyes; its configuration stays."""
    attributes: Any = model
    del attributes.hf_quantizer
    attributes.is_quantized = False
    del attributes.quantization_method
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = False


def retie_packed(model: PreTrainedModel, apart: set[str]) -> None:
    """Names the weights of packed layers that are tied to each other after what took their place.

    What transformers ties by name is then tied by it again, after a load and before a save. A pair
    of which one side is no packed layer, such as an embedding, is dropped.

    Args:
        model: The model.
        apart: Layers that hold tensors of their own all the same.
    """

    def renamed(tied: dict[str, str], prefix: str, buffers: bool) -> dict[str, str]:
        pairs: dict[str, str] = {}
        for target, source in tied.items():
            names = [f"{prefix}{name}" for name in (target, source)]
            packed = [_packed_names(model, name, buffers) for name in names]
            if not any(packed):
                pairs[target] = source
            elif all(packed) and not apart.intersection(
                name.removesuffix(".weight") for name in names
            ):
                ends = ((name.removeprefix(prefix) for name in side) for side in packed)
                pairs.update(zip(*ends, strict=True))
        return pairs

    # transformers looks up what it ties while loading among the Parameters.
    model.all_tied_weights_keys = renamed(model.all_tied_weights_keys or {}, "", False)
    for name, part in model.named_modules():
        tied = getattr(part, "_tied_weights_keys", None)
        if isinstance(part, PreTrainedModel) and isinstance(tied, dict):
            again = renamed(tied, f"{name}." if name else "", True)
            if again != tied:
                part._tied_weights_keys = again


def tied_groups(model: nn.Module, found: list[Found[Weighted]]) -> list[list[Found[Weighted]]]:
    """Groups layers, or experts, by the weight that transformers will make one."""
    groups: dict[str, list[Found[Weighted]]] = {}
    for one in found:
        stacks = one.module.stacks if isinstance(one.module, BitExperts) else ["weight"]
        group = [one]
        groups.update({f"{name}.{leaf}": group for name in one.names for leaf in stacks})
    for pair in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        first, second = map(groups.get, pair)
        if first is not None and second is not None and first is not second:
            first += second
            groups.update((name, first) for name, held in groups.items() if held is second)
    return list({id(group): group for group in groups.values()}.values())


def scales_of(model: nn.Module, name: str) -> tuple[nn.Module, list[str]]:
    """Returns who holds the scales of a packed weight, and the names of the buffers there.

    Args:
        model: The model.
        name: Of the layer, or of the tensor of experts.
    """
    owner, _, leaf = name.rpartition(".")
    holder = model.get_submodule(owner)
    if isinstance(holder, BitExperts):
        names = [f"{leaf}_{scale}" for scale in SCALES]
    else:
        holder, names = model.get_submodule(name), list(SCALES)
    return holder, [one for one in names if one in holder._buffers]


def _packed_names(model: PreTrainedModel, name: str, buffers: bool) -> list[str]:
    """Returns the names of what took the place of a float weight; none where nothing did."""
    owner, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        # A pattern, which finds the packed names by itself.
        return []
    if isinstance(module, BitExperts):
        if leaf not in module.stacks or not module.is_packed(leaf):
            return []
        ends = [f"{leaf}_qweight", *(scales_of(model, name)[1] if buffers else ())]
    elif leaf == "weight" and getattr(module, "is_deployed", False):
        held = [scale for scale in SCALES if module._buffers.get(scale) is not None]
        ends = ["qweight", *(held if buffers else ())]
    else:
        return []
    return [f"{owner}.{end}" for end in ends]
